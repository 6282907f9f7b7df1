"""The commands as Python functions: signature, help and checks come from the options classes."""

import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2cli import console, flags, peers
from gpt2cli.cli import COMMANDS, options_class
from gpt2cli.errors import UsageError, names_without_dashes

# What a command's `run` returns, where it returns something.
RETURNS: dict[str, Any] = {"train": Path, "evaluate": dict[str, float]}


def signature_of(command: str) -> inspect.Signature:
    """Return the signature: fields that the command line takes by position, then keywords."""
    fields = flags.fields_of(options_class(command))
    positional = COMMANDS[command]
    parameters = []
    for name in sorted(fields, key=lambda name: name not in positional):
        default = fields[name].default
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if name in positional
                else inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
                annotation=fields[name].hint,
            )
        )
    return inspect.Signature(parameters, return_annotation=RETURNS.get(command))


def docstring_of(command: str) -> str:
    """Return the docstring: summary, settings in sections, and what is returned and raised."""
    cls = options_class(command)
    fields = flags.fields_of(cls)
    lines = [flags.summary_of(cls), "", f"Runs `gpt2cli {command}` with the same settings.", ""]
    lines.append("Args:")
    for names in flags.sections_of(cls).values():
        for name in names:
            text = f"{name}: {fields[name].help}"
            lines += textwrap.wrap(text, 92, initial_indent=" " * 4, subsequent_indent=" " * 8)
    if command == "train":
        lines += ["", "Returns:", "    The run folder, which `load_model` takes."]
    if command == "evaluate":
        lines += ["", "Returns:", "    loss (nats per token), perplexity, accuracy and tokens."]
    lines += ["", "Raises:", "    UserError: the text says what is wrong, where, and what to do."]
    return "\n".join(lines)


def function(command: str) -> Callable[..., Any]:
    """Return the Python function of a command."""
    cls = options_class(command)
    signature = signature_of(command)

    def call(*arguments: Any, **settings: Any) -> Any:
        wrong = next((name for name in settings if name not in signature.parameters), None)
        if wrong is not None:
            close = peers.for_flag(wrong, signature.parameters)
            raise UsageError(f"{command}() has no setting {wrong!r}{close}")
        try:
            bound = signature.bind(*arguments, **settings)
        except TypeError as error:
            raise UsageError(f"{command}(): {error}") from None
        with names_without_dashes():
            options = cls(**bound.arguments)
            console.verbose = options.verbose
            return importlib.import_module(f"gpt2cli.commands.{command}").run(options)

    call.__name__ = call.__qualname__ = command
    call.__module__ = "gpt2cli"
    call.__doc__ = docstring_of(command)
    call.__signature__ = signature  # type: ignore[attr-defined]  # what Shift-Tab shows
    call.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    return call

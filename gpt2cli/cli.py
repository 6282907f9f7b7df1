"""The command line: Fire turns flags into a command's options, and only then does work begin.

Left to itself, Fire runs a function before it complains about a misspelt flag, reads
`--prompt "Hello, world"` as a tuple and takes `--flag=false` for true. So the flags are checked
here first, each is handed over as `--name=value`, and the function that Fire calls only builds the
options.
"""

import dataclasses
import importlib
import inspect
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from gpt2cli import __version__, console, flags, peers, signals
from gpt2cli.errors import BusyError, UsageError, UserError

# Command -> the fields that may be given without their name, in order.
COMMANDS: dict[str, tuple[str, ...]] = {
    "download": ("model",),
    "encode": ("in_text", "out_npz"),
    "train": ("dataset",),
    "sample": ("prompt",),
    "interactive": (),
    "serve": (),
    "evaluate": ("dataset",),
    "convert": ("src", "dst"),
    "export": ("run_name", "dst"),
    "vocab": ("in_text", "out"),
    "init": ("name",),
    "doctor": (),
}

# Command -> advice about an unexpected argument.
UNEXPECTED = {
    "sample": ": put a text of several words in quotes",
    "interactive": ": to continue one text, use gpt2cli sample",
}

EXIT_STATUSES = {
    0: "Success.",
    1: "An error the user can fix; one line on standard error says how.",
    2: "A wrong command line.",
    75: "Another process uses the same files, or another host was stopped; try again later.",
    129: "SIGHUP: the terminal was closed.",
    130: "Ctrl-C.",
    141: "The program that read standard output closed it.",
    143: "SIGTERM.",
}
STATUS_OF = {UsageError: 2, BusyError: 75, UserError: 1}  # 75 is EX_TEMPFAIL of sysexits.h
OUT_OF_MEMORY = (
    "gpt2cli: out of memory. Lower --batch_size; for train also --seq_length, or add "
    "--memory_saving_gradients, --optimizer adafactor, --precision bfloat16 or "
    "--only_train_transformer_layers"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line and exit with a status of EXIT_STATUSES.

    Any exception that is not the user's to fix is a bug and keeps its traceback.

    Args:
        argv: the words, from a Python program that continues afterwards; None for sys.argv.
    """
    _open_closed_streams()
    restore: Callable[[], None] | None = None
    try:
        restore = signals.install()
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a text that cannot be shown must not end a run
                stream.reconfigure(encoding="utf-8", errors="replace")
        _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        console.say(f"gpt2cli: {error}")
        sys.exit(next(status for kind, status in STATUS_OF.items() if isinstance(error, kind)))
    except KeyboardInterrupt:
        console.say("gpt2cli: stopped by Ctrl-C")
        sys.exit(130)
    except signals.Stopped as stop:
        console.say(f"gpt2cli: stopped by {stop.name}")
        if stop.is_second:
            os._exit(signals.ENDED + stop.number)
        raise
    except BrokenPipeError:  # whoever read our output has gone, as with `| head`
        sys.exit(141)
    except OSError as error:  # a file of the user's that no module expected to fail
        if error.errno is None:
            raise
        console.say(f"gpt2cli: {error.filename or 'standard output'}: {error.strerror}")
        sys.exit(1)
    except Exception as error:
        # TensorFlow's class by name: importing it here would cost every command two seconds
        if not isinstance(error, MemoryError) and type(error).__name__ != "ResourceExhaustedError":
            raise
        console.say(OUT_OF_MEMORY)
        sys.exit(1)
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # Python would try again, and end with status 120
            console.drop(sys.stdout)
        if argv is not None and restore is not None:
            restore()


def _run(argv: Sequence[str]) -> None:
    try:
        options = read_command_line(argv)
        if options is not None:
            console.verbose = options.verbose
            sys.modules[type(options).__module__].run(options)
        sys.stdout.flush()
    except Exception:
        signals.check()
        raise


def _open_closed_streams() -> None:
    """Connect standard streams that the caller closed (`<&-`) to the null device.

    Standard output is opened for reading only, so that writing a result to it fails.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # gets the lowest free number, which is this one
            os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def options_class(command: str) -> type:
    """Return the dataclass of a command's options."""
    module = importlib.import_module(f"gpt2cli.commands.{command}")
    return getattr(module, f"{command.capitalize()}Options")


def read_command_line(argv: Sequence[str]) -> Any:
    """Return a command's options, or None where help or the version was printed.

    Raises:
        UsageError: an unknown command or flag, a missing or wrong value.
    """
    command = argv[0] if argv else "--help"
    if command == "--version":
        print(f"gpt2cli {__version__}")
        return None
    if command in ("--help", "-h", "help"):
        named = argv[1] if len(argv) > 1 and argv[1] in COMMANDS else None
        print(command_help(named) if named else general_help())
        return None
    if command not in COMMANDS:
        raise UsageError(
            f"unknown command {command!r}{peers.for_command(command, COMMANDS)}. The commands are "
            f"{', '.join(COMMANDS)}; see gpt2cli --help"
        )
    if "--help" in argv or "-h" in argv:
        print(command_help(command))
        return None
    return _build(command, _given_values(command, argv[1:]))


def _given_values(command: str, words: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts given for each field; every flag is checked before anything runs."""
    fields = flags.fields_of(options_class(command))
    given: dict[str, list[str]] = {}
    places = list(COMMANDS[command])
    words = list(words)
    while words:
        word = words.pop(0)
        if word.startswith("--") and word != "--":
            name, value = _read_flag(command, fields, word, words)
            if name in places:
                places.remove(name)
        elif places and word != "--":
            name, value = places.pop(0), word
        else:
            hint = UNEXPECTED.get(command, "")
            raise UsageError(f"unexpected argument {word!r}{hint}; see gpt2cli {command} --help")
        given.setdefault(name, []).append(value)
    required = [n for n, flag in fields.items() if flag.default is dataclasses.MISSING]
    missing = ", ".join(f"--{flags.spelled(n)}" for n in required if n not in given)
    if missing:
        raise UsageError(
            f"{command} needs {missing}. Usage: {usage_line(command)}; see gpt2cli {command} --help"
        )
    for name, values in given.items():
        if len(values) > 1 and fields[name].hint != tuple[str, ...]:
            raise UsageError(f"--{name} was given {len(values)} times: {', '.join(values)}")
    return given


_BOOLEANS = ("true", "false", "1", "0", "yes", "no")


def _read_flag(
    command: str, fields: dict[str, flags.Flag], word: str, words: list[str]
) -> tuple[str, str]:
    """Return a flag's field and its text, which may be the first of the remaining words."""
    flag, equals, value = word[2:].partition("=")
    name = flag.replace("-", "_")
    if f"{name}_" in fields:
        name += "_"
    negated = fields.get(name[2:]) if name[:2] == "no" and name not in fields else None
    if negated is not None and negated.hint is bool:
        name, equals, value = name[2:], "=", "false"
    if name not in fields:
        raise UsageError(
            f"{command} has no flag --{flag}{peers.for_flag(name, fields, '--')}; "
            f"see gpt2cli {command} --help"
        )
    if equals:
        return name, value
    alone = not words or words[0].startswith("--")
    if fields[name].hint is bool and (alone or words[0].lower() not in _BOOLEANS):
        return name, "true"
    if alone:
        raise UsageError(
            f"--{name} needs a value: {flags.describe_type(fields[name].hint)} "
            f"(write a value that begins with -- as --{name}=VALUE)"
        )
    return name, words.pop(0)


def _build(command: str, given: dict[str, list[str]]) -> Any:
    """Let Fire build the options from the given texts, each read as its field's type."""
    import fire  # takes a tenth of a second, which --help need not wait for

    cls = options_class(command)
    fields = flags.fields_of(cls)
    built = []

    def build(**settings: Any) -> None:
        built.append(cls(**settings))

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in given
    ]
    build.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    readers = {name: _reader(name, fields[name].hint) for name in given}
    fire.decorators.SetParseFns(**readers)(build)
    # A list of texts, so that no value is ever read by Fire's own rules, and no separator.
    words = [f"--{name}={json.dumps(values)}" for name, values in given.items()]
    fire.Fire(build, command=[*words, "--", "--separator=\0"], name=f"gpt2cli {command}")
    return built[0]


def _reader(name: str, hint: Any) -> Callable[[str], Any]:
    """Return the function with which Fire reads a flag: a JSON list of texts to a value."""

    def read(encoded: str) -> Any:
        texts = json.loads(encoded)
        if hint == tuple[str, ...]:
            return tuple(texts)
        try:
            return flags.parse_value(hint, texts[0])
        except ValueError:
            wanted = flags.describe_type(hint)
            raise UsageError(f"--{name} takes {wanted}, not {texts[0]!r}") from None

    return read


def _filled(text: str, indent: str) -> list[str]:
    """Wrap text at the terminal's width, or at 80 columns where there is no terminal."""
    width = max(shutil.get_terminal_size((80, 24)).columns, 40)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)


def general_help() -> str:
    """Return the text of `gpt2cli --help`."""
    lines = ["gpt2cli: GPT-2 on TensorFlow 2", "", "usage: gpt2cli COMMAND [FLAGS]", ""]
    for name in COMMANDS:
        first, *rest = _filled(flags.summary_of(options_class(name)), " " * 15)
        lines += [f"  {name:<13}{first.lstrip()}", *rest]
    lines += ["", "Run gpt2cli COMMAND --help to list a command's flags."]
    return "\n".join(lines)


def usage_line(command: str) -> str:
    """Return `gpt2cli convert SRC DST [FLAGS]`."""
    fields = flags.fields_of(options_class(command))
    places = [
        name.upper() if fields[name].default is dataclasses.MISSING else f"[{name.upper()}]"
        for name in COMMANDS[command]
    ]
    return " ".join(["gpt2cli", command, *places, "[FLAGS]"])


def command_help(command: str) -> str:
    """Return the text of `gpt2cli COMMAND --help`: its flags in sections, then examples."""
    cls = options_class(command)
    fields = flags.fields_of(cls)
    lines = [f"usage: {usage_line(command)}", ""]
    for paragraph in flags.description_of(cls).split("\n\n"):
        lines += [*_filled(paragraph, ""), ""]
    for title, names in flags.sections_of(cls).items():
        lines.append(f"{title}:")
        for name in names:
            hint, default, text = fields[name]
            kind = flags.describe_type(hint)
            lines.append(f"  --{flags.spelled(name)} {kind}{flags.describe_default(default)}")
            lines += _filled(text, " " * 6)
        lines.append("")
    environment = flags.section(cls, "Environment")
    if environment:
        lines.append("Environment variables:")
        for name, text in environment.items():
            lines += [f"  {name}", *_filled(text, " " * 6)]
        lines.append("")
    lines += ["Examples:", *(f"  {line}" for line in flags.examples_of(cls))]
    return "\n".join(lines)

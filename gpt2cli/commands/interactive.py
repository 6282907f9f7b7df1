"""gpt2cli interactive: type a prompt and watch its continuation."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2cli import flags, signals
from gpt2cli.console import say
from gpt2cli.errors import UsageError, UserError
from gpt2cli.options import GenerateOptions, GeneratorOptions, new_seed

if TYPE_CHECKING:
    from gpt2cli.inference.generator import LanguageModel

COMMANDS = ("/set", "/show", "/help", "/quit")  # any other line is a prompt, `/usr/bin` too
NO_EFFECT = {
    "batch_size": "one sample is generated at a time",
    "logprobs": "only sample --format jsonl prints log-probabilities",
}
HISTORY = Path("~/.gpt2cli_history")
HELP = '''\
Type a prompt and press Enter. Put a prompt of several lines between two lines of """.
  /set NAME VALUE   change a setting: /set temperature 0.7
  /set NAME         reset a setting to its default
  /show             show the settings
  /help             show this text
  /quit             leave, as Ctrl-D does; Ctrl-C only stops the current sample'''


@dataclass(frozen=True, kw_only=True)
class InteractiveOptions(GenerateOptions, GeneratorOptions):
    """Type a prompt and watch the model continue it; /set changes settings.

    Environment:
        XDG_CACHE_HOME: folder for converted programs (default: ~/.cache).

    Examples:
        gpt2cli interactive --run_name books
        gpt2cli interactive --model_name 124M --length 100 --top_k 40
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_source()
        if self.nsamples < 1:
            raise UsageError("--nsamples must be at least 1 here, got 0")


def run(options: InteractiveOptions) -> None:
    """Read prompts until the input ends, and continue each before the next is read."""
    from gpt2cli.storage import folders
    from gpt2cli.text import encoder

    folder = folders.open_source(options)
    vocabulary = encoder.of_model(folder)
    if vocabulary is None:
        raise UserError(f"{folder.path} has no vocabulary, so it cannot continue typed text")

    from gpt2cli.inference import devices, generator  # only when the checks have passed

    model = generator.load_for(options, folder, vocabulary)
    device = devices.describe(options.precision)
    say(f"{folder.checkpoint}: {device}", *HELP.split("\n"))
    if options.seed is None:
        options = dataclasses.replace(options, seed=new_seed())
        say(f"seed {options.seed}")
    for name, reason in NO_EFFECT.items():
        if getattr(options, name) != flags.fields_of(GenerateOptions)[name].default:
            say(f"--{name} has no effect here: {reason}")
    index, said = 0, set[str]()
    signals.keep_ctrl_c()
    with _line_editing():
        for text, is_line in _inputs():
            if is_line and text.split()[0] in COMMANDS:
                if text.split()[0] == "/quit":
                    return
                options = _obey(text, options)
                continue
            try:
                _report(model, text, options, said)
                for number, pieces in enumerate(_continuations(model, text, options, index)):
                    _show(text, pieces, options, number)
                    index += 1
            except KeyboardInterrupt:
                print(flush=True)
                say("stopped")
                index += 1
            except UserError as error:
                say(f"gpt2cli: {error}")


def _report(model: LanguageModel, prompt: str, options: InteractiveOptions, said: set[str]) -> None:
    """Print notes about a prompt (see inference/hints.py); give each piece of advice once."""
    from gpt2cli.inference import hints

    n_ctx, on_terminal = model.config.n_ctx, sys.stderr.isatty()
    found = hints.about([(prompt, None)], model.encoder, n_ctx, options, on_terminal)
    for kind, line in found.items():
        if kind not in said:
            say(line)
    said |= {"special", "space"} & set(found)


def _continuations(
    model: LanguageModel, prompt: str, options: InteractiveOptions, index: int
) -> Iterator[Iterator[str]]:
    """Yield the text of each sample in pieces: streamed, or with beams in one piece."""
    if options.beams > 1:
        without_prompt = dataclasses.replace(options, include_prefix=False)
        for sample in model.samples([prompt], without_prompt, index):
            yield iter([sample.text or ""])
        return
    for number in range(options.nsamples):
        stream = model.stream(prompt, options, index + number)
        yield (piece for piece in stream if isinstance(piece, str))  # last comes the Sample


def _show(prompt: str, pieces: Iterator[str], options: InteractiveOptions, number: int) -> None:
    """Print one continuation while it is generated."""
    if options.nsamples > 1:
        print(f"{'=' * 40} SAMPLE {number + 1} {'=' * 40}")
    if options.include_prefix:
        print(prompt, end="")
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _inputs() -> Iterator[tuple[str, bool]]:
    '''Yield each line with True, and each text between two lines of """ with False.'''
    block: list[str] | None = None
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        mark = ">>> " if block is None else "... "
        try:
            line = input(mark if is_terminal else "")
        except EOFError:
            if block:
                yield "\n".join(block), False
            return
        except KeyboardInterrupt:
            block = None
            say("", "(Ctrl-D or /quit leaves)")
            continue
        if line.strip() == '"""':
            if block:
                yield "\n".join(block), False
            block = [] if block is None else None
        elif block is not None:
            block.append(line)
        elif line.strip():
            yield line, True


def _obey(text: str, options: InteractiveOptions) -> InteractiveOptions:
    """Carry out a line that begins with /, and return the settings for the next prompts."""
    command, _, rest = text.partition(" ")
    fields = flags.fields_of(GenerateOptions)
    if command == "/set":
        return _set(rest.strip(), options)
    if command == "/show":
        values = {name: getattr(options, name) for name in fields}
        say(*(f"{n} = {'default' if v in (None, ()) else v}" for n, v in values.items()))
    else:
        say(*HELP.split("\n"))
    return options


def _set(words: str, options: InteractiveOptions) -> InteractiveOptions:
    """Return the settings with one changed by `NAME VALUE`, or reset by `NAME`."""
    fields = flags.fields_of(GenerateOptions)
    name, _, value = re.sub(r"[ =]+", " ", words, count=1).partition(" ")
    name = name.removeprefix("--").replace("-", "_")
    if name not in fields:
        say(f"unknown setting {name!r}; the settings are {', '.join(fields)}")
        return options
    if name in NO_EFFECT:
        say(f"{name} has no effect here: {NO_EFFECT[name]}")
        return options
    hint, default, _ = fields[name]
    try:
        parsed = flags.parse_value(hint, value.strip()) if value.strip() else default
        return dataclasses.replace(options, **{name: parsed})
    except UserError as error:
        say(str(error))
    except ValueError:
        say(f"--{name} takes {flags.describe_type(hint)}")
    return options


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """On a terminal, edit lines and keep their history, if Python was built with readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    path = HISTORY.expanduser()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

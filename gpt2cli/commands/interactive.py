"""gpt2cli interactive: type a prompt and watch its continuation."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2cli import encoder, flags, folders
from gpt2cli.config import GenerateSettings, InteractiveConfig, new_seed
from gpt2cli.errors import UserError

if TYPE_CHECKING:
    from gpt2cli.inference import Model

COMMANDS = ("/set", "/show", "/help", "/quit")  # any other line is a prompt, `/usr/bin` too
HISTORY = Path("~/.gpt2cli_history")
HELP = '''\
Type a prompt and press Enter. Put a prompt of several lines between two lines of """.
  /set NAME VALUE   change a setting: /set temperature 0.7
  /set NAME         reset a setting to its default
  /show             show the settings
  /help             show this text
  /quit             leave, as Ctrl-D does; Ctrl-C only stops the current sample'''


def run(config: InteractiveConfig) -> None:
    """Read prompts until the input ends, and continue each before the next is read."""
    prefix = folders.source_checkpoint(config)
    if not encoder.exists(prefix.parent):
        raise UserError(f"{prefix.parent} has no vocabulary, so it cannot continue typed text")

    from gpt2cli import engine, inference  # loads TensorFlow, so only when the checks have passed

    engine.keep_no_memory()
    model = inference.load_model(prefix, config.precision)
    _say(f"{prefix}: {engine.describe_devices(config.precision)}\n{HELP}")
    if config.seed is None:
        config = dataclasses.replace(config, seed=new_seed())
        _say(f"seed {config.seed}")
    index = 0
    with _line_editing():
        for text, is_line in _inputs():
            if is_line and text.split()[0] in COMMANDS:
                if text.split()[0] == "/quit":
                    return
                config = _obey(text, config)
                continue
            try:
                for number, pieces in enumerate(_continuations(model, text, config, index)):
                    _show(text, pieces, config, number)
                    index += 1
            except KeyboardInterrupt:
                print(flush=True)
                _say("stopped")
                index += 1
            except UserError as error:
                _say(f"gpt2cli: {error}")


def _continuations(
    model: "Model", prompt: str, config: InteractiveConfig, index: int
) -> Iterator[Iterator[str]]:
    """Yield the text of each sample in pieces: streamed, or with beams in one piece."""
    if config.beams > 1:
        without_prompt = dataclasses.replace(config, include_prefix=False)
        for sample in model.samples([prompt], without_prompt, index):
            yield iter([sample.text])
        return
    for number in range(config.nsamples):
        stream = model.stream(prompt, config, index + number)
        yield (piece for piece in stream if isinstance(piece, str))  # last comes the Sample


def _show(prompt: str, pieces: Iterator[str], config: InteractiveConfig, number: int) -> None:
    """Print one continuation while it is generated."""
    if config.nsamples > 1:
        print(f"{'=' * 40} SAMPLE {number + 1} {'=' * 40}")
    if config.include_prefix:
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
            _say("\n(Ctrl-D or /quit leaves)")
            continue
        if line.strip() == '"""':
            if block:
                yield "\n".join(block), False
            block = [] if block is None else None
        elif block is not None:
            block.append(line)
        elif line.strip():
            yield line, True


def _obey(text: str, config: InteractiveConfig) -> InteractiveConfig:
    """Carry out a line that begins with /, and return the settings for the next prompts."""
    command, _, rest = text.partition(" ")
    fields = flags.fields_of(GenerateSettings)
    if command == "/set":
        return _set(rest.strip(), config)
    if command == "/show":
        values = {name: getattr(config, name) for name in fields}
        _say("\n".join(f"{n} = {'default' if v in (None, ()) else v}" for n, v in values.items()))
    else:
        _say(HELP)
    return config


def _set(words: str, config: InteractiveConfig) -> InteractiveConfig:
    """Return the settings with one changed by `NAME VALUE`, or reset by `NAME`."""
    fields = flags.fields_of(GenerateSettings)
    name, _, value = re.sub(r"[ =]+", " ", words, count=1).partition(" ")
    name = name.removeprefix("--").replace("-", "_")
    if name not in fields:
        _say(f"unknown setting {name!r}; the settings are {', '.join(fields)}")
        return config
    hint, default, _ = fields[name]
    try:
        parsed = flags.parse_value(hint, value.strip()) if value.strip() else default
        return dataclasses.replace(config, **{name: parsed})
    except UserError as error:
        _say(str(error))
    except ValueError:
        _say(f"--{name} takes {flags.describe_type(hint)}")
    return config


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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

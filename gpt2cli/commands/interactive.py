"""gpt2cli interactive: type a prompt, watch it go on."""

import contextlib
import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from gpt2cli import flags
from gpt2cli.errors import UsageError, UserError
from gpt2cli.options import CheckpointOptions, GenerateOptions, new_seed
from gpt2cli.storage import folders
from gpt2cli.text import encoder


@dataclass(frozen=True, kw_only=True)
class InteractiveOptions(GenerateOptions, CheckpointOptions):
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


COMMANDS = ("/set", "/show", "/help", "/quit")  # any other line is a prompt, `/usr/bin` too
HISTORY = Path("~/.gpt2cli_history")
HELP = '''\
Type a prompt and press Enter. A prompt of several lines stands between two lines of """.
  /set NAME VALUE   change a setting for what follows: /set temperature 0.7
  /set NAME         back to its default
  /show             the settings
  /help             this text
  /quit             leave, as Ctrl-D does; Ctrl-C stops a sample that is being written'''


def run(config):
    """Read prompts until the input ends; each is continued before the next is read."""
    prefix = folders.source_checkpoint(config)
    if not encoder.exists(prefix.parent):
        raise UserError(f"{prefix.parent} has no vocabulary, so there is nothing to type")

    from gpt2cli import tensorflow as engine  # what can be refused was refused before this import
    from gpt2cli.inference import generator as inference

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


def _continuations(model, prompt, config, index):
    """Of each sample the pieces of its text, as they are generated; all at once with beams."""
    if config.beams > 1:
        without_prompt = dataclasses.replace(config, include_prefix=False)
        yield from ([sample.text] for sample in model.samples([prompt], without_prompt, index))
        return
    for number in range(config.nsamples):
        yield model.stream(prompt, config, index + number)


def _show(prompt, pieces, config, number):
    """Print one continuation as it is generated."""
    if config.nsamples > 1:
        print(f"{'=' * 40} SAMPLE {number + 1} {'=' * 40}")
    if config.include_prefix:
        print(prompt, end="")
    for piece in pieces:
        if isinstance(piece, str):
            print(piece, end="", flush=True)
    print(flush=True)


def _inputs():
    """(prompt, False) or (line, True) as they are typed; Ctrl-C forgets the line."""
    block = None
    while True:
        try:
            line = _read_line("... " if block is not None else ">>> ")
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


def _read_line(mark):
    """A line, with a mark before it and line editing on a terminal."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(mark)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _obey(text, config):
    """Carry out a line that begins with /; returns the settings to go on with."""
    command, _, rest = text.partition(" ")
    fields = flags.fields_of(GenerateOptions)
    if command == "/set":
        name, value = (*re.split(r"[ =]+", rest.strip(), maxsplit=1), "")[:2]
        name = name.removeprefix("--").replace("-", "_")
        if name not in fields:
            _say(f"no setting {name!r}; there are {', '.join(fields)}")
            return config
        try:
            hint, default, _ = fields[name]
            parsed = flags.parse_value(hint, value.strip()) if value.strip() else default
            return dataclasses.replace(config, **{name: parsed})
        except (UserError, ValueError) as error:
            wanted = flags.describe_type(fields[name][0])
            _say(str(error) if isinstance(error, UserError) else f"--{name} takes {wanted}")
    elif command == "/show":
        values = {name: getattr(config, name) for name in fields}
        unset = (None, ())
        _say("\n".join(f"{n} = {'default' if v in unset else v}" for n, v in values.items()))
    else:
        _say(HELP)
    return config


@contextlib.contextmanager
def _line_editing():
    """Line editing and a history that outlives the session, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = HISTORY.expanduser()
    if not sys.stdin.isatty():
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


def _say(text):
    print(text, file=sys.stderr, flush=True)

"""The command line: Fire turns flags into a command's dataclass, and only then does work begin.

Left to itself, Fire runs a function before it complains about a misspelt flag, reads
`--prompt "Hello, world"` as a tuple and takes `--flag=false` for true. So the flags are checked
here first, each is handed over as `--name=value`, and the function that Fire calls only builds the
dataclass.
"""

import dataclasses
import difflib
import importlib
import inspect
import json
import os
import signal
import sys
import textwrap

from gpt2cli import __version__, config, flags
from gpt2cli.errors import BusyError, UsageError, UserError

# Command -> its dataclass and the fields that may be given without their name, in order.
COMMANDS = {
    "download": (config.DownloadConfig, ("model",)),
    "encode": (config.EncodeConfig, ("in_text", "out_npz")),
    "train": (config.TrainConfig, ("dataset",)),
    "sample": (config.SampleConfig, ()),
    "interactive": (config.InteractiveConfig, ()),
    "serve": (config.ServeConfig, ()),
    "evaluate": (config.EvaluateConfig, ("dataset",)),
    "convert": (config.ConvertConfig, ("src", "dst")),
    "export": (config.ExportConfig, ("run_name", "dst")),
    "vocab": (config.VocabConfig, ("in_text", "out")),
    "init": (config.InitConfig, ("name",)),
    "doctor": (config.DoctorConfig, ()),
}

# of a UserError; 75 is EX_TEMPFAIL of sysexits.h: the same command may succeed later
STATUSES = {UsageError: 2, BusyError: 75, UserError: 1}


def main(argv=None):
    """Run one command line and leave with its exit status.

    0 done, 1 an error that the user can mend, 2 a wrong command line, 75 another process is at the
    same work, 130 Ctrl-C, 143 SIGTERM; any other exception is our bug and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    # Without a handler a container's first process ignores SIGTERM, which `docker stop` sends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _open_closed_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a text that cannot be shown must not end a run
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        settings = read_command_line(argv)
        if settings is not None:
            name = next(name for name, (cls, _) in COMMANDS.items() if type(settings) is cls)
            if settings.verbose:
                os.environ["GPT2CLI_VERBOSE"] = "1"
            importlib.import_module(f"gpt2cli.commands.{name}").run(settings)
        sys.stdout.flush()
    except UserError as error:
        print(f"gpt2cli: {error}", file=sys.stderr)
        sys.exit(next(status for kind, status in STATUSES.items() if isinstance(error, kind)))
    except KeyboardInterrupt:
        print("gpt2cli: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a file of the user's that no module expected to fail
        if error.errno is None:
            raise
        where = error.filename or "standard output"
        print(f"gpt2cli: {where}: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to flush would fail again
        sys.exit(1)
    except Exception as error:
        # TensorFlow's class by name: importing it here would cost every command two seconds
        if not isinstance(error, MemoryError) and type(error).__name__ != "ResourceExhaustedError":
            raise
        print(
            "gpt2cli: out of memory. Lower --batch_size; for train also --seq_length, or turn on "
            "--memory_saving_gradients, --optimizer adafactor, --precision bfloat16, "
            "--only_train_transformer_layers",
            file=sys.stderr,
        )
        sys.exit(1)


def _open_closed_streams():
    """Give the standard streams that the caller closed (`<&-`, cron) to the null device."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))


def read_command_line(argv):
    """The dataclass that a command line asks for, or None if it asked for help or the version.

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
            f"no command {command!r}{_nearest(command, COMMANDS)}. The commands are "
            f"{', '.join(COMMANDS)}; see gpt2cli --help"
        )
    if "--help" in argv or "-h" in argv:
        print(command_help(command))
        return None
    return _build(command, _given_values(command, argv[1:]))


def _given_values(command, words):
    """Words of a command line -> {field: [texts]}; every flag is checked before anything runs."""
    config_class, positional = COMMANDS[command]
    fields = flags.fields_of(config_class)
    given, places = {}, list(positional)
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            if not places or word == "--":
                raise UsageError(f"{word!r} is one word too many; see gpt2cli {command} --help")
            given.setdefault(places.pop(0), []).append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        name += "_" * (name + "_" in fields)
        if name not in fields and name[:2] == "no" and fields.get(name[2:], [None])[0] is bool:
            name, equals, value = name[2:], "=", "false"
        if name not in fields:
            raise UsageError(
                f"{command} has no flag --{flag}{_nearest(name, fields, '--')}; "
                f"see gpt2cli {command} --help"
            )
        if not equals:
            alone = not words or words[0].startswith("--")
            if fields[name][0] is bool and (alone or words[0].lower() not in _BOOLEANS):
                value = "true"
            elif alone:
                raise UsageError(
                    f"--{name} needs a value: {flags.describe_type(fields[name][0])} "
                    f"(one that begins with -- is written --{name}=VALUE)"
                )
            else:
                value = words.pop(0)
        if name in places:
            places.remove(name)
        given.setdefault(name, []).append(value)
    missing = [n for n, (_, d, _) in fields.items() if d is dataclasses.MISSING and n not in given]
    if missing:
        asked = ", ".join(f"--{flags.spelled(n)}" for n in missing)
        raise UsageError(f"{command} needs {asked}; see gpt2cli {command} --help")
    for name, values in given.items():
        if len(values) > 1 and fields[name][0] != tuple[str, ...]:
            raise UsageError(f"--{name} is given {len(values)} times: {', '.join(values)}")
    return given


_BOOLEANS = ("true", "false", "1", "0", "yes", "no")


def _build(command, given):
    """Let Fire call the dataclass with the given texts, each read as its field's type."""
    import fire  # a tenth of a second that --help need not wait for

    config_class, _ = COMMANDS[command]
    fields = flags.fields_of(config_class)
    built = []

    def build(**settings):
        built.append(config_class(**settings))

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in given
    ]
    build.__signature__ = inspect.Signature(parameters)
    readers = {name: _reader(name, fields[name][0]) for name in given}
    fire.decorators.SetParseFns(**readers)(build)
    # A list of texts, so that no value is ever read by Fire's own rules, and no separator.
    words = [f"--{name}={json.dumps(values)}" for name, values in given.items()]
    fire.Fire(build, command=[*words, "--", "--separator=\0"], name=f"gpt2cli {command}")
    return built[0]


def _reader(name, hint):
    """The function with which Fire reads a flag: JSON list of texts -> value, or a UsageError."""

    def read(texts):
        texts = json.loads(texts)
        if hint == tuple[str, ...]:
            return tuple(texts)
        try:
            return flags.parse_value(hint, texts[0])
        except ValueError:
            wanted = flags.describe_type(hint)
            raise UsageError(f"--{name} takes {wanted}, not {texts[0]!r}") from None

    return read


def _nearest(word, words, dashes=""):
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {dashes}{close[0]}?)" if close else ""


def general_help():
    """What `gpt2cli --help` prints."""
    lines = ["gpt2cli: GPT-2 on TensorFlow 2", "", "usage: gpt2cli COMMAND [FLAGS]", ""]
    for name, (config_class, _) in COMMANDS.items():
        summary = inspect.getdoc(config_class).splitlines()[0]
        lines.append(f"  {name:<12} {summary}")
    lines += ["", "gpt2cli COMMAND --help lists a command's flags; gpt2cli --version."]
    return "\n".join(lines)


def command_help(command):
    """What `gpt2cli COMMAND --help` prints: one paragraph a flag, from the dataclass."""
    config_class, positional = COMMANDS[command]
    fields = flags.fields_of(config_class)
    places = " ".join(
        n.upper() if fields[n][1] is dataclasses.MISSING else f"[{n.upper()}]" for n in positional
    )
    lines = [f"usage: gpt2cli {command} {places}".rstrip() + " [FLAGS]", ""]
    lines += [inspect.getdoc(config_class).partition("\n\nArgs:")[0], ""]
    for name, (hint, default, text) in fields.items():
        lines.append(
            f"  --{flags.spelled(name)} {flags.describe_type(hint)}{describe_default(default)}"
        )
        lines += textwrap.wrap(text, 92, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def describe_default(default):
    """` (default: 40)`, or nothing where a field has no default to speak of."""
    if default is dataclasses.MISSING:
        return " (required)"
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        default = str(default).lower()
    return f" (default: {default})"

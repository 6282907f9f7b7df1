"""gpt2cli: GPT-2 on TensorFlow 2, from the command line and from Python.

    model = gpt2cli.load_model("models/tiny")
    model.generate("The import statement", length=40)

`download`, `encode`, `train`, `sample`, `convert`, `vocab` and `init` do what the commands of the
same names do, with the same settings. TensorFlow is imported when a model is first loaded, not
before.
"""

import importlib

__version__ = "0.1.0"


def load_model(path, precision="auto"):
    """The `inference.LanguageModel` of a model folder, a run folder, or a checkpoint's prefix path.

    Args:
        path: the folder or prefix; a folder without a vocabulary loads, for ids only.
        precision: "float32", or "auto", which is the same on the fastest path; "bfloat16"; "int8".

    Raises:
        UserError: says what is wrong, where, and what to do.
    """
    from gpt2cli.inference import generator as inference

    return inference.load_model(path, precision)


def load_encoder(folder):
    """The vocabulary of a model or run folder: `encode(text)` to ids and `decode(ids)` to text."""
    from gpt2cli.text import encoder

    return encoder.load(folder)


def _run(command, settings):
    """Run a command with the fields of its dataclass in `config`; UsageError for wrong ones."""
    from gpt2cli.cli import COMMANDS
    from gpt2cli.errors import UsageError

    config_class, _ = COMMANDS[command]
    try:
        config = config_class(**settings)
    except TypeError as error:
        raise UsageError(str(error).removeprefix(f"{config_class.__name__}.__init__() ")) from None
    return importlib.import_module(f"gpt2cli.commands.{command}").run(config)


def download(**settings):
    """Fetch a model as `gpt2cli download` does; the settings are those of `DownloadOptions`."""
    return _run("download", settings)


def encode(**settings):
    """Text to token ids as `gpt2cli encode` does it; the settings are those of `EncodeOptions`."""
    return _run("encode", settings)


def train(**settings):
    """Train as `gpt2cli train` does; the settings are those of `TrainOptions`.

    Returns:
        The run folder (a Path), which `load_model` takes.
    """
    return _run("train", settings)


def sample(**settings):
    """Print or write samples as `gpt2cli sample` does; the settings are those of `SampleOptions`.

    `load_model(...).generate(...)` gives them back instead.
    """
    return _run("sample", settings)


def convert(**settings):
    """Convert a model as `gpt2cli convert` does; the settings are those of `ConvertOptions`."""
    return _run("convert", settings)


def export(**settings):
    """Write a run's weights as `gpt2cli export` does; the settings are those of `ExportOptions`."""
    return _run("export", settings)


def vocab(**settings):
    """Train a vocabulary as `gpt2cli vocab` does; the settings are those of `VocabOptions`."""
    return _run("vocab", settings)


def init(**settings):
    """Make a new model as `gpt2cli init` does; the settings are those of `InitOptions`."""
    return _run("init", settings)

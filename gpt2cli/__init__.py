"""gpt2cli: GPT-2 on TensorFlow 2, from the command line and from Python.

    model = gpt2cli.load_model("models/tiny")
    model.generate("The import statement", length=40)

TensorFlow is imported when a model is first loaded, not before.
"""

__version__ = "0.1.0"


def load_model(path, precision="float32"):
    """The `inference.Model` of a model folder, a run folder, or a checkpoint's prefix path.

    Args:
        path: the folder or prefix; a folder without a vocabulary loads, for ids only.
        precision: "float32" or "bfloat16".

    Raises:
        UserError: says what is wrong, where, and what to do.
    """
    from gpt2cli import inference

    return inference.load_model(path, precision)


def load_encoder(folder):
    """The vocabulary of a model or run folder: `encode(text)` to ids and `decode(ids)` to text."""
    from gpt2cli import encoder

    return encoder.load(folder)


def train(**settings):
    """Fine-tune as `gpt2cli train` does; the settings are the fields of `config.TrainConfig`.

    Returns:
        The run folder (a Path), which `load_model` takes.
    """
    from gpt2cli.commands import train
    from gpt2cli.config import TrainConfig
    from gpt2cli.errors import UsageError

    try:
        config = TrainConfig(**settings)
    except TypeError as error:
        raise UsageError(str(error).removeprefix("TrainConfig.__init__() ")) from None
    return train.run(config)

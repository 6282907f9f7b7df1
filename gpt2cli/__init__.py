"""gpt2cli: GPT-2 on TensorFlow 2, from the command line and from Python.

    model = gpt2cli.load_model("models/tiny")
    model.generate("The import statement", length=40)

`download`, `encode`, `train`, `sample`, `evaluate`, `convert`, `export`, `vocab` and `init` do what
the commands of the same names do, with the same settings as keyword arguments. TensorFlow is
imported only to train, convert or create a model, or to use a GPU.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2cli.errors import BusyError, UsageError, UserError, names_without_dashes

if TYPE_CHECKING:
    from gpt2cli.inference.generator import LanguageModel
    from gpt2cli.text.encoder import Encoder

__version__ = "0.1.0"

FUNCTIONS = [
    "convert",
    "download",
    "encode",
    "evaluate",
    "export",
    "init",
    "sample",
    "train",
    "vocab",
]

__all__ = [*FUNCTIONS, "BusyError", "UsageError", "UserError", "load_encoder", "load_model"]
__all__ += ["__version__"]


def load_model(path: str | Path, precision: str = "auto") -> "LanguageModel":
    """Load a model folder, a run folder, or a checkpoint's path without its extension.

    Args:
        path: the folder or path; a folder without a vocabulary loads, for ids only.
        precision: "float32", or "auto", which is the same; "bfloat16"; "int8".

    Raises:
        UserError: the text says what is wrong, where, and what to do.
    """
    from gpt2cli.inference import generator

    with names_without_dashes():
        return generator.load_model(path, precision)


def load_encoder(folder: str | Path) -> "Encoder":
    """Load the vocabulary of a model or run folder: `encode(text)` to ids, `decode(ids)` to text.

    Raises:
        UserError: files are missing or damaged.
    """
    from gpt2cli.text import encoder

    with names_without_dashes():
        return encoder.load(folder)


def __getattr__(name: str) -> Any:
    """Make a command's function when it is first used; the stub __init__.pyi lists them all."""
    if name in FUNCTIONS:
        from gpt2cli import python

        globals()[name] = python.function(name)
        return globals()[name]
    if name == "encoder":  # where it was before the package had folders
        return importlib.import_module("gpt2cli.text.encoder")
    raise AttributeError(f"module 'gpt2cli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

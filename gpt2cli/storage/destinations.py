"""Folders that a model or a run is written to, checked before any work."""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gpt2cli import files, paths
from gpt2cli.errors import UserError
from gpt2cli.storage import runs
from gpt2cli.storage.folders import CONFIGS

# Names that every version of TensorFlow reads; any other name is tried.
ORDINARY = re.compile(r"[\w. +=,@-]{1,200}", re.A)


def check_path(folder: str | Path, prefix: str = "model") -> None:
    """Reject (UserError) a folder for whose name `can_be_read` is false."""
    if not can_be_read(folder, prefix):
        name = str(Path(folder)).encode("utf-8", "backslashreplace").decode()
        raise UserError(
            f"TensorFlow cannot read a checkpoint in {name}: some characters of this path are a "
            "pattern for it, or are not UTF-8. Use another name"
        )


def check_destination(dst: str | Path, overwrite: bool, *sources: Path) -> Path:
    """Reject a folder that a new model must not be written to.

    Returns:
        The folder to write, which a link may lead to.

    Raises:
        UserError: `dst` exists and may not be replaced, is not a model folder, or is or contains
            one of the sources; or TensorFlow could not read it.
    """
    target = paths.check_folder(dst, "dst")
    check_path(target)
    for source in sources:
        if target.resolve() in (source.resolve(), *source.resolve().parents):
            raise UserError(f"{dst} is or contains the source, {source}. Name another folder")
    paths.check_access(target.parent, dst, "dst")
    if not target.exists():
        return target
    if not overwrite:
        raise UserError(f"{dst} exists. Name another folder, or replace it with --overwrite")
    if not _is_model_or_empty(target) or runs.steps(target):
        raise UserError(f"{dst} is not a model folder, so it is not replaced. Name another folder")
    return target


def _is_model_or_empty(folder: Path) -> bool:
    """Return whether a folder is empty, or contains our, GPT2_ML's or Hugging Face's sizes."""
    if not os.listdir(folder) or (folder / CONFIGS[0]).is_file():
        return True
    for name in CONFIGS[1:]:
        with contextlib.suppress(UserError):
            values = files.read_object(folder / name)
            if "num_hidden_layers" in values or values.get("model_type") == "gpt2":
                return True
    return False


def can_be_read(folder: str | Path, prefix: str = "model") -> bool:
    """Return whether TensorFlow can read a checkpoint from a folder of this name.

    Unless all names in the path are ordinary ones, this is tried, in a temporary folder.

    Args:
        folder: it need not exist.
        prefix: name of the checkpoint.
    """
    path = Path(folder, prefix)
    names = [name for name in path.parts if name not in (path.anchor, os.pardir)]
    return all(ORDINARY.fullmatch(name) for name in names) or can_read_back(names)


def can_read_back(names: Iterable[str]) -> bool:
    """Return whether TensorFlow reads a checkpoint whose path consists of these names, by trying.

    TensorFlow takes a path for a pattern. Which characters are special differs between versions.

    Raises:
        UserError: the disk of temporary files is full.
    """
    from gpt2cli.tensorflow import tf  # slow to import, and rarely needed here

    with tempfile.TemporaryDirectory() as empty:
        prefix = os.path.join(empty, *names)
        os.makedirs(os.path.dirname(prefix))
        try:
            tf.raw_ops.SaveV2(
                prefix=prefix, tensor_names=["x"], shape_and_slices=[""], tensors=[tf.constant(1.0)]
            )
            return bool(tf.train.load_checkpoint(prefix).get_tensor("x") == 1)
        except tf.errors.ResourceExhaustedError as error:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise files.cannot_write(prefix, full) from error
        except (tf.errors.OpError, ValueError, RuntimeError, LookupError):
            return False

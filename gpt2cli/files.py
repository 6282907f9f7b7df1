"""Where things lie, and how a file is replaced so that nobody ever sees half of it."""

import contextlib
import os
import secrets
from pathlib import Path

from gpt2cli.config import ALIASES, check_name
from gpt2cli.errors import UserError

DEFAULT_MODEL = "124M"

# Everything of a model folder but the weights; a run folder gets copies of those that exist.
ENCODER_FILES = ("encoder.json", "vocab.bpe", "vocab.json", "merges.txt", "vocab.txt")


@contextlib.contextmanager
def replacing(path, mode="wb", **open_options):
    """Open `path` for writing so that a reader sees the old file or the whole new one.

    It is written beside `path` and renamed when the block ends; if that raises, the old stays.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, **open_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def cannot_write(path, error):
    """The UserError for an OSError that came from writing `path`."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}. "
        "Free space or choose a folder that you may write to; what was there before is unchanged"
    )


def read_bytes(path):
    """The bytes of a file; UserError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def read_text(path):
    """The text of a UTF-8 file; UserError where it cannot be read or is something else."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} ({error.reason})") from None


def names_in(folder):
    """The names of the model or run folders in `folder`, sorted."""
    with contextlib.suppress(OSError):
        return sorted(p.name for p in Path(folder).iterdir() if (p / "hparams.json").is_file())
    return []


def model_dir(models_dir, name=None):
    """The folder of a model, which must exist; 117M also finds 124M, 345M 355M, and vice versa."""
    name = name or DEFAULT_MODEL
    check_name("model_name", name)
    older = {new: old for old, new in ALIASES.items()}
    for candidate in (name, ALIASES.get(name), older.get(name)):
        if candidate and (Path(models_dir) / candidate).is_dir():
            return Path(models_dir) / candidate
    found = ", ".join(names_in(models_dir)) or "none"
    hint = f"Get it with: gpt2cli download {name}" if name[:1].isdigit() else "Check the spelling"
    raise UserError(
        f"no model {name!r} in {Path(models_dir).absolute()} (found: {found}). {hint}, "
        "or name another folder with --models_dir"
    )


def run_dir(checkpoint_dir, run_name, must_exist=True):
    """The folder of a run; with `must_exist`, UserError names the runs that do exist."""
    check_name("run_name", run_name)
    folder = Path(checkpoint_dir) / run_name
    if must_exist and not folder.is_dir():
        found = ", ".join(names_in(checkpoint_dir)) or "none"
        raise UserError(
            f"no run {run_name!r} in {Path(checkpoint_dir).absolute()} (found: {found}). "
            f"Start it with: gpt2cli train --dataset FILE --run_name {run_name}"
        )
    return folder


def source_dir(config):
    """The model or run folder that a command's --run_name or --model_name means."""
    if config.run_name is not None:
        return run_dir(config.checkpoint_dir, config.run_name)
    return model_dir(config.models_dir, config.model_name)

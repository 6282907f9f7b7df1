"""Where things lie, and how a file is replaced so that nobody ever sees half of it."""

import contextlib
import glob
import json
import os
import re
import secrets
from pathlib import Path

from gpt2cli.config import ALIASES, ModelConfig, check_name
from gpt2cli.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder go unnoticed there
    fcntl = None

DEFAULT_MODEL = "124M"

SHARD = ".data-00000-of-00001"  # the data file of a checkpoint; we write one

# Everything of a model folder but the weights; a run folder gets copies of those that exist.
ENCODER_FILES = (
    *("encoder.json", "vocab.bpe", "vocab.json", "merges.txt"),
    *("vocab.txt", "tokenizer_config.json"),
)


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
    except BrokenPipeError:  # not of this file
        raise
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


def read_object(path):
    """The object in a JSON file; UserError where it cannot be read or is something else."""
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}). Copy or fetch it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object. Copy or fetch it again")
    return values


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


CONFIGS = ("hparams.json", "config.json", "mega.json", "large.json", "base.json")


def config_path(folder):
    """The file with a model's sizes, or None: hparams.json, else GPT2_ML's json."""
    for path in (Path(folder) / name for name in CONFIGS):
        if path.is_file() and (path.name == CONFIGS[0] or b"num_hidden_layers" in read_bytes(path)):
            return path
    return None


def read_config(folder):
    """The ModelConfig of a model folder; GPT2_ML's json stands in for a missing hparams.json."""
    path = config_path(folder)
    if path is None:
        raise UserError(
            f"no hparams.json in {Path(folder).absolute()}: not a model folder. "
            "Fetch one with: gpt2cli download 124M, or make one with: gpt2cli convert"
        )
    return ModelConfig.from_json(read_text(path), where=str(path))


def find_checkpoint(path):
    """The prefix of the checkpoint that `path` means.

    Args:
        path: a model or run folder, a prefix such as `models/124M/model.ckpt`, or its .index file.

    Raises:
        UserError: there is none, or one of its files is missing.
    """
    path = Path(path)
    if path.is_dir():
        prefix = _newest(path)
    else:
        prefix = path.with_name(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name))
    index = Path(f"{prefix}.index")
    if not index.is_file():
        raise UserError(
            f"no checkpoint at {prefix.absolute()}: {index.name} is missing. "
            "Name a model folder, a run folder or a checkpoint's path without its ending; "
            "a released model comes with: gpt2cli download 124M"
        )
    if not list(prefix.parent.glob(f"{glob.escape(prefix.name)}.data-*-of-*")):
        raise UserError(f"{index} has no {prefix.name}{SHARD} beside it: copy or download it again")
    return prefix


def _newest(folder):
    """The prefix that `checkpoint` names, or model.ckpt, the highest step, the only one."""
    state = folder / "checkpoint"
    if state.is_file():
        named = re.search(r'^model_checkpoint_path: *"(.*)"', read_text(state), re.M)
        if named:  # another machine's absolute path, or ours: only the name counts
            prefix = folder / Path(named[1]).name
            if Path(f"{prefix}.index").is_file():
                return prefix
    steps = saved_steps(folder)
    if steps and not (folder / "model.ckpt.index").is_file():
        return folder / f"model-{steps[-1]}"
    found = sorted(folder.glob("*.index"))
    if len(found) == 1:  # GPT2_ML's releases: model.ckpt-220000 and no `checkpoint` file
        return found[0].with_suffix("")
    return folder / "model.ckpt"


_STEP = re.compile(r"model-(\d+)\.index")


def saved_steps(folder):
    """The steps of a run's checkpoints, oldest first."""
    return sorted(
        int(m[1]) for p in Path(folder).glob("model-*.index") if (m := _STEP.fullmatch(p.name))
    )


@contextlib.contextmanager
def locked(folder, what):
    """Let one process at a time fill a folder, which goes again if nothing came into it.

    Args:
        what: the work, for the message: "download", "train".

    Raises:
        UserError: another process is at it, or the folder cannot be made.
    """
    lock = Path(folder) / ".lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")
    except OSError as error:
        raise cannot_write(lock, error) from error
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another {what} is filling {folder}. Wait until it ends, or choose another folder"
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(folder) == [lock.name]:
                    lock.unlink()
                    lock.parent.rmdir()


def copy_description(source, folder, config=None):
    """Make `folder` a model folder of the sizes and vocabulary of `source`, and of no other.

    Args:
        config: the ModelConfig to write; by default that of `source`.
    """
    source, folder = Path(source), Path(folder)
    with replacing(folder / "hparams.json") as file:
        file.write((config or read_config(source)).to_json().encode())
    copy_vocabulary(source, folder)


def copy_vocabulary(source, folder):
    """Give `folder` the vocabulary files of `source`, and no other."""
    for name in ENCODER_FILES:
        if (source / name).is_file():
            with replacing(folder / name) as file:
                file.write((source / name).read_bytes())
        else:
            (folder / name).unlink(missing_ok=True)

"""Model folders and run folders: where they lie, what is in them, if it is what was written."""

import contextlib
import glob
import os
import re
from pathlib import Path

from gpt2cli.errors import UserError
from gpt2cli.files import digest, read_bytes, read_text, replacing
from gpt2cli.model.sizes import ALIASES, ModelConfig
from gpt2cli.options import check_name
from gpt2cli.storage import runs

DEFAULT_MODEL = "124M"

SUMS = "SHA256SUMS"

# Everything of a model folder but the weights; a run folder gets copies of those that exist.
ENCODER_FILES = (
    *("encoder.json", "vocab.bpe", "vocab.json", "merges.txt"),
    *("vocab.txt", "tokenizer_config.json"),
)


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


def source_checkpoint(config):
    """The prefix of the checkpoint that they mean with --checkpoint; see `find_checkpoint`."""
    folder, name = source_dir(config), config.checkpoint
    if name is None:
        return find_checkpoint(folder)
    name = f"model-{name}" if re.fullmatch(r"\d+", name, re.ASCII) else name
    if not (folder / f"{name}.index").is_file():
        there = {path.stem for path in folder.glob("*.index")}
        found = ", ".join(sorted(n for n in there if not n.startswith("optimizer-"))) or "none"
        raise UserError(f"{folder} has no checkpoint {name} (found: {found})")
    return find_checkpoint(folder / f"{name}.index")


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


def find_checkpoint(path, to_train=False):
    """The prefix of the checkpoint that `path` means.

    Of a run that is the newest whole one. What was recorded of the files when they were written is
    compared: SHA256SUMS for all but the weights, which TensorFlow checks while it reads them, and
    for a run's checkpoint its state.

    Args:
        path: a model or run folder, a prefix such as `models/124M/model.ckpt`, or its .index file.
        to_train: the optimizer's state has to be whole as well.

    Raises:
        UserError: there is none, or one of its files is missing or not as it was written.
    """
    path = Path(path)
    if path.is_dir():
        prefix = _newest(path, to_train)
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
        raise UserError(
            f"{index} has no {prefix.name}{runs.SHARD} beside it: copy or download it again"
        )
    named = re.fullmatch(r"model-(\d+)", prefix.name)
    if named and (wrong := runs.fault(prefix.parent, int(named[1]), to_train)):
        raise UserError(f"{wrong}. Use another checkpoint of the run")
    check_sums(prefix.parent)
    return prefix


def _newest(folder, to_train):
    """The prefix of a run's newest checkpoint, or what `checkpoint` names, or the only one."""
    if runs.states(folder):
        return folder / f"model-{runs.newest(folder, to_train)}"
    named = runs.named(folder)
    if named and Path(f"{folder / named}.index").is_file():
        return folder / named
    if runs.steps(folder) and not (folder / "model.ckpt.index").is_file():
        return folder / f"model-{runs.newest(folder, to_train)}"
    found = sorted(folder.glob("*.index"))
    if len(found) == 1:  # GPT2_ML's releases: model.ckpt-220000 and no `checkpoint` file
        return found[0].with_suffix("")
    return folder / "model.ckpt"


def write_sums(folder):
    """Record in SHA256SUMS what a folder's files are, but not the weights.

    As sha256sum writes them, so that `sha256sum --check SHA256SUMS` compares them too.
    """
    found = [name for name in (*CONFIGS, *ENCODER_FILES) if (folder / name).is_file()]
    with replacing(folder / SUMS, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{digest(folder / name)}  {name}\n" for name in found)


def check_sums(folder):
    """UserError where a file is not the one that SHA256SUMS records; without it all is well."""
    path = folder / SUMS
    if not path.is_file():
        return
    for line in read_text(path).splitlines():
        recorded, _, name = line.partition("  ")
        if not os.path.isfile(folder / Path(name).name):  # False for what no file may be named
            continue  # what is needed is missed by who needs it
        if digest(folder / Path(name).name) != recorded:
            raise UserError(
                f"{folder / name} is not the file that was written: it is damaged, or it was "
                f"changed on purpose, then remove its line from {path}. Else get it anew"
            )


def copy_description(source, folder, config=None):
    """Make `folder` a model folder of the sizes and vocabulary of `source`, and of no other.

    Args:
        config: the ModelConfig to write; by default that of `source`.
    """
    source, folder = Path(source), Path(folder)
    text = (config or read_config(source)).to_json()
    (folder / SUMS).unlink(missing_ok=True)  # those of another model are not to be compared
    copy_vocabulary(source, folder)
    with replacing(folder / "hparams.json") as file:  # last: it makes the folder a model's
        file.write(text.encode())
    write_sums(folder)


def copy_vocabulary(source, folder):
    """Give `folder` the vocabulary files of `source`, and no other."""
    for name in ENCODER_FILES:
        if (source / name).is_file():
            with replacing(folder / name) as file:
                file.write((source / name).read_bytes())
        else:
            (folder / name).unlink(missing_ok=True)

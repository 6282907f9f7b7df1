"""Model folders and run folders: where they are, what is in them, whether it is undamaged."""

import contextlib
import glob
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpt2cli.errors import UserError
from gpt2cli.files import digest, read_bytes, read_text, replacing
from gpt2cli.model.sizes import ALIASES, ModelConfig
from gpt2cli.options import CheckpointOptions, SourceOptions, check_name
from gpt2cli.storage import runs

DEFAULT_MODEL = "124M"

SUMS = "SHA256SUMS"

# Files with a model's sizes; those after hparams.json are GPT2_ML's.
CONFIGS = ("hparams.json", "config.json", "mega.json", "large.json", "base.json")

# Everything of a model folder but the weights; a run folder gets copies of those that exist.
ENCODER_FILES = (
    *("encoder.json", "vocab.bpe", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "tokenizer.model", "spm.model", "chat_template.jinja"),
)


@dataclass(frozen=True)
class ModelFolder:
    """A model or run folder that was opened once, to be handed on instead of its path.

    Attributes:
        path: the folder.
        sizes: the model's sizes; None for a folder with a vocabulary alone.
        sizes_path: the file that gave the sizes.
        checkpoint: prefix of the checkpoint to read; None where the weights are not needed.
        sums: file name -> SHA-256, as SHA256SUMS records it; empty without one.
    """

    path: Path
    sizes: ModelConfig | None = None
    sizes_path: Path | None = None
    checkpoint: Path | None = None
    sums: Mapping[str, str] = field(default_factory=dict)

    def place(self, name: str) -> Path:
        """Return the path of a file."""
        return self.path / name

    def has(self, name: str) -> bool:
        """Return whether the folder contains a file."""
        return self.place(name).is_file()

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            UserError: the file cannot be read, or is not the one that SHA256SUMS records.
        """
        content = read_bytes(self.place(name))
        recorded = self.sums.get(name)
        if recorded is not None and recorded != hashlib.sha256(content).hexdigest():
            raise UserError(
                f"{self.path / name} differs from its checksum. If it is damaged, fetch or copy "
                f"it again; if you changed it, remove its line from {self.path / SUMS}"
            )
        return content

    def known_sizes(self) -> ModelConfig:
        """Return the sizes; UserError where the folder has none."""
        if self.sizes is None:
            raise UserError(
                f"no hparams.json in {self.path.absolute()}: not a model folder. "
                "Fetch one with: gpt2cli download 124M, or make one with: gpt2cli convert"
            )
        return self.sizes


def open_folder(path: str | Path) -> ModelFolder:
    """Open a folder: read its checksums and, where it has them, its sizes.

    Raises:
        UserError: one of these files is damaged.
    """
    path = Path(path)
    folder = ModelFolder(path, sums=_read_sums(path))
    for name in CONFIGS:
        if folder.has(name):
            content = folder.read(name)
            if name == CONFIGS[0] or b"num_hidden_layers" in content:
                where = path / name
                sizes = ModelConfig.from_json(content, where=str(where))
                return replace(folder, sizes=sizes, sizes_path=where)
    return folder


def read_config(path: str | Path) -> ModelConfig:
    """Return the sizes of a model folder; UserError where it has none."""
    return open_folder(path).known_sizes()


def open_model(path: str | Path, to_train: bool = False) -> ModelFolder:
    """Open the model that `path` means, with its checkpoint; see `find_checkpoint`.

    Raises:
        UserError: no checkpoint, no sizes, or a damaged file.
    """
    prefix = find_checkpoint(path, to_train)
    folder = replace(open_folder(prefix.parent), checkpoint=prefix)
    folder.known_sizes()
    return folder


def names_in(folder: str | Path) -> list[str]:
    """Return the names of the model or run folders in `folder`, sorted."""
    with contextlib.suppress(OSError):
        return sorted(p.name for p in Path(folder).iterdir() if (p / "hparams.json").is_file())
    return []


def model_dir(models_dir: str | Path, name: str | None = None) -> Path:
    """Return a model's folder; 117M also finds 124M, 345M also 355M, and vice versa.

    Raises:
        UserError: there is no such model; the text names those that exist.
    """
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


def run_dir(checkpoint_dir: str | Path, run_name: str, must_exist: bool = True) -> Path:
    """Return a run's folder; with `must_exist`, UserError names the runs that exist."""
    check_name("run_name", run_name)
    folder = Path(checkpoint_dir) / run_name
    if must_exist and not folder.is_dir():
        found = ", ".join(names_in(checkpoint_dir)) or "none"
        raise UserError(
            f"no run {run_name!r} in {Path(checkpoint_dir).absolute()} (found: {found}). "
            f"Start it with: gpt2cli train --dataset FILE --run_name {run_name}"
        )
    return folder


def source_dir(options: SourceOptions) -> Path:
    """Return the folder that --run_name or --model_name means."""
    if options.run_name is not None:
        return run_dir(options.checkpoint_dir, options.run_name)
    return model_dir(options.models_dir, options.model_name)


def open_source(options: CheckpointOptions) -> ModelFolder:
    """Open the model and checkpoint that --run_name, --model_name and --checkpoint mean."""
    folder, name = source_dir(options), options.checkpoint
    if name is None:
        return open_model(folder)
    name = f"model-{name}" if re.fullmatch(r"\d+", name, re.ASCII) else name
    if not (folder / f"{name}.index").is_file():
        there = {path.stem for path in folder.glob("*.index")}
        found = ", ".join(sorted(n for n in there if not n.startswith("optimizer-"))) or "none"
        raise UserError(f"{folder} has no checkpoint {name} (found: {found})")
    return open_model(folder / f"{name}.index")


def find_checkpoint(path: str | Path, to_train: bool = False) -> Path:
    """Return the prefix of the checkpoint that `path` means: the newest undamaged one of a run.

    A run's checkpoint is compared with the checksums in its state. All weights are compared with
    their own checksums when they are read.

    Args:
        path: a model or run folder, a prefix such as `models/124M/model.ckpt`, or its .index file.
        to_train: the optimizer's state must be undamaged as well.

    Raises:
        UserError: there is none, or one of its files is missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        prefix = _newest(path, to_train)
    else:
        prefix = path.with_name(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name))
    index = Path(f"{prefix}.index")
    if not index.is_file():
        _reject_other_format(path)
        raise UserError(
            f"no checkpoint at {prefix.absolute()}: {index.name} is missing. "
            "Name a model folder, a run folder, or a checkpoint's path without its extension; "
            "get a released model with: gpt2cli download 124M"
        )
    if not list(prefix.parent.glob(f"{glob.escape(prefix.name)}.data-*-of-*")):
        raise UserError(
            f"{index} has no {prefix.name}{runs.SHARD} beside it: copy or download it again"
        )
    named = re.fullmatch(r"model-(\d+)", prefix.name, re.ASCII)
    if named and (wrong := runs.fault(prefix.parent, int(named[1]), to_train)):
        raise UserError(f"{wrong}. Use another checkpoint of the run")
    return prefix


def _reject_other_format(folder: Path) -> None:
    """Reject a folder with another program's weights; the message says how to convert them.

    Raises:
        UserError: the folder has an adapter, or weights in another format.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a model but an adapter (adapter_config.json). Merge it into the "
            f"folder of its base: gpt2cli convert {folder} NEW_FOLDER --base FOLDER"
        )
    endings = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    weights = next((path.name for path in found if path.suffix in endings), None)
    if weights is not None:
        raise UserError(
            f"{folder} has its weights in another format ({weights}). Convert it first: gpt2cli "
            f"convert {folder} NEW_FOLDER"
        )


def _newest(folder: Path, to_train: bool) -> Path:
    """Return a run's newest checkpoint, or the one that `checkpoint` names, or the only one."""
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


def write_sums(folder: Path) -> None:
    """Record the checksums of a folder's files, weights excepted, in SHA256SUMS.

    The format is that of sha256sum, so `sha256sum --check SHA256SUMS` compares them too.
    """
    found = [name for name in (*CONFIGS, *ENCODER_FILES) if (folder / name).is_file()]
    with replacing(folder / SUMS, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{digest(folder / name)}  {name}\n" for name in found)


def _read_sums(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of SHA256SUMS; empty where there is none."""
    path = folder / SUMS
    lines = read_text(path).splitlines() if path.is_file() else []
    pairs = (line.partition("  ") for line in lines)
    return {name: recorded for recorded, _, name in pairs}


def copy_description(
    source: str | Path | ModelFolder, folder: Path, sizes: ModelConfig | None = None
) -> None:
    """Give `folder` the sizes and the vocabulary of `source`, in place of its own.

    Args:
        sizes: the ModelConfig to write; by default that of `source`.
    """
    opened = source if isinstance(source, ModelFolder) else open_folder(source)
    write_description(folder, sizes or opened.known_sizes(), vocabulary_of(opened))


def write_description(folder: Path, sizes: ModelConfig, vocabulary: Mapping[str, bytes]) -> None:
    """Give `folder` these sizes and this vocabulary, in place of its own."""
    (folder / SUMS).unlink(missing_ok=True)  # another model's checksums must not be compared
    _write_vocabulary(folder, vocabulary)
    with replacing(folder / "hparams.json") as file:  # last: it makes the folder a model's
        file.write(sizes.to_json().encode())
    write_sums(folder)


def copy_vocabulary(source: str | Path | ModelFolder, folder: Path) -> None:
    """Give `folder` the vocabulary files of `source`, in place of its own."""
    opened = source if isinstance(source, ModelFolder) else open_folder(source)
    _write_vocabulary(folder, vocabulary_of(opened))


def vocabulary_of(folder: ModelFolder) -> dict[str, bytes]:
    """Return the content of a folder's vocabulary files by name."""
    return {name: folder.read(name) for name in ENCODER_FILES if folder.has(name)}


def _write_vocabulary(folder: Path, vocabulary: Mapping[str, bytes]) -> None:
    for name in ENCODER_FILES:
        if name in vocabulary:
            with replacing(folder / name) as file:
                file.write(vocabulary[name])
        else:
            (folder / name).unlink(missing_ok=True)

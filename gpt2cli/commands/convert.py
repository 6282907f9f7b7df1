"""gpt2cli convert: a model of another program to a model folder, or a model folder to theirs."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2cli.errors import UserError
from gpt2cli.flags import check
from gpt2cli.storage import runs


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Convert a model from another program to a model folder, or one to Hugging Face format.

    Model:
        src: folder or file to read: the checkpoint of OpenAI, nshepperd, gpt-2-simple or GPT2_ML (a
            folder, or its path without extension), a Hugging Face folder, or the .bin of UER-py or
            TencentPretrain.
        dst: folder to create.
        to: format to write: openai, which all commands here read, or hf, for transformers.
        from_: format of SRC; auto detects it from the files.
        overwrite: replace DST if it exists.

    Missing information:
        config: JSON file with the sizes, where it is not in SRC (GPT2_ML, UER-py).
        vocab: vocabulary file or folder, where it is not in SRC.
        n_head: number of attention heads, which weights do not show, where no JSON file gives it
            (UER-py).
        as_published: keep UER-py's layer-norm gains and epsilon 1e-5, as its own (inexact)
            converter does, instead of converting exactly.

    Messages:
        verbose: show TensorFlow's own messages.

    Examples:
        gpt2cli convert checkpoint/books export/books --to hf
        gpt2cli convert uer_model.bin models/uer --config uer_config.json --vocab vocab.txt
    """

    src: str
    dst: str
    to: Literal["openai", "hf"] = "openai"
    from_: Literal["auto", "openai", "hf", "uer", "gpt2_ml"] = "auto"
    overwrite: bool = False
    config: str | None = None
    vocab: str | None = None
    n_head: int | None = None
    as_published: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        check(self, n_head=(1, None))


def run(config: ConvertOptions) -> None:
    """Read SRC, write DST, compare the two; a line on stderr for each.

    Raises:
        UserError: see `formats.open_source` and `formats.convert`; DST exists, or is SRC.
    """
    check_paths(config)
    from gpt2cli.formats import (
        convert as formats,  # brings TensorFlow, which no refusal above should wait for
    )

    source = formats.open_source(
        config.src,
        config.from_,
        config=config.config,
        vocab=config.vocab,
        n_head=config.n_head,
        as_published=config.as_published,
    )
    say(f"read {config.src}, {source.describe()}")
    for warning in source.warnings:
        say(f"{config.src}: {warning}")
    difference = formats.convert(source, config.dst, config.to, config.overwrite)
    exact = f"within {difference:.1g}" if difference else "exactly"
    say(f"wrote {config.dst}, whose logits are {exact} those of {config.src}")


def say(text):
    """One line of conversation."""
    print(text, file=sys.stderr, flush=True)


def check_paths(config):
    """Refuse (UserError) what the paths alone show to be wrong."""
    src, dst = Path(config.src), Path(config.dst)
    if not src.exists() and not Path(f"{src}.index").exists():
        raise UserError(
            f"nothing at {src.absolute()}: name a folder, a .bin, or a TensorFlow checkpoint "
            "without its ending"
        )
    for flag in ("config", "vocab"):
        named = getattr(config, flag)
        if named is not None and not Path(named).exists():
            raise UserError(f"--{flag}: nothing at {Path(named).absolute()}. Check the path")
    if config.config is not None and Path(config.config).is_dir():
        raise UserError(f"--config takes the json file, not the folder {config.config}")
    inside = [src.resolve(), *src.resolve().parents]
    if dst.resolve() in inside:
        raise UserError(f"{dst} is SRC or holds it, so it cannot be DST. Name another folder")
    if not os.path.lexists(dst):
        return
    if not config.overwrite:
        raise UserError(f"{dst} exists. Name another folder, or replace it with --overwrite")
    is_folder = dst.is_dir() and not dst.is_symlink()
    names = os.listdir(dst) if is_folder else []
    is_model = not names or {"hparams.json", "config.json"} & set(names)
    if not (is_folder and is_model) or runs.steps(dst):
        raise UserError(f"{dst} is not a model's folder, so it is not replaced. Name another")

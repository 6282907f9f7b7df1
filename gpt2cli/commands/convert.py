"""gpt2cli convert: a model of another program to a model folder, or a model folder to theirs."""

import os
import sys
from pathlib import Path

from gpt2cli.config import ConvertConfig
from gpt2cli.errors import UserError
from gpt2cli.storage import runs


def run(config: ConvertConfig) -> None:
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

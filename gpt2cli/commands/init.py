"""gpt2cli init: a model folder with random weights, for training from nothing."""

import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2cli import files
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.model.sizes import PRESETS, ModelConfig
from gpt2cli.options import MAX_SEED, MAX_TOKENS, check_name
from gpt2cli.storage import folders, runs
from gpt2cli.text import encoder


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Create a new model with random weights, to train it from scratch.

    Model:
        name: name of the model, models/NAME.
        vocab: vocabulary: vocab.txt, or a folder with it or with encoder.json and vocab.bpe
            (`gpt2cli vocab` makes one).
        seed: seed of the weights.
        overwrite: replace the model if it exists.

    Sizes:
        size: released size whose layers, heads and width to use; the flags below override it.
        n_layer: layers.
        n_head: attention heads in a layer.
        n_embd: width of the embeddings.
        n_ctx: positions the model can see.
        n_vocab: rows of the token embedding, where it should have more than the vocabulary.

    Folders and messages:
        models_dir: folder that contains the model folders.
        verbose: show TensorFlow's own messages.

    Examples:
        gpt2cli init small --vocab vocabulary --size distil
        gpt2cli init mine --vocab models/124M --n_layer 6 --n_ctx 512
    """

    name: str
    vocab: str
    seed: int = 0
    overwrite: bool = False
    size: Literal["tiny", "distil", "124M", "355M", "774M", "1558M"] = "124M"
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    n_ctx: int = 1024
    n_vocab: int | None = None
    models_dir: str = "models"
    verbose: bool = False

    def __post_init__(self) -> None:
        sizes = ("n_layer", "n_head", "n_embd", "n_ctx", "n_vocab")
        check(self, seed=(0, MAX_SEED), **dict.fromkeys(sizes, (1, MAX_TOKENS)))
        check_name("name", self.name)


OF_THE_VOCABULARY = ("lower_case", "start_token", "end_token")  # keys of a hparams.json


def run(config):
    """Make models/NAME; nobody sees it before it is whole.

    Raises:
        UserError: it exists, the vocabulary or the sizes do not fit, or the disk is full.
    """
    folder = Path(config.models_dir) / config.name
    if os.path.lexists(folder) and not config.overwrite:
        raise UserError(
            f"{folder} exists already. Name another model, or replace it with --overwrite"
        )
    is_model = folder.is_dir() and (folders.config_path(folder) or not os.listdir(folder))
    if os.path.lexists(folder) and (not is_model or runs.steps(folder)):
        raise UserError(f"{folder} is not a model's folder, so it is not replaced. Name another")
    n_layer, n_head, n_embd = (
        getattr(config, name) or preset
        for name, preset in zip(("n_layer", "n_head", "n_embd"), PRESETS[config.size], strict=True)
    )
    if n_embd % n_head:
        raise UsageError(
            f"--n_embd {n_embd} is not a multiple of --n_head {n_head}: each head takes an equal "
            f"share of the width. --size {config.size} gives what is not named"
        )
    with files.replacing_folder(folder) as part:
        extra = copy_vocabulary(config.vocab, part)
        vocabulary = _load(config.vocab, part)
        if getattr(vocabulary, "lower_case", True) is False:
            extra["lower_case"] = False
        n_vocab = config.n_vocab or vocabulary.n_vocab
        if n_vocab < vocabulary.n_vocab:
            raise UserError(
                f"--n_vocab {n_vocab} is less than the {vocabulary.n_vocab} tokens of "
                f"{config.vocab}. Leave it out, or name a smaller vocabulary"
            )
        sizes = ModelConfig(n_vocab, config.n_ctx, n_embd, n_head, n_layer, extra=extra)
        if extra:  # these decide how the vocabulary is read, so they are checked with it
            with files.replacing(part / "hparams.json") as file:
                file.write(sizes.to_json().encode())
            encoder.load(part)
        n_weights = _write_weights(sizes, config.seed, part, folder)
    _say(
        f"{folder}: n_layer {n_layer}, n_head {n_head}, n_embd {n_embd}, n_ctx {sizes.n_ctx}, "
        f"n_vocab {n_vocab}; {n_weights:,} parameters, random (seed {config.seed}), "
        f"{4 * n_weights:,} bytes"
    )
    words = ["gpt2cli", "train", "--dataset", "FILE", "--model_name", config.name]
    if config.models_dir != "models":
        words += ["--models_dir", config.models_dir]
    _say(f"train it with: {shlex.join(words)}")


def copy_vocabulary(path, folder):
    """Copy the vocabulary that `path` means into `folder`.

    Args:
        path: vocab.txt by any name, one of the two files of a BPE, or a folder with either.

    Returns:
        What a hparams.json beside it says of the vocabulary, a dict.

    Raises:
        UserError: nothing is there, or one file of two.
    """
    path = Path(path)
    if path.name == "vocab.txt" and not (path.parent / "encoder.json").exists():
        path = path.parent if path.is_file() else path  # its folder says how it is read
    if path.is_dir():
        encoder.load(path)  # its messages name the user's folder
        folders.copy_vocabulary(path, folder)
        # of a folder without hparams.json there is nothing to copy but files
        known = folders.read_config(path).extra if folders.config_path(path) else {}
        return {key: known[key] for key in OF_THE_VOCABULARY if key in known}
    if not path.is_file():
        raise UserError(
            f"no vocabulary at {path.absolute()}. --vocab takes vocab.txt, or a folder with it or "
            "with encoder.json and vocab.bpe; make one with: gpt2cli vocab CORPUS FOLDER"
        )
    names = next((kind for kind in encoder.KINDS if len(kind) == 2 and path.name in kind), None)
    if names is None:  # whatever its name, a list of tokens
        copied = {path: "vocab.txt"}
    else:
        copied = {path.with_name(name): name for name in names}
        lacking = [source for source in copied if not source.is_file()]
        if lacking:
            raise UserError(
                f"{path} has no {lacking[0].name} beside it, and the two are one vocabulary. Copy "
                "both from the same place"
            )
    for source, name in copied.items():
        if source.is_file():
            with files.replacing(folder / name) as file:
                file.write(files.read_bytes(source))
    return {}


def _load(path, part):
    """encoder.load of the copied files; an error names the file that the user gave."""
    try:
        return encoder.load(part)
    except UserError as error:
        text = str(error).replace(str(part / "vocab.txt"), str(path))
        raise UserError(text.replace(str(part), str(Path(path).parent))) from None


def _write_weights(sizes, seed, part, folder):
    """Write hparams.json and the checkpoint into `part`; returns the number of weights.

    UserError if the disk lacks the room, before anything is computed.
    """
    from gpt2cli.model import network as model
    from gpt2cli.storage import checkpoint

    n_weights = sum(math.prod(shape) for shape in model.weight_shapes(sizes).values())
    files.check_room(folder / "model.ckpt", 4 * n_weights)
    checkpoint.save(model.GPT2(sizes, model.random_weights(sizes, seed)), part)
    return n_weights


def _say(text):
    print(text, file=sys.stderr)

"""gpt2cli init: a model folder with random weights, to train it from scratch."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gpt2cli.console import say
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import MAX_SEED, MAX_TOKENS, check_added, check_name

if TYPE_CHECKING:
    from gpt2cli.formats.vocabularies import Vocabulary
    from gpt2cli.model.sizes import ModelConfig


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Create a new model with random weights, to train it from scratch.

    Model:
        name: name of the new model, models/NAME. If it is the name of a size, such as 355M, the
            model has that size.
        vocab: vocabulary: vocab.txt, tokenizer.json, or a folder with one of these or with
            encoder.json and vocab.bpe (`gpt2cli vocab` makes one).
        add_token: text of a token to add to the vocabulary, such as "<|user|>".
        seed: seed of the weights.
        overwrite: replace the model if it exists.

    Sizes:
        size: named size for layers, heads and width; the flags below override it (default: 124M, or
            the size that NAME is). 117M and 345M are older names of 124M and 355M.
        n_layer: number of layers.
        n_head: number of attention heads in each layer.
        n_embd: width of the embeddings.
        n_ctx: number of tokens that the model can see.
        n_vocab: rows of the token embedding (default: the number of tokens in the vocabulary).

    Folders and messages:
        models_dir: folder that contains the model folders.
        verbose: show TensorFlow's own messages.

    Examples:
        gpt2cli init small --vocab vocabulary --size distil
        gpt2cli init mine --vocab models/124M --n_layer 6 --n_ctx 512
        gpt2cli init chat --vocab models/124M --add_token "<|user|>" --add_token "<|bot|>"
    """

    name: str
    vocab: str
    add_token: tuple[str, ...] = ()
    seed: int = 0
    overwrite: bool = False
    size: Literal["tiny", "distil", "117M", "124M", "345M", "355M", "774M", "1558M"] | None = None
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
        check_added(self.add_token)

    @property
    def chosen_size(self) -> str:
        """The key of sizes.PRESETS for --size, else for NAME, else 124M."""
        from gpt2cli.model.sizes import ALIASES, PRESETS

        size = self.size or self.name
        size = ALIASES.get(size, size)
        return size if size in PRESETS else "124M"


def run(options: InitOptions) -> None:
    """Create models/NAME, whole or not at all.

    Raises:
        UserError: it exists, vocabulary or sizes do not fit, or the disk is full.
    """
    from gpt2cli import files, paths
    from gpt2cli.model.sizes import ALIASES, RELEASED, ModelConfig
    from gpt2cli.storage import destinations
    from gpt2cli.text import encoder

    folder = paths.check_folder_in(options.models_dir, options.name, "models_dir")
    folder = destinations.check_destination(folder, options.overwrite)
    n_layer, n_head, n_embd = layer_sizes(options)
    vocabulary = read_vocabulary(options)
    tokens = max(vocabulary.tokens.values()) + 1
    n_vocab = options.n_vocab or tokens
    if n_vocab < tokens:
        raise UserError(
            f"--n_vocab {n_vocab} is less than the {tokens} tokens of {options.vocab}. Leave it "
            "out, or use a smaller vocabulary"
        )
    extra = vocabulary.options
    sizes = ModelConfig(n_vocab, options.n_ctx, n_embd, n_head, n_layer, extra=extra)
    with files.replacing_folder(folder) as part:
        vocabulary.write(part)
        n_weights = _write_weights(sizes, options.seed, part, folder)
        encoder.load(part)  # as every later command does
    say(
        f"{folder}: n_layer {n_layer}, n_head {n_head}, n_embd {n_embd}, n_ctx {sizes.n_ctx}, "
        f"n_vocab {n_vocab}; {n_weights:,} random parameters (seed {options.seed}), "
        f"{4 * n_weights:,} bytes"
    )
    if options.name in (*RELEASED, *ALIASES):
        say(f"{folder} has random weights. For OpenAI's, use: gpt2cli download {options.name}")
    words = ["gpt2cli", "train", "--dataset", "FILE", "--model_name", options.name]
    if options.models_dir != "models":
        words += ["--models_dir", options.models_dir]
    say(f"train it with: {shlex.join(words)}")


def layer_sizes(options: InitOptions) -> tuple[int, int, int]:
    """Return n_layer, n_head and n_embd of --size and the flags that override it."""
    from gpt2cli.model.sizes import PRESETS

    names = ("n_layer", "n_head", "n_embd")
    n_layer, n_head, n_embd = (
        getattr(options, name) or preset
        for name, preset in zip(names, PRESETS[options.chosen_size], strict=True)
    )
    if n_embd % n_head:
        raise UsageError(
            f"--n_embd {n_embd} is not a multiple of --n_head {n_head}: each head takes an equal "
            f"share of the width. --size {options.chosen_size} sets the flags you leave out"
        )
    return n_layer, n_head, n_embd


def read_vocabulary(options: InitOptions) -> "Vocabulary":
    """Return the vocabulary that --vocab names, with the tokens of --add_token.

    Raises:
        UserError: there is no vocabulary, only one file of two, or a damaged one.
    """
    from gpt2cli.formats import vocabularies
    from gpt2cli.text import encoder

    path = Path(options.vocab)
    if not path.exists():
        raise UserError(
            f"no vocabulary at {path.absolute()}. --vocab takes vocab.txt, tokenizer.json, or a "
            "folder with one of these or with encoder.json and vocab.bpe; make one with: gpt2cli "
            "vocab CORPUS FOLDER"
        )
    found = vocabularies.read(path)
    if found is None:
        encoder.load(path)  # raises a UserError that says what is missing
    assert found is not None
    encoder.choose(found.described)  # rejects a damaged one; the error has the user's path
    for note in found.notes():
        say(f"{path}: {note}")
    return found.with_added(options.add_token, path) if options.add_token else found


def _write_weights(sizes: "ModelConfig", seed: int, part: Path, folder: Path) -> int:
    """Write hparams.json and the checkpoint into `part`; return the number of weights.

    Raises:
        UserError: the disk has no room, which is noticed before any weight is computed.
    """
    from gpt2cli import files
    from gpt2cli.model.network import GPT2
    from gpt2cli.model.weights import random_weights, weight_shapes
    from gpt2cli.storage import checkpoint

    n_weights = sum(math.prod(shape) for shape in weight_shapes(sizes).values())
    files.check_room(folder / "model.ckpt", 4 * n_weights)
    checkpoint.save(GPT2(sizes, random_weights(sizes, seed)), part)
    return n_weights

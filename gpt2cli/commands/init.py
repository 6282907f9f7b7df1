"""gpt2cli init: a model folder with random weights, to train it from scratch."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt2cli.console import say
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import MAX_SEED, MAX_TOKENS, check_name

if TYPE_CHECKING:
    from gpt2cli.model.sizes import ModelConfig
    from gpt2cli.text.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Create a new model with random weights, to train it from scratch.

    Model:
        name: name of the model, models/NAME; the name of a size, such as 355M, makes that size.
        vocab: vocabulary: vocab.txt, or a folder with it or with encoder.json and vocab.bpe
            (`gpt2cli vocab` makes one).
        seed: seed of the weights.
        overwrite: replace the model if it exists.

    Sizes:
        size: named size for layers, heads and width; the flags below override it (default: 124M, or
            the size that NAME names). 117M and 345M are older names of 124M and 355M.
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
        gpt2cli init 355M --vocab models/124M --models_dir fresh
    """

    name: str
    vocab: str
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
    from gpt2cli import files
    from gpt2cli.model.sizes import ALIASES, RELEASED, ModelConfig
    from gpt2cli.storage import folders
    from gpt2cli.text import encoder

    folder = Path(options.models_dir) / options.name
    folders.check_destination(folder, options.overwrite)
    n_layer, n_head, n_embd = layer_sizes(options)
    with files.replacing_folder(folder) as part:
        extra = copy_vocabulary(Path(options.vocab), part)
        vocabulary = _load(options.vocab, part)
        if getattr(vocabulary, "lower_case", True) is False:
            extra["lower_case"] = False
        n_vocab = options.n_vocab or vocabulary.n_vocab
        if n_vocab < vocabulary.n_vocab:
            raise UserError(
                f"--n_vocab {n_vocab} is less than the {vocabulary.n_vocab} tokens of "
                f"{options.vocab}. Leave it out, or use a smaller vocabulary"
            )
        sizes = ModelConfig(n_vocab, options.n_ctx, n_embd, n_head, n_layer, extra=extra)
        if extra:  # decides how the vocabulary is read, so both are checked together
            with files.replacing(part / "hparams.json") as file:
                file.write(sizes.to_json().encode())
            encoder.load(part)
        n_weights = _write_weights(sizes, options.seed, part, folder)
    say(
        f"{folder}: n_layer {n_layer}, n_head {n_head}, n_embd {n_embd}, n_ctx {sizes.n_ctx}, "
        f"n_vocab {n_vocab}; {n_weights:,} random parameters (seed {options.seed}), "
        f"{4 * n_weights:,} bytes"
    )
    if options.name in (*RELEASED, *ALIASES):
        say(f"{folder} is not OpenAI's {options.name}; get that with gpt2cli download")
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


def copy_vocabulary(path: Path, folder: Path) -> dict[str, Any]:
    """Copy a vocabulary into `folder`; return how hparams.json beside it says to read it.

    Args:
        path: vocab.txt by any name, one of the two files of a BPE, or a folder with either.
        folder: the folder to write to.

    Raises:
        UserError: there is no vocabulary, or only one file of two.
    """
    from gpt2cli import files
    from gpt2cli.storage import folders
    from gpt2cli.text import encoder

    if path.name == "vocab.txt" and not (path.parent / "encoder.json").exists():
        path = path.parent if path.is_file() else path  # the folder says how to read it
    if path.is_dir():
        opened = folders.open_folder(path)
        encoder.load(opened)  # its messages name the user's folder
        folders.copy_vocabulary(opened, folder)
        known = opened.sizes.extra if opened.sizes is not None else {}
        keys = ("lower_case", "start_token", "end_token")
        return {key: known[key] for key in keys if key in known}
    if not path.is_file():
        raise UserError(
            f"no vocabulary at {path.absolute()}. --vocab takes vocab.txt, or a folder with it or "
            "with encoder.json and vocab.bpe; make one with: gpt2cli vocab CORPUS FOLDER"
        )
    names = next((kind for kind in encoder.KINDS if len(kind) == 2 and path.name in kind), None)
    if names is None:  # a list of tokens under any name
        copied = {path: "vocab.txt"}
    else:
        copied = {path.with_name(name): name for name in names}
        lacking = [source for source in copied if not source.is_file()]
        if lacking:
            raise UserError(
                f"{path} has no {lacking[0].name} beside it, but a vocabulary needs both. Copy "
                "both from the same place"
            )
    for source, name in copied.items():
        with files.replacing(folder / name) as file:
            file.write(files.read_bytes(source))
    return {}


def _load(path: str, part: Path) -> "Encoder":
    """Load the copied vocabulary; errors name the user's file, not the copy."""
    from gpt2cli.text import encoder

    try:
        return encoder.load(part)
    except UserError as error:
        text = str(error).replace(str(part / "vocab.txt"), str(path))
        raise UserError(text.replace(str(part), str(Path(path).parent))) from None


def _write_weights(sizes: "ModelConfig", seed: int, part: Path, folder: Path) -> int:
    """Write hparams.json and the checkpoint into `part`; return the number of weights.

    Raises:
        UserError: the disk has no room, which is noticed before any weight is computed.
    """
    from gpt2cli import files
    from gpt2cli.model.network import GPT2, random_weights, weight_shapes
    from gpt2cli.storage import checkpoint

    n_weights = sum(math.prod(shape) for shape in weight_shapes(sizes).values())
    files.check_room(folder / "model.ckpt", 4 * n_weights)
    checkpoint.save(GPT2(sizes, random_weights(sizes, seed)), part)
    return n_weights

"""gpt2cli convert: convert between a model folder and the formats of other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2cli import machine
from gpt2cli.console import announce, say
from gpt2cli.errors import UserError
from gpt2cli.flags import check
from gpt2cli.options import check_added


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Convert a model from another program to a model folder, or one to Hugging Face format.

    Model:
        src: folder or file to read: the checkpoint of OpenAI, nshepperd, gpt-2-simple or GPT2_ML (a
            folder, or its path without extension), a Hugging Face folder, nanoGPT's ckpt.pt, or the
            .bin of UER-py or TencentPretrain.
        dst: folder to create.
        to: format to write: openai, which all commands here read, or hf, for transformers.
        from_: format of SRC; auto detects it from the files.
        overwrite: replace DST if it exists.
        base: folder of the base model, if SRC is a LoRA adapter, which is merged into it.

    Missing information:
        config: JSON file with the sizes, if SRC does not contain it (GPT2_ML, UER-py).
        vocab: vocabulary file or folder, if SRC does not contain it.
        n_head: number of attention heads, if no file gives it (UER-py); it cannot be read
            from the weights.
        activation: activation function, if no file gives it (default: gelu_new, as in OpenAI's
            code; gelu for nanoGPT).
        as_published: keep UER-py's layer-norm gains and epsilon 1e-5, as its own (inexact)
            converter does, instead of converting exactly.

    New tokens:
        add_token: text of a new token, such as "<|user|>"; its embedding is the mean of all others.

    Messages:
        verbose: show TensorFlow's own messages.

    Examples:
        gpt2cli convert checkpoint/books export/books --to hf
        gpt2cli convert adapter models/tuned --base models/124M
        gpt2cli convert models/124M models/chat --add_token "<|user|>" --add_token "<|bot|>"
        gpt2cli convert uer_model.bin models/uer --config uer_config.json --vocab vocab.txt
    """

    src: str
    dst: str
    to: Literal["openai", "hf"] = "openai"
    from_: Literal["auto", "openai", "hf", "nanogpt", "uer", "gpt2_ml"] = "auto"
    overwrite: bool = False
    base: str | None = None
    config: str | None = None
    vocab: str | None = None
    n_head: int | None = None
    activation: Literal["gelu_new", "gelu", "relu", "silu", "tanh"] | None = None
    as_published: bool = False
    add_token: tuple[str, ...] = ()
    verbose: bool = False

    def __post_init__(self) -> None:
        check(self, n_head=(1, None))
        check_added(self.add_token)


def run(options: ConvertOptions) -> None:
    """Read SRC, write DST, compare the two; report both on stderr.

    Raises:
        UserError: see `open_source` and `convert` in formats/convert.py.
    """
    machine.check_tensorflow("convert")
    announce(f"reading {options.src}")
    check_paths(options)
    from gpt2cli.formats.convert import add_tokens, convert, open_source  # imports TensorFlow

    source = open_source(
        options.src,
        options.from_,
        config=options.config,
        vocab=options.vocab,
        n_head=options.n_head,
        as_published=options.as_published,
        activation=options.activation,
        base=options.base,
    )
    say(f"read {options.src}, {source.describe()}")
    for warning in source.warnings:
        say(f"{options.src}: {warning}")
    if options.add_token:
        source = add_tokens(source, options.add_token)
        ids = (f"{text} (id {source.tokens()[text]})" for text in options.add_token)
        say(f"new tokens: {', '.join(ids)}")
    difference = convert(source, options.dst, options.to, options.overwrite)
    exact = f"within {difference:.1g}" if difference else "exactly"
    say(f"wrote {options.dst}; its logits equal those of {options.src} {exact}")


def check_paths(options: ConvertOptions) -> None:
    """Reject (UserError) wrong paths before anything is read."""
    from gpt2cli.storage import destinations

    src = Path(options.src)
    if not src.exists() and not Path(f"{src}.index").exists():
        raise UserError(
            f"nothing at {src.absolute()}: name a folder, a .bin file, or a TensorFlow checkpoint "
            "without its extension"
        )
    for flag in ("config", "vocab", "base"):
        named = getattr(options, flag)
        if named is not None and not Path(named).exists():
            raise UserError(f"--{flag}: nothing at {Path(named).absolute()}. Check the path")
    if options.config is not None and Path(options.config).is_dir():
        raise UserError(f"--config needs a JSON file, but {options.config} is a folder")
    destinations.check_destination(options.dst, options.overwrite, src)

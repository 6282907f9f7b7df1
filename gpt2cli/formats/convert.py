"""Models in the formats of other programs: read under our names, and written as Hugging Face's.

The formats:
    openai      a TensorFlow checkpoint with hparams.json: OpenAI's, nshepperd's, gpt-2-simple's
    gpt2_ml     a TensorFlow checkpoint with `newslm/...` variables
    hf          config.json with model.safetensors or pytorch_model.bin, in one file or several
    nanogpt     a ckpt.pt of nanoGPT, or another state dict with the matrices of PyTorch's Linear
    uer         a .bin of UER-py or TencentPretrain

A `Source` reads each weight from its file when it is needed, so that a model with 1.5 billion
weights is never in memory twice.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from gpt2cli import files
from gpt2cli.console import counted
from gpt2cli.errors import UserError
from gpt2cli.formats import adapters, names, settings, statedict, tensors, vocabularies
from gpt2cli.formats.statedict import ReadWeight
from gpt2cli.formats.vocabularies import Vocabulary
from gpt2cli.model.network import GPT2
from gpt2cli.model.sizes import SIZES, ModelConfig
from gpt2cli.model.weights import W_STDDEV, weight_shapes
from gpt2cli.storage import checkpoint, destinations, folders, reading
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text import encoder

FORMATS = {
    "openai": "a TensorFlow checkpoint of GPT-2",
    "gpt2_ml": "a TensorFlow checkpoint of GPT2_ML",
    "hf": "a Hugging Face model",
    "nanogpt": "a nanoGPT model",
    "uer": "a UER-py model",
}
NOT_READ = (".h5", ".msgpack", ".gguf", ".onnx", ".ot")  # Keras, Flax, llama.cpp, ONNX, Rust
CHECK_TOLERANCE = 1e-4  # of logits; the weights are equal, so only rounding may differ


@dataclass(frozen=True)
class Source:
    """A model that was opened: its sizes are known, its weights are read one by one.

    Attributes:
        format: one of FORMATS.
        path: the file or folder that the user named.
        config: sizes; `extra` has lower_case, start_token and end_token where they differ from the
            defaults of our encoder.
        tensor: reads a weight by our name and shape.
        vocabulary: the vocabulary; None without one.
        warnings: sentences for the user.
    """

    format: str
    path: Path
    config: ModelConfig
    tensor: ReadWeight
    vocabulary: Vocabulary | None = None
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return one line with the format, the sizes and the number of parameters."""
        c = self.config
        count = sum(math.prod(shape) for shape in weight_shapes(c).values())
        odd = f"activation {c.activation}, " if c.activation != ModelConfig.activation else ""
        odd += f"{c.n_inner} wide inside its MLPs, " if c.n_inner is not None else ""
        size = f"a vocabulary of {len(self.tokens()):,}" if self.vocabulary else "no vocabulary"
        return (
            f"{FORMATS[self.format]}: {counted(c.n_layer, 'layer')}, {counted(c.n_head, 'head')}, "
            f"{c.n_embd} wide, {counted(c.n_vocab, 'token')}, {counted(c.n_ctx, 'position')}, {odd}"
            f"{count:,} parameters, {size}"
        )

    def tokens(self) -> dict[str, int]:
        """Return token -> id of its vocabulary."""
        return self.vocabulary.tokens if self.vocabulary else {}

    def special(self) -> tuple[str | None, str | None]:
        """Return the start token and the end token that our encoder will use, None for none."""
        if self.vocabulary is None:
            return None, None
        return self.vocabulary.described.start, self.vocabulary.described.end


def open_source(
    src: str | Path,
    format: str = "auto",
    config: str | Path | None = None,
    vocab: str | Path | None = None,
    n_head: int | None = None,
    as_published: bool = False,
    activation: str | None = None,
    base: str | Path | None = None,
) -> Source:
    """Open the model at `src`, and check everything that can be checked without its weights.

    Args:
        src: a folder, a file of weights, or the path of a TensorFlow checkpoint without extension.
        format: one of FORMATS, or auto.
        config: JSON file with the sizes, where it is not in `src`.
        vocab: vocabulary file or folder, where it is not in `src`.
        n_head: number of attention heads, where no JSON file gives it.
        as_published: keep UER-py's gains and epsilon 1e-5; see `ConvertOptions`.
        activation: activation function, where neither `src` nor a JSON file gives it.
        base: the model that `src`, a LoRA adapter, is merged into; the other arguments then
            describe this model.

    Raises:
        UserError: no model of these formats, a setting our network does not support, a weight that
            is missing, unexpected or of a wrong shape, or a damaged file; the text names it.
    """
    adapter = adapters.find(Path(src))
    if adapter is not None and base is None:
        adapters.reject(adapter)
    if base is not None:
        if adapter is None:
            raise UserError(f"--base is for a LoRA adapter, but {src} has no {adapters.CONFIG}")
        source = open_source(base, format, config, vocab, n_head, as_published, activation)
        return _with_adapter(source, adapter)
    path, config = Path(src), Path(config) if config else None
    kind = _kind_of(path) if format == "auto" else format
    if kind in ("openai", "gpt2_ml", "tensorflow"):
        source = _open_tensorflow(path, config)
    else:
        source = _open_state(path, kind, config, n_head, as_published, activation)
    found = FORMATS[source.format]
    if format not in ("auto", source.format):
        raise UserError(f"{path} is {found}: use --from {source.format}, not {format}")
    if as_published and source.format != "uer":
        raise UserError(f"--as_published is for UER-py models, but {path} is {found}")
    if activation not in (None, source.config.activation):
        raise UserError(
            f"--activation {activation} contradicts {source.config.activation} of {path}. "
            "Leave it out"
        )
    if n_head not in (None, source.config.n_head):
        raise UserError(
            f"--n_head {n_head} contradicts n_head {source.config.n_head} of {path}. Leave it out"
        )
    return _with_vocabulary(source, Path(vocab) if vocab else None)


def _kind_of(path: Path) -> str:
    """Return tensorflow, hf (.safetensors) or torch (.bin) by the files; UserError if unclear."""
    if not path.is_dir():
        if path.suffix in NOT_READ:
            raise UserError(_not_read(path))
        if path.is_file() and path.suffix not in (".index", ".meta") and ".data-" not in path.name:
            return "hf" if path.suffix == ".safetensors" else "torch"
        return "tensorflow"
    has_tensorflow = any(path.glob("*.index"))
    weights = tensors.find(path)
    if has_tensorflow and weights:
        raise UserError(
            f"{path} contains a TensorFlow checkpoint and {weights.name}. "
            "Choose one with --from openai, gpt2_ml, hf, nanogpt or uer"
        )
    if has_tensorflow or weights:
        return "torch" if weights else "tensorflow"
    unread = next((p for p in sorted(path.iterdir()) if p.suffix in NOT_READ), None)
    if unread is not None:
        raise UserError(f"{path} has its weights only as {unread.name}. {_not_read(unread)}")
    raise UserError(
        f"no model in {path}: it contains neither a TensorFlow checkpoint (.index) nor "
        ".safetensors nor .bin. Check the path"
    )


def _not_read(path: Path) -> str:
    """Return the advice for weights in a format that gpt2cli does not read."""
    return (
        f"gpt2cli cannot read {path.suffix}: get the model as .safetensors, or load it in "
        "transformers (from_tf, from_flax or gguf_file) and save it with save_pretrained()"
    )


def _open_tensorflow(path: Path, config_path: Path | None) -> Source:
    """Open a checkpoint of OpenAI or GPT2_ML."""
    prefix = folders.find_checkpoint(path)
    if config_path is None:
        folder = dataclasses.replace(folders.open_folder(prefix.parent), checkpoint=prefix)
    else:
        sizes = ModelConfig.from_json(files.read_bytes(config_path), where=str(config_path))
        folder = ModelFolder(prefix.parent, sizes, sizes_path=config_path, checkpoint=prefix)
    if folder.sizes is None:
        raise UserError(
            f"{prefix.parent} has neither hparams.json nor GPT2_ML's config JSON file. Name the "
            "file with the sizes with --config"
        )
    config, stored = reading.open_weights(folder)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(stored(name, shape), np.float32)

    return Source("gpt2_ml" if config.arch == "gpt2_ml" else "openai", path, config, tensor)


def _open_state(
    path: Path,
    kind: str,
    config_path: Path | None,
    n_head: int | None,
    as_published: bool,
    activation: str | None,
) -> Source:
    """Open a state dict; `kind` is hf, nanogpt, uer, or torch for any of them."""
    file = tensors.find(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise UserError(f"no weights at {path}: neither .safetensors nor .bin. Check the path")
    weights = tensors.read(file)
    format = names.format_of(weights)
    if kind not in ("torch", format) and (kind, format) != ("hf", "nanogpt"):
        raise UserError(f"{path} is {FORMATS[format]}: use --from {format}, not {kind}")
    config, tensor, notes = statedict.open_weights(
        weights, config_path, n_head, as_published, activation
    )
    if (file.parent / adapters.CONFIG).exists():
        notes.append(f"{adapters.CONFIG} is beside the weights, but the adapter was not applied")
    return Source(format, path, config, tensor, warnings=tuple(notes))


def _with_adapter(source: Source, adapter: adapters.Adapter) -> Source:
    """Return the Source of a base with an adapter merged into it; UserError if it does not fit."""
    if source.config.arch != "gpt2":
        raise UserError(f"{adapter.folder} is {adapter}, but --base {source.path} is not a GPT-2")
    own = vocabularies.read(adapter.folder, source.config.n_vocab)
    if own is not None and own.tokens != source.tokens():
        raise UserError(
            f"{adapter.folder} has another vocabulary than {source.path}. Merge it in PEFT, which "
            "also resizes the embeddings"
        )
    tensor = adapters.merged(adapter, source.tensor, weight_shapes(source.config))
    note = f"{adapter}, merged into {source.path}"
    return dataclasses.replace(source, tensor=tensor, warnings=(*source.warnings, note))


def _with_vocabulary(source: Source, named: Path | None) -> Source:
    """Return the Source with the vocabulary at `named`, or else with the one beside the weights."""
    home = source.path if source.path.is_dir() else source.path.parent
    folder = named or home
    is_hf = source.format in ("hf", "nanogpt")
    found = vocabularies.read(folder, source.config.n_vocab, home if is_hf else None)
    if found is None and named is not None:
        raise UserError(
            f"no vocabulary at {named}: name a file such as vocab.txt, or a folder with vocab.txt, "
            "encoder.json and vocab.bpe, vocab.json and merges.txt, or tokenizer.json"
        )
    if found is None:
        warning = "no vocabulary, so the model takes token ids only; add one with --vocab"
        return dataclasses.replace(source, warnings=(*source.warnings, warning))
    vocabularies.check_fits(found, source.config.n_vocab, folder)
    extra = {**source.config.extra, **found.options}
    return dataclasses.replace(
        source,
        config=dataclasses.replace(source.config, extra=extra),
        vocabulary=found,
        warnings=(*source.warnings, *found.notes()),
    )


def add_tokens(source: Source, texts: Sequence[str]) -> Source:
    """Return the Source with new tokens, each with the mean of the other rows as its embedding.

    New tokens take the rows that the model has beyond its vocabulary first. With the mean, a new
    token is about as likely as an average one until it is trained.

    Raises:
        UserError: there is no vocabulary, or a text is already a token.
    """
    if source.vocabulary is None:
        raise UserError(f"{source.path} has no vocabulary to add tokens to. Name one with --vocab")
    vocabulary = source.vocabulary.with_added(texts, source.path)
    first = max(source.tokens().values()) + 1
    last = max(vocabulary.tokens.values())
    old = source.config
    extra = {**old.extra, **vocabulary.options}
    config = dataclasses.replace(old, n_vocab=max(old.n_vocab, last + 1), extra=extra)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name != "model/wte":
            return source.tensor(name, shape)
        table = source.tensor(name, (old.n_vocab, old.n_embd))
        wider = np.zeros(shape, np.float32)
        wider[: old.n_vocab] = table
        wider[first : last + 1] = table[:first].mean(axis=0, dtype=np.float64)
        return wider

    return dataclasses.replace(source, config=config, tensor=tensor, vocabulary=vocabulary)


def convert(
    source: Source,
    dst: str | Path,
    to: str = "openai",
    overwrite: bool = False,
    finish: Callable[[Path], None] = lambda folder: None,
) -> float:
    """Write a model folder, whole and checked or not at all.

    It is made beside `dst`, opened again, its logits are compared with the source's, and only then
    is it renamed.

    Args:
        source: from `open_source`.
        dst: the folder to create.
        to: openai or hf.
        overwrite: replace `dst`, a model folder, at the end.
        finish: called with the finished folder before it is renamed.

    Returns:
        The largest difference between two logits.

    Raises:
        UserError: the format cannot represent the model, `dst` must not be written, no space, or
            the result is not the same model.
    """
    if to == "hf" and source.config.arch == "gpt2_ml":
        raise UserError(
            f"{source.path} cannot be converted for transformers, which has no class for GPT2_ML: "
            "its layer norms are in other places than in GPT-2. Leave out --to hf"
        )
    target = destinations.check_destination(dst, overwrite, source.path)
    with files.replacing_folder(os.path.abspath(target)) as part:
        difference = _write_checked(source, part, to)
        finish(part)
    return difference


def _write_checked(source: Source, part: Path, to: str) -> float:
    """Fill the folder `part`; return the largest difference of its logits from the source's.

    One network is in memory at a time.
    """
    if to == "openai":
        _write_openai_description(source, part)
    else:
        _write_hf_description(source, part)
    if source.vocabulary:  # before the long part, as it may be damaged
        try:
            encoder.load(part)
        except UserError as error:
            reason = str(error).replace(f"{part}{os.sep}", "")
            raise UserError(f"the vocabulary of {source.path}: {reason}") from None
    network = GPT2(source.config, source.tensor)
    expected = _sample_logits(network)
    if to == "openai":
        checkpoint.save(network, part)
    del network
    if to == "hf":
        _write_safetensors(source, part / tensors.HF_WEIGHTS[0])
    written = open_source(part)
    found = _sample_logits(GPT2(written.config, written.tensor))
    difference = float(np.abs(found - expected).max())
    if not difference <= CHECK_TOLERANCE or written.tokens() != source.tokens():
        raise UserError(
            f"the copy of {source.path} differs from the original (logits by {difference:.2g}), so "
            "it was removed. Is the disk failing? Try another disk"
        )
    return difference


def _sample_logits(network: GPT2) -> np.ndarray:  # [T, V]
    """Return the logits of a few fixed tokens, spread over the vocabulary."""
    config = network.config
    tokens = np.arange(1, min(config.n_ctx, 16) + 1) * 7919 % config.n_vocab
    return network(tokens.astype(np.int32)[None])[0].numpy()


def _write_openai_description(source: Source, folder: Path) -> None:
    """Write hparams.json and the vocabulary under OpenAI's names."""
    (folder / "hparams.json").write_text(source.config.to_json(), encoding="utf-8")
    if source.vocabulary:
        source.vocabulary.write(folder)


def _write_safetensors(source: Source, path: Path) -> None:
    """Write model.safetensors as transformers does: no buffers, and wte once."""
    arrays = {}
    for name, shape in weight_shapes(source.config).items():
        value = source.tensor(name, shape)
        (place,) = names.places_of(name, "hf")
        arrays[f"transformer.{place}"] = value[0] if len(shape) == 3 else value
    try:
        safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(0, str(error)) from error
    shutil.copymode(path.with_name("config.json"), path)  # the library lets only the owner read it
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_hf_description(source: Source, folder: Path) -> None:
    """Write config.json, generation_config.json, and the vocabulary under transformers' names."""
    config, ids = source.config, vocabularies.hf_ids(source.vocabulary)
    values: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{settings.SIZE_FIELDS["hf"][name][0]: getattr(config, name) for name in SIZES},
        "n_ctx": config.n_ctx,  # read by versions before 2020
        "n_inner": config.n_inner,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.ln_epsilon,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),  # as in their GPT-2
        "initializer_range": W_STDDEV,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        **ids,
    }
    if "tokenizer_class" in config.extra:
        values["tokenizer_class"] = config.extra["tokenizer_class"]
    if source.vocabulary:
        vocabularies.write_for_transformers(folder, source.vocabulary, config)
    vocabularies.write_object(folder / "config.json", values)
    values = {"_from_model_config": True, **ids}
    vocabularies.write_object(folder / "generation_config.json", values)

"""Models in the forms of other programs: read into our names, and written as Hugging Face's.

A form is what lies on the disk:
    openai      a TensorFlow checkpoint with hparams.json: OpenAI's, nshepperd's, gpt-2-simple's
    gpt2_ml     a TensorFlow checkpoint with `newslm/...` variables
    hf          config.json with model.safetensors or pytorch_model.bin, also in several files
    uer         a .bin of UER-py or TencentPretrain

A `Source` reads each weight from its file when it is asked for, so that a model of 1.5 billion
weights is never in memory twice.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.numpy

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.formats import statedict, vocabularies
from gpt2cli.model import network as model
from gpt2cli.model.sizes import SIZES, ModelConfig
from gpt2cli.storage import checkpoint, folders
from gpt2cli.text import encoder

FORMS = {
    "openai": "a TensorFlow checkpoint of GPT-2",
    "gpt2_ml": "a TensorFlow checkpoint of GPT2_ML",
    "hf": "Hugging Face's form",
    "uer": "UER-py's form",
}
ELSEWHERE = ("tf_model.h5", "flax_model.msgpack")  # Keras and Flax: not read here
CHECK_TOLERANCE = 1e-4  # of logits; the weights are the same, so that what is seen is rounding


@dataclass(frozen=True)
class Source:
    """A model as it lies on the disk, opened: sizes known, weights read one by one.

    Args:
        form: one of FORMS.
        path: what the user named.
        config: ModelConfig; `extra` holds lower_case, start_token, end_token where they are not
            what our encoder takes by default.
        tensor: function of our name of a weight and its shape that gives the float32 array.
        vocabulary: our name of each vocabulary file -> its bytes; empty without one.
        warnings: what the user should know, a sentence each.
    """

    form: str
    path: Path
    config: ModelConfig
    tensor: Callable
    vocabulary: dict = field(default_factory=dict)
    warnings: tuple = ()

    def describe(self):
        """One line: form, sizes, parameters."""
        c = self.config
        count = sum(int(np.prod(shape)) for shape in model.weight_shapes(c).values())
        words = f"a vocabulary of {len(self.tokens()):,}" if self.vocabulary else "no vocabulary"
        return (
            f"{FORMS[self.form]}: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, "
            f"{c.n_vocab:,} tokens, {c.n_ctx:,} positions, {count:,} parameters, {words}"
        )

    def tokens(self):
        """Token -> id of its vocabulary."""
        return vocabularies.tokens(self.vocabulary)

    def special(self):
        """(start token, end token) as our encoder will see them, None for none."""
        return vocabularies.special(self.vocabulary, self.config)


def open_source(
    src, form="auto", config=None, vocab=None, n_head=None, as_published=False
) -> Source:
    """Open the model that `src` means, and check everything that can be without its weights.

    Args:
        src: a folder, a file of weights, or the path of a TensorFlow checkpoint without ending.
        form: one of FORMS, or auto.
        config: the json with the sizes, where it does not lie in `src`.
        vocab: the vocabulary's file or folder, where it does not lie in `src`.
        n_head: attention heads, where no json says it.
        as_published: UER-py's gains and epsilon 1e-5 as they are; see `ConvertOptions`.

    Raises:
        UserError: not one of these, something that our network cannot be (the field is named), a
            weight that is missing, too much or of a wrong shape (it is named), a damaged file.
    """
    path, config = Path(src), config and Path(config)
    kind = form if form != "auto" else _kind_of(path)
    if kind in ("openai", "gpt2_ml", "tensorflow"):
        source = _open_tensorflow(path, config)
    else:
        source = _open_state(path, kind, config, n_head, as_published)
    if form not in ("auto", source.form):
        raise UserError(f"{path} is {FORMS[source.form]}: give --from {source.form}, not {form}")
    if as_published and source.form != "uer":
        raise UserError(f"--as_published is for UER-py's models; {path} is {FORMS[source.form]}")
    if n_head not in (None, source.config.n_head):
        raise UserError(
            f"--n_head {n_head} contradicts n_head {source.config.n_head} of {path}. Leave it out"
        )
    return _with_vocabulary(source, Path(vocab) if vocab else None)


def _kind_of(path):
    """tensorflow, hf (.safetensors) or torch, by what is there; UserError where that is unclear."""
    if not path.is_dir():
        if path.is_file() and path.suffix not in (".index", ".meta") and ".data-" not in path.name:
            return "hf" if path.suffix == ".safetensors" else "torch"
        return "tensorflow"
    has_tensorflow = any(path.glob("*.index"))
    weights = statedict.find(path)
    if has_tensorflow and weights:
        raise UserError(
            f"{path} holds a TensorFlow checkpoint and {weights.name}. "
            "Say which: --from openai, gpt2_ml, hf or uer"
        )
    if not has_tensorflow and not weights:
        keras = [name for name in ELSEWHERE if (path / name).is_file()]
        raise UserError(
            f"{path} has its weights only as {keras[0]}, which is not read here. Load it in "
            "transformers (from_tf or from_flax) and save it with save_pretrained"
            if keras
            else f"no model in {path}: it holds neither a TensorFlow checkpoint (.index) nor "
            ".safetensors nor .bin. Check the path"
        )
    return "torch" if weights else "tensorflow"


def _open_tensorflow(path, config_path):
    """The Source of OpenAI's or GPT2_ML's checkpoint."""
    prefix = folders.find_checkpoint(path)
    folder = dataclasses.replace(folders.open_folder(prefix.parent), checkpoint=prefix)
    if config_path is not None:
        sizes = ModelConfig.from_json(files.read_bytes(config_path), where=str(config_path))
        folder = dataclasses.replace(folder, sizes=sizes, sizes_path=config_path)
    elif folder.sizes is None:
        raise UserError(
            f"{prefix.parent} has neither hparams.json nor GPT2_ML's config JSON file: name the "
            "file with the sizes with --config"
        )
    config, stored = checkpoint.open_weights(folder)

    def tensor(name, shape):
        return np.asarray(stored(name, shape), np.float32)

    return Source("gpt2_ml" if config.arch == "gpt2_ml" else "openai", path, config, tensor)


def _open_state(path, kind, config_path, n_head, as_published):
    """The Source of a state dict; `kind` is hf, uer, or torch for either."""
    file = statedict.find(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise UserError(f"no weights at {path}: neither .safetensors nor .bin. Check the path")
    stored = statedict.read(file)
    form = statedict.form_of(stored)
    if kind not in ("torch", form):
        raise UserError(f"{path} is {FORMS[form]}: give --from {form}, not {kind}")
    found = statedict.open_weights(file, stored, form, config_path, n_head, as_published)
    return Source(form, path, *found)


def _with_vocabulary(source, named):
    """The Source with the vocabulary that lies at `named`, or else beside the weights."""
    home = source.path if source.path.is_dir() else source.path.parent
    folder, warnings = named or home, []
    vocabulary, asked = vocabularies.read(folder, source.config.n_vocab, warnings)
    if named is not None and not vocabulary:
        raise UserError(
            f"no vocabulary at {named}: a file like vocab.txt, or a folder with vocab.txt, with "
            f"encoder.json and vocab.bpe, or with vocab.json and merges.txt. {' '.join(warnings)}"
        )
    if not vocabulary:
        warnings.append(
            "there is no vocabulary, so the model takes token ids only; give one with --vocab"
        )
    tokens = vocabularies.tokens(vocabulary)
    if max(tokens.values(), default=0) >= source.config.n_vocab:
        raise UserError(
            f"{folder}: the vocabulary has {max(tokens.values()) + 1:,} tokens, the model "
            f"{source.config.n_vocab:,}. Name the one that belongs to it with --vocab"
        )
    if source.form == "hf" and vocabulary:
        beside = folder if folder.is_dir() else home
        asked |= vocabularies.hf_special(home, beside, vocabulary)
    config = source.config
    config = dataclasses.replace(config, extra={**config.extra, **asked})
    return dataclasses.replace(
        source, config=config, vocabulary=vocabulary, warnings=tuple(warnings)
    )


def convert(source, dst, to="openai", overwrite=False, finish=lambda folder: None):
    """Write a Source as the folder `dst`, whole and checked or not at all.

    It is made beside `dst`, opened again, its logits compared with the source's, then renamed.

    Args:
        to: openai or hf.
        overwrite: replace `dst`, a model's folder, at the end.
        finish: function of the finished folder, called before it gets its name.

    Returns:
        The largest difference between two logits, a float.

    Raises:
        UserError: the form cannot hold the model, no space, or the result is not the same model.
    """
    dst = Path(os.path.abspath(dst))
    if to == "hf" and source.config.arch == "gpt2_ml":
        raise UserError(
            f"{source.path} cannot be written for transformers: GPT2_ML has no layer norm before "
            "attention and one behind each sum, and no class there is made so. Leave out --to hf"
        )
    if os.path.lexists(dst) and not overwrite:
        raise UserError(f"{dst} exists. Name another folder, or replace it with --overwrite")
    if re.search(r"[\[\]]", str(dst)):
        raise UserError(f"TensorFlow reads no path with [ or ] in it: choose another than {dst}")
    with files.replacing_folder(dst) as part:
        difference = _write_checked(source, part, to)
        finish(part)
    return difference


def _write_checked(source, part, to):
    """Fill the folder `part`; the largest difference of its logits from the source's.

    One network is in memory at a time.
    """
    if to == "openai":
        _write_openai_description(source, part)
    else:
        _write_hf_description(source, part)
    if source.vocabulary:  # before the work, as it may be spoilt
        try:
            encoder.load(part)
        except UserError as error:
            reason = str(error).replace(f"{part}{os.sep}", "")
            raise UserError(f"the vocabulary of {source.path}: {reason}") from None
    network = model.GPT2(source.config, source.tensor)
    expected = _sample_logits(network)
    if to == "openai":
        checkpoint.save(network, part)
    del network
    if to == "hf":
        _write_safetensors(source, part / statedict.HF_WEIGHTS[0])
    written = open_source(part)
    found = _sample_logits(model.GPT2(written.config, written.tensor))
    difference = float(np.abs(found - expected).max())
    if not difference <= CHECK_TOLERANCE or written.tokens() != source.tokens():
        raise UserError(
            f"{source.path}: what was written is not the same when it is read again (logits differ "
            f"by {difference:.2g}), so it was removed. Is the disk failing? Try another one"
        )
    return difference


def _sample_logits(network):
    """The logits [T, V] of a few tokens, spread over the vocabulary; always the same ones."""
    config = network.config
    tokens = np.arange(1, min(config.n_ctx, 16) + 1) * 7919 % config.n_vocab
    return network(tokens.astype(np.int32)[None])[0].numpy()


def _write_openai_description(source, folder):
    """hparams.json and the vocabulary under OpenAI's names."""
    (folder / "hparams.json").write_text(source.config.to_json(), encoding="utf-8")
    for name, content in source.vocabulary.items():
        (folder / name).write_bytes(content)


def _write_safetensors(source, path):
    """model.safetensors as transformers writes it: no buffers, and wte once."""
    arrays = {}
    for name, shape in model.weight_shapes(source.config).items():
        value = source.tensor(name, shape)
        (place,) = statedict.places_of(name, "hf")
        arrays[f"transformer.{place}"] = value[0] if len(shape) == 3 else value
    try:
        safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(0, str(error)) from error
    shutil.copymode(path.with_name("config.json"), path)  # the library leaves it to the owner
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_hf_description(source, folder):
    """config.json, generation_config.json, and the vocabulary under transformers' names."""
    config, tokens = source.config, source.tokens()
    wordpiece = "vocab.txt" in source.vocabulary
    start, end = source.special()
    pad = "[PAD]" if wordpiece and "[PAD]" in tokens else None
    ids = {
        "bos_token_id": tokens.get(start),
        "eos_token_id": tokens.get(end),
        "pad_token_id": tokens.get(pad),
    }
    values = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{statedict.SIZE_FIELDS["hf"][name][0]: getattr(config, name) for name in SIZES},
        "n_ctx": config.n_ctx,  # what readers before 2020 look for
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.ln_epsilon,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),  # as theirs of GPT-2
        "initializer_range": model.W_STDDEV,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        **ids,
    }
    if source.vocabulary:
        values["tokenizer_class"] = "BertTokenizer" if wordpiece else "GPT2Tokenizer"
        vocabularies.write_for_transformers(folder, source.vocabulary, config)
    vocabularies.write_object(folder / "config.json", values)
    values = {"_from_model_config": True, **ids}
    vocabularies.write_object(folder / "generation_config.json", values)

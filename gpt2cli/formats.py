"""Models in the forms of other programs: read into our names, and written as Hugging Face's.

A form is what lies on the disk:
    openai      a TensorFlow checkpoint with hparams.json: OpenAI's, nshepperd's, gpt-2-simple's
    gpt2_ml     a TensorFlow checkpoint with `newslm/...` variables
    hf          config.json with model.safetensors or pytorch_model.bin, also in several files
    uer         a .bin of UER-py or TencentPretrain

A `Source` reads each weight from its file when it is asked for, so that a model of 1.5 billion
weights is never in memory twice.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from gpt2cli import checkpoint, encoder, files, model
from gpt2cli.config import LN_EPSILON, SIZES, ModelConfig
from gpt2cli.errors import UserError

FORMS = {
    "openai": "a TensorFlow checkpoint of GPT-2",
    "gpt2_ml": "a TensorFlow checkpoint of GPT2_ML",
    "hf": "Hugging Face's form",
    "uer": "UER-py's form",
}
INDEX = ".index.json"  # names the files of a model that is split: weight_map, name -> file
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order of transformers
STATE = re.compile(r"\.(safetensors|bin|pt|pth)(-\d+)?$")  # UER-py puts the step after the ending
ELSEWHERE = ("tf_model.h5", "flax_model.msgpack")  # Keras and Flax: not read here

# Our name of each size -> the names in a config json, the first being the one that is written.
SIZE_FIELDS = {
    "hf": {
        "n_vocab": ("vocab_size",),
        "n_ctx": ("n_positions", "n_ctx", "max_position_embeddings"),
        "n_embd": ("n_embd", "hidden_size"),
        "n_head": ("n_head", "num_attention_heads"),
        "n_layer": ("n_layer", "num_hidden_layers"),
    },
    "uer": {
        "n_vocab": ("vocab_size",),
        "n_ctx": ("max_seq_length",),
        "n_embd": ("hidden_size", "emb_size"),
        "n_head": ("heads_num",),
        "n_layer": ("layers_num",),
    },
}
# Fields of a config json that change the network -> what our network can be. "4 * width" stands
# for that number. A field that is not there is taken to be right; most would show in the weights.
FIXED = {
    "hf": {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # one function
        "n_inner": (None, "4 * width"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    "uer": {  # UER-py opts.py and models/gpt2/*.json, the older files included
        "embedding": (["word", "pos"], "word_pos"),
        "remove_embedding_layernorm": (True,),
        "encoder": ("transformer",),
        "mask": ("causal",),
        "layernorm_positioning": ("pre",),
        "layernorm": ("normal",),
        "layernorm_eps": (1e-6,),
        "feed_forward": ("dense",),
        "feedforward_size": ("4 * width",),
        "hidden_act": ("gelu_fast",),
        "target": (["lm"], "lm"),
        "tie_weights": (True,),
        "factorized_embedding_parameterization": (False,),
        "parameter_sharing": (False,),
        "has_residual_attention": (False,),
        "remove_attention_scale": (False,),
        "remove_transformer_bias": (False,),
        "relative_position_embedding": (False,),
        "rotary_position_embedding": (False,),
    },
}

# Where the weights of a layer are in a state dict of UER-py: ours -> theirs.
UER_LAYER = {
    "ln_1/g": ("layer_norm_1.gamma",),
    "ln_1/b": ("layer_norm_1.beta",),
    "attn/c_attn/w": tuple(f"self_attn.linear_layers.{i}.weight" for i in range(3)),  # q, k, v
    "attn/c_attn/b": tuple(f"self_attn.linear_layers.{i}.bias" for i in range(3)),
    "attn/c_proj/w": ("self_attn.final_linear.weight",),
    "attn/c_proj/b": ("self_attn.final_linear.bias",),
    "ln_2/g": ("layer_norm_2.gamma",),
    "ln_2/b": ("layer_norm_2.beta",),
    "mlp/c_fc/w": ("feed_forward.linear_1.weight",),
    "mlp/c_fc/b": ("feed_forward.linear_1.bias",),
    "mlp/c_proj/w": ("feed_forward.linear_2.weight",),
    "mlp/c_proj/b": ("feed_forward.linear_2.bias",),
}
UER_REST = {
    "model/wte": ("embedding.word.embedding.weight",),
    "model/wpe": ("embedding.pos.embedding.weight",),
    "model/ln_f/g": ("encoder.layer_norm.gamma",),
    "model/ln_f/b": ("encoder.layer_norm.beta",),
}
# TencentPretrain scripts/convert_tencentpretrain_from_old_to_new.py: names before 2022 -> now
UER_OLD = {
    "embedding.word_embedding.weight": "embedding.word.embedding.weight",
    "embedding.position_embedding.weight": "embedding.pos.embedding.weight",
    "target.output_layer.weight": "target.lm.output_layer.weight",
}
# UER-py divides by the sample deviation of a row and adds 1e-6 to that; with the gains scaled and
# nothing of note added to the variance, OpenAI's formula gives the same to rounding.
UER_LN_EPSILON = 1e-12

OUR_NAMES = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
HF_NAMES = {ours: theirs for theirs, ours in OUR_NAMES.items()}
# transformers' classes that read text as our encoder does; the second line names none in particular
TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast")
TOKENIZERS += ("PreTrainedTokenizerFast", "TokenizersBackend")
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
        return _tokens(self.vocabulary)

    def special(self):
        """(start token, end token) as our encoder will see them, None for none."""
        default = ("[CLS]", "[SEP]") if "vocab.txt" in self.vocabulary else (encoder.END,) * 2
        asked = [self.config.extra.get(f"{k}_token", default[i]) for i, k in enumerate(PLACES)]
        return tuple(token if token in self.tokens() else None for token in asked)


PLACES = ("start", "end")


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
        as_published: UER-py's gains and epsilon 1e-5 as they are; see `ConvertConfig`.

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
    """tensorflow, hf or uer by the files that are there; UserError where they do not tell."""
    if not path.is_dir():
        if path.is_file() and path.suffix not in (".index", ".meta") and ".data-" not in path.name:
            return "hf" if path.suffix == ".safetensors" else "torch"
        return "tensorflow"
    has_tensorflow = any(path.glob("*.index"))
    has_state = _weights_file(path) is not None
    if has_tensorflow and has_state:
        raise UserError(
            f"{path} holds a TensorFlow checkpoint and {_weights_file(path).name}. "
            "Say which: --from openai, gpt2_ml, hf or uer"
        )
    if not has_tensorflow and not has_state:
        keras = [name for name in ELSEWHERE if (path / name).is_file()]
        raise UserError(
            f"{path} has its weights only as {keras[0]}, which is not read here. Load it in "
            "transformers (from_tf or from_flax) and save it with save_pretrained"
            if keras
            else f"no model in {path}: it holds neither a TensorFlow checkpoint (.index) nor "
            ".safetensors nor .bin. Check the path"
        )
    return "torch" if has_state else "tensorflow"


def _weights_file(folder):
    """The file of weights (or of the index of several) in a folder, or None."""
    for name in HF_WEIGHTS:
        for path in (folder / name, folder / (name + INDEX)):
            if path.is_file():
                return path
    others = [path for path in sorted(folder.iterdir()) if STATE.search(path.name)]
    if len(others) > 1:
        names = ", ".join(p.name for p in others[:4])
        raise UserError(f"{folder} holds {names}: name the file of weights instead of the folder")
    return others[0] if others else None


# TensorFlow checkpoints


def _open_tensorflow(path, config_path):
    """The Source of OpenAI's or GPT2_ML's checkpoint."""
    prefix = files.find_checkpoint(path)
    if config_path is None and files.config_path(prefix.parent) is None:
        raise UserError(
            f"{prefix.parent} has neither hparams.json nor GPT2_ML's config json: name the file "
            "with the sizes with --config"
        )
    config, stored = checkpoint.open_weights(prefix, config_path)

    def tensor(name, shape):
        return np.asarray(stored(name, shape), np.float32)

    return Source("gpt2_ml" if config.arch == "gpt2_ml" else "openai", path, config, tensor)


# State dicts: Hugging Face's and UER-py's


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape, and how to read it as a float32 array."""

    file: Path
    shape: tuple
    read: Callable


def _open_state(path, kind, config_path, n_head, as_published):
    """The Source of a state dict; `kind` is hf, uer, or torch for either."""
    file = _weights_file(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise UserError(f"no weights at {path}: neither .safetensors nor .bin. Check the path")
    stored = _read_state(file)
    names = {_hf_name_of(name): value for name, value in stored.items()}
    is_uer = any(name.startswith("embedding.word") for name in stored)
    form = "uer" if is_uer else "hf"
    if kind in ("hf", "uer") and kind != form:
        raise UserError(f"{path} is {FORMS[form]}: give --from {form}, not {kind}")
    if is_uer:
        names = {UER_OLD.get(name, name): value for name, value in stored.items()}
    beside = file.parent / "config.json"
    values = _read_values(config_path or beside) if config_path or beside.is_file() else {}
    if form == "hf":
        names = {name: s for name, s in names.items() if not BUFFER.fullmatch(name)}
    config = _config_of(names, form, values, config_path or beside, n_head)
    if form == "uer" and not as_published:
        config = dataclasses.replace(config, ln_epsilon=UER_LN_EPSILON)
    head = names.pop("target.lm.output_layer.weight" if is_uer else "lm_head.weight", None)
    tensor = _state_reader(names, config, form, file, exact=is_uer and not as_published)
    if head is not None:
        table = tensor("model/wte", (config.n_vocab, config.n_embd))
        if head.shape != table.shape or not np.array_equal(head.read(), table):
            raise UserError(
                f"{file}: the output matrix (lm_head, output_layer) is not the token embedding; "
                "this network has one table for both and cannot be that model"
            )
    return Source(form, path, config, tensor)


# Kept by older versions of transformers beside the weights: the triangle of ones, and -1e4.
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
OLD_LEAVES = {"g": "weight", "w": "weight", "b": "bias"}  # of the first PyTorch ports


def _hf_name_of(name):
    """A name without `transformer.` and with today's last part."""
    stem, _, leaf = name.removeprefix("transformer.").rpartition(".")
    return f"{stem}.{OLD_LEAVES.get(leaf, leaf)}"


def _read_state(file):
    """Name -> Stored of a file of weights, or of all files that an index names."""
    if not file.name.endswith(INDEX):
        return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    placed = _read_values(file).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(n, str) for n in placed.values()):
        raise UserError(f"{file} has no weight_map of names and files. Copy or fetch it again")
    stored = {}
    for name in sorted(set(placed.values())):
        part = file.with_name(name) if Path(name).name == name else None
        if part is None or not part.is_file():
            raise UserError(f"{file} names {name}, which is not beside it. Copy or fetch it again")
        stored |= _read_state(part)
    missing = [name for name in placed if name not in stored]
    if missing:
        raise UserError(f"{placed[missing[0]]} lacks {_few(missing)}, which {file} says it has")
    return stored


def _read_safetensors(file):
    """Name -> Stored of one .safetensors; formats of fewer bits are widened to float32."""
    import ml_dtypes  # noqa: F401  (comes with TensorFlow; teaches NumPy what bfloat16 is)

    try:
        handle = safetensors.safe_open(file, "np")
        kinds = {name: handle.get_slice(name) for name in handle.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short ({error}). Fetch it again") from None

    def reader(name, kind):
        def read():
            if kind not in ("F16", "BF16", "F32", "F64"):
                raise UserError(f"{file}: {name} is {kind}; only floating-point weights are read")
            return handle.get_tensor(name).astype(np.float32, copy=False)

        return read

    return {
        name: Stored(file, tuple(part.get_shape()), reader(name, part.get_dtype()))
        for name, part in kinds.items()
    }


def torch():
    """PyTorch, which only .bin files need; UserError where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError(
            "a .bin of weights is read with PyTorch, which is not installed. Install it with: "
            "pip install gpt2cli[torch], or get the model as .safetensors"
        ) from None


def _read_torch(file):
    """Name -> Stored of a state dict that torch.save wrote; nothing but tensors is unpickled."""
    load = torch().load
    options = {"weights_only": True, "map_location": "cpu"}
    try:
        try:
            state = load(file, mmap=True, **options)
        except RuntimeError:  # before PyTorch 1.6 the file was not a zip, and cannot be mapped
            state = load(file, **options)
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} holds more than tensors, or is no file of PyTorch's. Anything else in such a "
            "file could be a program, so it is never loaded: save the state dict alone"
        ) from None
    except (RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{file} is damaged or no file of PyTorch's ({reason})") from None
    if not isinstance(state, dict) or not all(hasattr(v, "shape") for v in state.values()):
        raise UserError(f"{file} is not a state dict: names and tensors, nothing else")

    def reader(name):
        def read():
            if not state[name].is_floating_point():
                raise UserError(f"{file}: {name} is {state[name].dtype}, not floating-point")
            return state[name].float().numpy()

        return read

    return {name: Stored(file, tuple(t.shape), reader(name)) for name, t in state.items()}


def _read_values(path):
    """The object in a JSON file; UserError for anything else."""
    try:
        values = json.loads(files.read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}). Copy or fetch it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object. Copy or fetch it again")
    return values


def check_hf_config(path):
    """Refuse (UserError) a config.json that our network cannot be, before its weights are had."""
    _check_fixed(_read_values(path), "hf", path, width=None)


def _check_fixed(values, form, where, width):
    """UserError for a field whose value is not in FIXED; `width` None leaves out what needs it."""
    for name, allowed in FIXED[form].items():
        if name not in values or (width is None and "4 * width" in allowed):
            continue
        allowed = [4 * width if value == "4 * width" else value for value in allowed]
        if not any(type(values[name]) is type(a) and values[name] == a for a in allowed):
            raise UserError(
                f"{where}: {name} is {json.dumps(values[name])}, and this network only "
                f"{' or '.join(json.dumps(a) for a in allowed)}: it is another kind of model"
            )


def _config_of(names, form, values, where, n_head):
    """ModelConfig from the weights' shapes; the json adds n_head and must not contradict them."""
    _check_fixed(values, form, where, width=None)  # says more than that a weight is missing
    table, positions, layer = {
        "hf": ("wte.weight", "wpe.weight", r"h\.(\d+)\."),
        "uer": (*UER_REST["model/wte"], *UER_REST["model/wpe"], r"encoder\.transformer\.(\d+)\."),
    }[form]
    lacking = [name for name in (table, positions) if name not in names]
    if lacking:
        raise UserError(
            f"{where.parent}: the weights lack {_few(lacking)}: they are not of a GPT-2 "
            f"({len(names)} tensors: {_few(names)})"
        )
    for name in (table, positions):
        if len(names[name].shape) != 2:
            raise UserError(f"{names[name].file}: {name} is {list(names[name].shape)}, not a table")
    layers = {int(found[1]) for name in names if (found := re.match(layer, name))}
    (n_vocab, n_embd), n_ctx = names[table].shape, names[positions].shape[0]
    sizes = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd}
    sizes["n_layer"] = max(layers, default=-1) + 1
    _check_fixed(values, form, where, n_embd)
    for ours, theirs in SIZE_FIELDS[form].items():
        for name in theirs:
            if name in values and ours in sizes and values[name] != sizes[ours]:
                raise UserError(
                    f"{where}: {name} is {values[name]!r}, the weights have {sizes[ours]}. "
                    "Use the config json that belongs to them"
                )
    said = [values[name] for name in SIZE_FIELDS[form]["n_head"] if name in values]
    if not said and n_head is None:
        known = f"{where} has no {SIZE_FIELDS[form]['n_head'][0]}" if values else f"no {where}"
        raise UserError(
            f"the weights do not show how many attention heads there are, and there is {known}: "
            "give --config FILE or --n_head NUMBER"
        )
    epsilon = values.get("layer_norm_epsilon", LN_EPSILON) if form == "hf" else LN_EPSILON
    epsilon = float(epsilon) if type(epsilon) is int else epsilon
    try:
        return ModelConfig(**sizes, n_head=said[0] if said else n_head, ln_epsilon=epsilon)
    except UserError as error:
        reason = str(error).removeprefix("hparams: ").replace("ln_epsilon", "layer_norm_epsilon")
        raise UserError(f"{where if values else '--n_head'}: {reason}") from None


def _places(config, form):
    """Our name of each weight -> the names in a state dict that it is made of, in order."""
    places = {}
    for name in model.weight_shapes(config):
        layer, part = re.fullmatch(r"model/(?:h(\d+)/)?(.+)", name).groups()
        if form == "hf":
            stem, leaf = part.rsplit("/", 1) if "/" in part else (part, "w")
            stem = stem.replace("/", ".")
            places[name] = (f"{'' if layer is None else f'h.{layer}.'}{stem}.{OLD_LEAVES[leaf]}",)
        elif layer is None:
            places[name] = UER_REST[name]
        else:
            places[name] = tuple(f"encoder.transformer.{layer}.{n}" for n in UER_LAYER[part])
    return places


def _state_reader(names, config, form, file, exact):
    """Check all names and shapes of a state dict; the function that reads one of our weights.

    OpenAI's matrices and Hugging Face's are [in, out], the former with an axis of 1 before;
    UER-py's, as all of PyTorch's Linear, [out, in]. `exact` scales UER-py's gains.
    """
    places, shapes = _places(config, form), model.weight_shapes(config)
    asked = {name for found in places.values() for name in found}
    missing = [name for name in asked if name not in names]
    extra = [name for name in names if name not in asked]
    if missing:
        raise UserError(f"{file} lacks {_few(missing)}: it is not a whole GPT-2")
    if extra:
        raise UserError(
            f"{file} has {_few(extra)}, which no GPT-2 has: it is another kind of model"
        )
    is_linear = {name: len(shape) == 3 for name, shape in shapes.items()}
    for name, shape in shapes.items():
        stored = shape[1:] if is_linear[name] else shape
        if form == "uer" and is_linear[name]:
            stored = stored[::-1]
        parts = len(places[name])
        wanted = (stored[0] // parts, *stored[1:])
        for place in places[name]:
            if names[place].shape != wanted:
                raise UserError(
                    f"{names[place].file}: {place} is {list(names[place].shape)}, the sizes ask "
                    f"for {list(wanted)}. Does the config json belong to these weights?"
                )
    gain = np.float32(np.sqrt((config.n_embd - 1) / config.n_embd)) if exact else np.float32(1)

    def tensor(name, shape):
        arrays = [names[place].read() for place in places[name]]
        value = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        value = value.T if form == "uer" and is_linear[name] else value
        value = value * gain if exact and name.endswith("/g") else value
        if not np.isfinite(value).all():
            raise UserError(
                f"{file}: {_few(places[name])} has values that are not finite; the training that "
                "wrote it diverged, or the file is damaged"
            )
        return np.ascontiguousarray(value).reshape(shape)

    return tensor


def _few(names):
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# Vocabularies


def _with_vocabulary(source, named):
    """The Source with the vocabulary that lies at `named`, or else beside the weights."""
    home = source.path if source.path.is_dir() else source.path.parent
    folder, warnings = named or home, []
    vocabulary, asked = _read_vocabulary(folder, source.config.n_vocab, warnings)
    if named is not None and not vocabulary:
        raise UserError(
            f"no vocabulary at {named}: a file like vocab.txt, or a folder with vocab.txt, with "
            f"encoder.json and vocab.bpe, or with vocab.json and merges.txt. {' '.join(warnings)}"
        )
    if not vocabulary:
        warnings.append(
            "there is no vocabulary, so the model takes token ids only; give one with --vocab"
        )
    tokens = _tokens(vocabulary)
    if max(tokens.values(), default=0) >= source.config.n_vocab:
        raise UserError(
            f"{folder}: the vocabulary has {max(tokens.values()) + 1:,} tokens, the model "
            f"{source.config.n_vocab:,}. Name the one that belongs to it with --vocab"
        )
    if source.form == "hf" and vocabulary:
        asked |= _hf_special(home, folder if folder.is_dir() else home, tokens, vocabulary)
    config = source.config
    config = dataclasses.replace(config, extra={**config.extra, **asked})
    return dataclasses.replace(
        source, config=config, vocabulary=vocabulary, warnings=tuple(warnings)
    )


def _read_vocabulary(path, n_vocab, warnings):
    """({our name: bytes}, {lower_case, start_token, end_token where not the default}) at `path`."""
    known = {*encoder.KINDS[0], *encoder.KINDS[1], "tokenizer.json"}
    if path.is_file() and path.name not in known:
        return {"vocab.txt": files.read_bytes(path)}, {}
    folder = path.parent if path.is_file() else path
    asked = {}
    if (folder / "tokenizer_config.json").is_file():
        values = _read_values(folder / "tokenizer_config.json")
        if values.get("do_lower_case") is False:
            asked["lower_case"] = False
        if values.get("add_prefix_space") is True:
            warnings.append("its tokenizer puts a space before a text; the one here does not")
        made_for = values.get("tokenizer_class")
        if made_for is not None and made_for not in TOKENIZERS:
            warnings.append(f"its tokenizer is {made_for}; here texts may get other ids")
    if files.config_path(folder):
        extra = files.read_config(folder).extra
        keys = ("lower_case", "start_token", "end_token")
        asked |= {key: extra[key] for key in keys if key in extra}
    for kind in encoder.KINDS:
        if all((folder / name).is_file() for name in kind):
            found = {OUR_NAMES.get(n, n): files.read_bytes(folder / n) for n in kind}
            if kind != ("vocab.txt",):
                asked.pop("lower_case", None)
                found["encoder.json"] = _with_added(found["encoder.json"], folder, n_vocab)
            return found, asked
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        try:
            return _from_tokenizer_json(path, asked, n_vocab, warnings)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not as tokenizers writes it ({error!r})") from None
    if encoder.exists(folder):
        encoder.load(folder)  # raises: says which file lacks its companion
    return {}, {}


def _tokens(vocabulary):
    """Token -> id of {our name: bytes}."""
    if "encoder.json" in vocabulary:
        values = json.loads(vocabulary["encoder.json"])
        return {token: index for token, index in values.items() if type(index) is int}
    lines = vocabulary.get("vocab.txt", b"").decode("utf-8", "replace").removesuffix("\n")
    return {line.rstrip("\r"): index for index, line in enumerate(lines.split("\n")) if lines}


def _with_added(text, folder, n_vocab):
    """encoder.json's bytes with the tokens of added_tokens.json that the model has room for."""
    try:
        vocab = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}: the vocabulary is not JSON ({error}). Fetch it again") from None
    if not isinstance(vocab, dict):
        raise UserError(f"{folder}: the vocabulary must be one JSON object. Fetch it again")
    if not (folder / "added_tokens.json").is_file():
        return text
    added = _read_values(folder / "added_tokens.json")
    taken = {index for index in vocab.values() if type(index) is int}
    new = {
        token: index
        for token, index in added.items()
        if type(index) is int and index < n_vocab and token not in vocab and index not in taken
    }
    return json.dumps({**vocab, **new}, ensure_ascii=False).encode() if new else text


def _from_tokenizer_json(path, asked, n_vocab, warnings):
    """As `_read_vocabulary`, from the one file of the tokenizers library."""
    values = _read_values(path)
    kind = values.get("model") if isinstance(values.get("model"), dict) else {}
    vocab = kind.get("vocab")
    if kind.get("type") == "BPE" and isinstance(vocab, dict) and _is_byte_level(values):
        added = values.get("added_tokens") or []
        ids = {a["content"]: a["id"] for a in added if a["id"] < n_vocab}
        merges = [m if isinstance(m, str) else " ".join(m) for m in kind.get("merges", [])]
        asked.pop("lower_case", None)
        found = {
            "encoder.json": json.dumps({**ids, **vocab}, ensure_ascii=False).encode(),
            "vocab.bpe": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        }
        return found, asked
    if kind.get("type") == "WordPiece" and isinstance(vocab, dict):
        tokens = sorted(vocab, key=vocab.get)
        whole = [vocab[token] for token in tokens] == list(range(len(tokens)))
        if whole and not any("\n" in token for token in tokens):
            if (values.get("normalizer") or {}).get("lowercase") is False:
                asked["lower_case"] = False
            return {"vocab.txt": "\n".join([*tokens, ""]).encode()}, asked
    warnings.append(f"{path} is of a kind that is not read here ({kind.get('type')})")
    return {}, {}


def _is_byte_level(values):
    """Whether a tokenizer.json cuts text as GPT-2 does: its parts have the type ByteLevel."""
    splitter = values.get("pre_tokenizer") or {}
    return "ByteLevel" in [p.get("type") for p in [splitter, *splitter.get("pretokenizers", [])]]


def _hf_special(home, folder, tokens, vocabulary):
    """start_token and end_token that a Hugging Face model names, where not the usual ones.

    Args:
        home: the folder of its config.json, which has their ids.
        folder: that of its vocabulary.
    """
    named, ids = {}, {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            named |= _read_values(folder / name)
    if (home / "config.json").is_file():
        ids = _read_values(home / "config.json")
    usual = ("[CLS]", "[SEP]") if "vocab.txt" in vocabulary else (encoder.END,) * 2
    token_of = {index: token for token, index in tokens.items()}
    special = {}
    for place, key, default in zip(PLACES, ("bos_token", "eos_token"), usual, strict=True):
        token = named.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str) or token not in tokens:
            index = ids.get(f"{key}_id")
            token = token_of.get(index) if type(index) is int else None
        if token not in (None, default):
            special[f"{place}_token"] = token
    return special


# Writing


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
    part = dst.with_name(f".{dst.name}.{os.getpid()}.part")
    made = [folder for folder in dst.parents if not folder.exists()]
    try:
        part.mkdir(parents=True)
        difference = _write_checked(source, part, to)
        finish(part)
        _put_in_place(part, dst)
    except OSError as error:
        raise files.cannot_write(dst, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: all went well
                folder.rmdir()
    return difference


def _put_in_place(part, dst):
    """Rename `part` to `dst`; what is there goes when the new is in its place."""
    old = dst.with_name(f".{dst.name}.{os.getpid()}.old")
    replaced = dst.exists()
    if replaced:
        os.rename(dst, old)
    try:
        os.rename(part, dst)
    except BaseException:
        if replaced:
            os.rename(old, dst)
        raise
    if replaced:
        shutil.rmtree(old)


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
        _write_safetensors(source, part / HF_WEIGHTS[0])
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
    places, arrays = _places(source.config, "hf"), {}
    for name, shape in model.weight_shapes(source.config).items():
        value = source.tensor(name, shape)
        arrays[f"transformer.{places[name][0]}"] = value[0] if len(shape) == 3 else value
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
        **{SIZE_FIELDS["hf"][name][0]: getattr(config, name) for name in SIZES},
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
        _write_hf_tokenizer(source, folder, start, end)
    _write_json(folder / "config.json", values)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})


def _write_hf_tokenizer(source, folder, start, end):
    """The vocabulary's files and what transformers wants to know of them."""
    for name, content in source.vocabulary.items():
        (folder / HF_NAMES.get(name, name)).write_bytes(content)
    if "vocab.txt" in source.vocabulary:
        names = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        names |= {"cls_token": "[CLS]", "mask_token": "[MASK]"}
        special = {key: token for key, token in names.items() if token in source.tokens()}
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": source.config.extra.get("lower_case", True),
            "tokenize_chinese_chars": True,
            "strip_accents": None,
        }
    else:
        special = {"bos_token": start, "eos_token": end, "unk_token": end}
        special = {key: token for key, token in special.items() if token is not None}
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    settings |= {"model_max_length": source.config.n_ctx, **special}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(path, values):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

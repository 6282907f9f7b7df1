"""The tensors of Hugging Face's and UER-py's files under our names.

A state dict is a table of names and tensors: .safetensors, a .bin that torch.save wrote, or several
of either and an index. What its config.json says must be what our network can be.
"""

import dataclasses
import functools
import importlib
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.model import network as model
from gpt2cli.model.sizes import LN_EPSILON, ModelConfig

INDEX = ".index.json"  # names the files of a model that is split: weight_map, name -> file
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order of transformers
STATE = re.compile(r"\.(safetensors|bin|pt|pth)(-\d+)?$")  # UER-py puts the step after the ending

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

LAYERS = {"hf": "h.", "uer": "encoder.transformer."}  # what stands before the number of a layer
# What a weight is made of in a state dict of UER-py: ours -> theirs, of a layer or after them.
UER_PLACES = {
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
    "wte": ("embedding.word.embedding.weight",),
    "wpe": ("embedding.pos.embedding.weight",),
    "ln_f/g": ("encoder.layer_norm.gamma",),
    "ln_f/b": ("encoder.layer_norm.beta",),
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
# Kept by older versions of transformers beside the weights: the triangle of ones, and -1e4.
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
LEAVES = {"g": "weight", "w": "weight", "b": "bias"}  # ours, and those of the first PyTorch ports


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape, and how to read it as a float32 array."""

    file: Path
    shape: tuple
    read: Callable


def find(folder):
    """The file of weights (or the index of several) in a folder, or None; UserError if unclear."""
    for name in HF_WEIGHTS:
        for path in (folder / name, folder / (name + INDEX)):
            if path.is_file():
                return path
    others = [path for path in sorted(folder.iterdir()) if STATE.search(path.name)]
    if len(others) > 1:
        names = ", ".join(p.name for p in others[:4])
        raise UserError(f"{folder} holds {names}: name the file of weights instead of the folder")
    return others[0] if others else None


def read(file):
    """Name -> Stored of a file of weights, or of all files that an index names.

    UserError where it is damaged, incomplete, or holds more than tensors.
    """
    if not file.name.endswith(INDEX):
        return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    placed = files.read_object(file).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(n, str) for n in placed.values()):
        raise UserError(f"{file} has no weight_map of names and files. Copy or fetch it again")
    stored = {}
    for name in sorted(set(placed.values())):
        part = file.with_name(name) if name and Path(name).name == name else None
        if part is None or not part.is_file() or name.endswith(INDEX):
            raise UserError(f"{file} names {name}, which is not beside it. Copy or fetch it again")
        stored |= read(part)
    missing = [name for name in placed if name not in stored]
    if missing:
        raise UserError(f"{placed[missing[0]]} lacks {_few(missing)}, which {file} says it has")
    return stored


def _read_safetensors(file):
    """Name -> Stored of one .safetensors; formats of fewer bits are widened to float32."""
    import ml_dtypes  # noqa: F401  (comes with TensorFlow; teaches NumPy what bfloat16 is)

    try:
        handle = safetensors.safe_open(file, "np")
        parts = {name: handle.get_slice(name) for name in handle.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short ({error}). Fetch it again") from None

    def tensor(name):
        kind = parts[name].get_dtype()
        if kind not in ("F16", "BF16", "F32", "F64"):
            raise UserError(f"{file}: {name} is {kind}; only floating-point weights are read")
        return handle.get_tensor(name).astype(np.float32, copy=False)

    return {
        name: Stored(file, tuple(part.get_shape()), functools.partial(tensor, name))
        for name, part in parts.items()
    }


def torch():
    """PyTorch, which only .bin files need; UserError where it is not installed."""
    try:
        found = importlib.import_module("torch")
    except ImportError:
        raise UserError(
            "a .bin of weights is read with PyTorch, which is not installed. Install it with: "
            "pip install gpt2cli[torch], or get the model as .safetensors"
        ) from None
    if tuple(map(int, found.__version__.split(".")[:2])) < (2, 6):
        raise UserError(  # CVE-2025-32434
            f"PyTorch {found.__version__} may run what is in a .bin even when it is told not to. "
            "Update it with: pip install -U torch, or get the model as .safetensors"
        )
    return found


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

    def tensor(name):
        if not state[name].is_floating_point():
            raise UserError(f"{file}: {name} is {state[name].dtype}, not floating-point")
        return state[name].detach().float().numpy()

    return {
        name: Stored(file, tuple(value.shape), functools.partial(tensor, name))
        for name, value in state.items()
    }


def form_of(stored):
    """Whose names these are: hf or uer."""
    return "uer" if any(name.startswith("embedding.word") for name in stored) else "hf"


def open_weights(file, stored, form, config_path=None, n_head=None, as_published=False):
    """The ModelConfig of a state dict, and the function that reads one of our weights from it.

    Args:
        file: what `read` was given.
        stored: what it gave.
        form: hf or uer.
        config_path: the json with the sizes; by default the config.json beside `file`.
        n_head: attention heads, where no json says it.
        as_published: UER-py's gains and epsilon 1e-5 as they are, not what makes it exact.

    Returns:
        (ModelConfig, function of our name of a weight and its shape that gives the float32 array)

    Raises:
        UserError: a field, name or shape that is not of a network like ours.
    """
    where = config_path or file.parent / "config.json"
    values = files.read_object(where) if config_path or where.is_file() else {}
    if form == "uer":
        names = {UER_OLD.get(name, name): value for name, value in stored.items()}
    else:
        names = {_hf_name_of(name): value for name, value in stored.items()}
        names = {name: value for name, value in names.items() if not BUFFER.fullmatch(name)}
    config = _config_of(names, form, values, where, n_head)
    exact = form == "uer" and not as_published
    if exact:
        config = dataclasses.replace(config, ln_epsilon=UER_LN_EPSILON)
    head = names.pop("target.lm.output_layer.weight" if form == "uer" else "lm_head.weight", None)
    tensor = _reader(names, config, form, file, exact)
    if head is not None:
        table = tensor("model/wte", (config.n_vocab, config.n_embd))
        if head.shape != table.shape or not np.array_equal(head.read(), table):
            raise UserError(
                f"{file}: the output matrix (lm_head, output_layer) is not the token embedding; "
                "this network has one table for both and cannot be that model"
            )
    return config, tensor


def _hf_name_of(name):
    """A name without `transformer.` and with today's last part."""
    stem, _, leaf = name.removeprefix("transformer.").rpartition(".")
    return f"{stem}.{LEAVES.get(leaf, leaf)}"


def check_hf_config(path):
    """Refuse (UserError) a config.json that our network cannot be, before its weights are had."""
    _check_fixed(files.read_object(path), "hf", path, width=None)


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
    (table,), (positions,) = places_of("model/wte", form), places_of("model/wpe", form)
    lacking = [name for name in (table, positions) if name not in names]
    if lacking:
        raise UserError(
            f"{where.parent}: the weights lack {_few(lacking)}: they are not of a GPT-2 "
            f"({len(names)} tensors: {_few(names)})"
        )
    for name in (table, positions):
        if len(names[name].shape) != 2:
            raise UserError(f"{names[name].file}: {name} is {list(names[name].shape)}, not a table")
    layer = re.compile(re.escape(LAYERS[form]) + r"(\d+)\.")
    layers = {int(found[1]) for name in names if (found := layer.match(name))}
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


def places_of(name, form):
    """The names in a state dict that our weight `name` is made of, in order; `form` is hf or uer.

    There are several where UER-py has a matrix each for query, key and value.
    """
    layer, part = re.fullmatch(r"model/(?:h(\d+)/)?(.+)", name).groups()
    if form == "uer":
        found = UER_PLACES[part]
    else:
        stem, leaf = part.rsplit("/", 1) if "/" in part else (part, "w")
        found = (f"{stem.replace('/', '.')}.{LEAVES[leaf]}",)
    return found if layer is None else tuple(f"{LAYERS[form]}{layer}.{n}" for n in found)


def _reader(names, config, form, file, exact):
    """Check all names and shapes of a state dict; the function that reads one of our weights.

    OpenAI's matrices and Hugging Face's are [in, out], the former with an axis of 1 before;
    UER-py's, as all of PyTorch's Linear, [out, in]. `exact` scales UER-py's gains.
    """
    shapes = model.weight_shapes(config)
    places = {name: places_of(name, form) for name in shapes}
    asked = {place for found in places.values() for place in found}
    missing = [name for name in asked if name not in names]
    extra = [name for name in names if name not in asked]
    if missing:
        raise UserError(f"{file} lacks {_few(missing)}: it is not a whole GPT-2")
    if extra:
        raise UserError(
            f"{file} has {_few(extra)}, which no GPT-2 has: it is another kind of model"
        )
    for name, shape in shapes.items():
        if len(shape) == 3:
            shape = shape[:0:-1] if form == "uer" else shape[1:]
        wanted = (shape[0] // len(places[name]), *shape[1:])
        for place in places[name]:
            if names[place].shape != wanted:
                raise UserError(
                    f"{names[place].file}: {place} is {list(names[place].shape)}, the sizes ask "
                    f"for {list(wanted)}. Does the config json belong to these weights?"
                )
    gain = np.float32(np.sqrt((config.n_embd - 1) / config.n_embd))

    def tensor(name, shape):
        arrays = [names[place].read() for place in places[name]]
        value = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        value = value.T if form == "uer" and len(shape) == 3 else value
        value = value * gain if exact and name.endswith("/g") else value
        if not np.isfinite(value).all():
            raise UserError(
                f"{file}: {_few(places[name])} has values that are not finite; the training that "
                "wrote it diverged, or the file is damaged"
            )
        return np.ascontiguousarray(value).reshape(shape)

    return tensor


def _few(names):
    """The first three of some names, in words."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

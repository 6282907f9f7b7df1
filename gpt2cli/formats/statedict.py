"""The tensors of Hugging Face and UER-py files under our names.

A state dict is a table of names and tensors: a .safetensors file, a .bin written by torch.save, or
several of either with an index. Its config.json must describe a network like ours.
"""

import dataclasses
import functools
import importlib
import json
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.model.network import weight_shapes
from gpt2cli.model.sizes import LN_EPSILON, ModelConfig

# Returns a weight, given our name and its shape, as a float32 array.
ReadWeight = Callable[[str, tuple[int, ...]], np.ndarray]

INDEX = ".index.json"  # has the files of a split model: weight_map, tensor name -> file name
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order transformers tries them
STATE = re.compile(r"\.(safetensors|bin|pt|pth)(-\d+)?$")  # UER-py adds the step: model.bin-1000

# Our name of each size -> its names in a config.json; the first is the one we write.
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
# Fields of a config.json that change the network -> the values our network supports; "4 * width"
# stands for that number. A missing field is taken to be right; most would show in the weights.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
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

LAYERS = {"hf": "h.", "uer": "encoder.transformer."}  # prefix of a layer's number
# Our name of a weight, without its layer -> the tensors of UER-py that it consists of.
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
# UER-py divides by the sample deviation of a row plus 1e-6. With scaled gains and almost nothing
# added to the variance, OpenAI's formula gives the same result up to rounding.
UER_LN_EPSILON = 1e-12
# Older versions of transformers save the causal mask and its -1e4 beside the weights.
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
LEAVES = {"g": "weight", "w": "weight", "b": "bias"}  # the first PyTorch ports kept ours


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape, and how to read it as a float32 array."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def find(folder: Path) -> Path | None:
    """Return the file of weights (or the index of several) in a folder; UserError if unclear."""
    for name in HF_WEIGHTS:
        for path in (folder / name, folder / (name + INDEX)):
            if path.is_file():
                return path
    others = [path for path in sorted(folder.iterdir()) if STATE.search(path.name)]
    if len(others) > 1:
        names = ", ".join(p.name for p in others[:4])
        raise UserError(f"{folder} contains {names}: name one file instead of the folder")
    return others[0] if others else None


def read(file: Path) -> dict[str, Stored]:
    """Return the tensors of a file of weights, or of all files that an index lists, by name.

    Raises:
        UserError: a file is damaged or missing, or contains more than tensors.
    """
    if not file.name.endswith(INDEX):
        return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    placed = files.read_object(file).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(n, str) for n in placed.values()):
        raise UserError(f"{file} has no weight_map of names and files. Copy or fetch it again")
    stored: dict[str, Stored] = {}
    for name in sorted(set(placed.values())):
        part = file.with_name(name) if name and Path(name).name == name else None
        if part is None or not part.is_file() or name.endswith(INDEX):
            raise UserError(f"{file} lists {name}, which is not beside it. Copy or fetch it again")
        stored |= read(part)
    missing = [name for name in placed if name not in stored]
    if missing:
        raise UserError(
            f"{placed[missing[0]]} lacks {_few(missing)}, which {file} lists. Copy or fetch both "
            "again"
        )
    return stored


def _read_safetensors(file: Path) -> dict[str, Stored]:
    """Return the tensors of a .safetensors file, widened to float32."""
    import ml_dtypes  # noqa: F401  (comes with TensorFlow; adds bfloat16 to NumPy)

    try:
        handle = safetensors.safe_open(file, "np")
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short ({error}). Fetch it again") from None

    def tensor(name: str) -> np.ndarray:
        kind = parts[name].get_dtype()
        if kind not in ("F16", "BF16", "F32", "F64"):
            raise UserError(f"{file}: {name} is {kind}, but weights must be floating-point")
        return handle.get_tensor(name).astype(np.float32, copy=False)

    return {
        name: Stored(file, tuple(part.get_shape()), functools.partial(tensor, name))
        for name, part in parts.items()
    }


def torch() -> ModuleType:
    """Return PyTorch, which only .bin files need; UserError where it is missing or unsafe."""
    try:
        found = importlib.import_module("torch")
    except ImportError:
        raise UserError(
            "PyTorch reads the weights in a .bin, and it is not installed. Install it with: "
            'bin/install torch (or pip install ".[torch]"), or get the model as .safetensors'
        ) from None
    if tuple(map(int, found.__version__.split(".")[:2])) < (2, 6):
        raise UserError(  # CVE-2025-32434
            f"PyTorch {found.__version__} may run code in a .bin even with weights_only. "
            "Update it with: pip install -U torch, or get the model as .safetensors"
        )
    return found


def _read_torch(file: Path) -> dict[str, Stored]:
    """Return the tensors of a state dict written by torch.save; nothing else is unpickled."""
    load = functools.partial(torch().load, file, weights_only=True, map_location="cpu")
    try:
        try:
            state = load(mmap=True)
        except RuntimeError:  # before PyTorch 1.6 the file was not a zip, and cannot be mapped
            state = load()
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} contains more than tensors, or is not a PyTorch file. Anything else in it "
            "could be a program, so it is never loaded: save the state dict alone"
        ) from None
    except (RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{file} is damaged or not a PyTorch file ({reason})") from None
    if not isinstance(state, dict) or not all(hasattr(v, "shape") for v in state.values()):
        raise UserError(f"{file} is not a state dict: it must contain named tensors alone")

    def tensor(name: str) -> np.ndarray:
        if not state[name].is_floating_point():
            raise UserError(f"{file}: {name} is {state[name].dtype}, not floating-point")
        return state[name].detach().float().numpy()

    return {
        name: Stored(file, tuple(value.shape), functools.partial(tensor, name))
        for name, value in state.items()
    }


def format_of(stored: Iterable[str]) -> str:
    """Return the format, hf or uer, that uses these names of tensors."""
    return "uer" if any(name.startswith("embedding.word") for name in stored) else "hf"


def open_weights(
    file: Path,
    stored: dict[str, Stored],
    format: str,
    config_path: Path | None = None,
    n_head: int | None = None,
    as_published: bool = False,
) -> tuple[ModelConfig, ReadWeight]:
    """Return the sizes of a state dict, and the function that reads one of our weights from it.

    Args:
        file: the file that `read` was given.
        stored: its tensors, from `read`.
        format: hf or uer.
        config_path: JSON file with the sizes (default: the config.json beside `file`).
        n_head: number of attention heads, where no JSON file gives it.
        as_published: keep UER-py's gains and epsilon 1e-5 instead of converting exactly.

    Raises:
        UserError: a field, name or shape does not fit our network.
    """
    where = config_path or file.parent / "config.json"
    values = files.read_object(where) if config_path or where.is_file() else {}
    if format == "uer":
        names = {UER_OLD.get(name, name): value for name, value in stored.items()}
    else:
        names = {_hf_name_of(name): value for name, value in stored.items()}
        names = {name: value for name, value in names.items() if not BUFFER.fullmatch(name)}
    config = _config_of(names, format, values, where, n_head)
    exact = format == "uer" and not as_published
    if exact:
        config = dataclasses.replace(config, ln_epsilon=UER_LN_EPSILON)
    head = names.pop("target.lm.output_layer.weight" if format == "uer" else "lm_head.weight", None)
    _check_names_and_shapes(names, config, format, file)
    tensor = _reader(names, config, format, file, exact)
    if head is not None:
        table = tensor("model/wte", (config.n_vocab, config.n_embd))
        if head.shape != table.shape or not np.array_equal(head.read(), table):
            raise UserError(
                f"{file}: the output matrix (lm_head, output_layer) differs from the token "
                "embedding; GPT-2 uses one table for both, so this is another kind of model"
            )
    return config, tensor


def _hf_name_of(name: str) -> str:
    """Return a name without `transformer.` and with the last part that is used today."""
    stem, _, leaf = name.removeprefix("transformer.").rpartition(".")
    return f"{stem}.{LEAVES.get(leaf, leaf)}"


def check_hf_config(path: Path) -> None:
    """Reject (UserError) a config.json that does not fit our network; no weights are needed."""
    _check_fixed(files.read_object(path), "hf", path, width=None)


def _check_fixed(values: dict[str, Any], format: str, where: Path, width: int | None) -> None:
    """Reject (UserError) a value that is not in FIXED; without `width`, skip those that need it."""
    for name, allowed in FIXED[format].items():
        if name not in values or (width is None and "4 * width" in allowed):
            continue
        supported = [4 * (width or 0) if value == "4 * width" else value for value in allowed]
        if not any(type(values[name]) is type(a) and values[name] == a for a in supported):
            raise UserError(
                f"{where}: {name} is {json.dumps(values[name])}, but gpt2cli supports only "
                f"{' or '.join(json.dumps(a) for a in supported)}: it is another kind of model"
            )


def _config_of(
    names: dict[str, Stored], format: str, values: dict[str, Any], where: Path, n_head: int | None
) -> ModelConfig:
    """Return the sizes by the weights' shapes; config.json must agree with them and adds n_head."""
    _check_fixed(values, format, where, width=None)  # a better message than a missing weight
    sizes = _sizes_of(names, format, where)
    _check_fixed(values, format, where, sizes["n_embd"])
    for ours, theirs in SIZE_FIELDS[format].items():
        for name in theirs:
            if name in values and ours in sizes and values[name] != sizes[ours]:
                raise UserError(
                    f"{where}: {name} is {values[name]!r}, but the weights have {sizes[ours]}. "
                    "Use the config.json that belongs to them"
                )
    stated = [values[name] for name in SIZE_FIELDS[format]["n_head"] if name in values]
    if not stated and n_head is None:
        known = f"{where} has no {SIZE_FIELDS[format]['n_head'][0]}" if values else f"no {where}"
        raise UserError(
            f"the number of attention heads cannot be read from the weights, and there is {known}: "
            "give --config FILE or --n_head NUMBER"
        )
    epsilon = values.get("layer_norm_epsilon", LN_EPSILON) if format == "hf" else LN_EPSILON
    epsilon = float(epsilon) if type(epsilon) is int else epsilon
    sizes["n_head"] = stated[0] if stated else n_head
    try:
        return ModelConfig(**sizes, ln_epsilon=epsilon)
    except UserError as error:
        reason = str(error).removeprefix("hparams: ").replace("ln_epsilon", "layer_norm_epsilon")
        raise UserError(f"{where if values else '--n_head'}: {reason}") from None


def _sizes_of(names: dict[str, Stored], format: str, where: Path) -> dict[str, Any]:
    """Return all sizes but n_head by the shapes of the weights."""
    (table,), (positions,) = places_of("model/wte", format), places_of("model/wpe", format)
    lacking = [name for name in (table, positions) if name not in names]
    if lacking:
        raise UserError(
            f"{where.parent}: the weights lack {_few(lacking)}, so they are not a GPT-2's "
            f"({len(names)} tensors: {_few(names)})"
        )
    for name in (table, positions):
        if len(names[name].shape) != 2:
            raise UserError(f"{names[name].file}: {name} is {list(names[name].shape)}, not 2-D")
    layer = re.compile(re.escape(LAYERS[format]) + r"(\d+)\.")
    layers = {int(found[1]) for name in names if (found := layer.match(name))}
    n_vocab, n_embd = names[table].shape
    return {
        "n_vocab": n_vocab,
        "n_ctx": names[positions].shape[0],
        "n_embd": n_embd,
        "n_layer": max(layers, default=-1) + 1,
    }


def places_of(name: str, format: str) -> tuple[str, ...]:
    """Return the tensors in a state dict of format hf or uer that our weight `name` consists of.

    There are several where UER-py has separate matrices for query, key and value.
    """
    match = re.fullmatch(r"model/(?:h(\d+)/)?(.+)", name)
    assert match is not None, name
    layer, part = match.groups()
    if format == "uer":
        found = UER_PLACES[part]
    else:
        stem, leaf = part.rsplit("/", 1) if "/" in part else (part, "w")
        found = (f"{stem.replace('/', '.')}.{LEAVES[leaf]}",)
    return found if layer is None else tuple(f"{LAYERS[format]}{layer}.{n}" for n in found)


def _check_names_and_shapes(
    names: dict[str, Stored], config: ModelConfig, format: str, file: Path
) -> None:
    """Reject (UserError) a state dict whose tensors are not those of a model of these sizes.

    Matrices are [in, out] at OpenAI (with an axis of 1 before) and Hugging Face, but [out, in] in
    UER-py, as in PyTorch's Linear.
    """
    shapes = weight_shapes(config)
    places = {name: places_of(name, format) for name in shapes}
    expected = {place for found in places.values() for place in found}
    missing = [name for name in expected if name not in names]
    extra = [name for name in names if name not in expected]
    if missing:
        raise UserError(f"{file} lacks {_few(missing)}, so the model is incomplete")
    if extra:
        raise UserError(f"{file} has {_few(extra)}, unlike GPT-2: it is another kind of model")
    for name, shape in shapes.items():
        if len(shape) == 3:
            shape = shape[:0:-1] if format == "uer" else shape[1:]
        wanted = (shape[0] // len(places[name]), *shape[1:])
        for place in places[name]:
            if names[place].shape != wanted:
                raise UserError(
                    f"{names[place].file}: {place} is {list(names[place].shape)}, but the sizes "
                    f"require {list(wanted)}. Does the config.json belong to these weights?"
                )


def _reader(
    names: dict[str, Stored], config: ModelConfig, format: str, file: Path, exact: bool
) -> ReadWeight:
    """Return the function that reads one of our weights; `exact` scales UER-py's gains."""
    gain = np.float32(np.sqrt((config.n_embd - 1) / config.n_embd))

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        places = places_of(name, format)
        arrays = [names[place].read() for place in places]
        value = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        value = value.T if format == "uer" and len(shape) == 3 else value
        value = value * gain if exact and name.endswith("/g") else value
        if not np.isfinite(value).all():
            raise UserError(
                f"{file}: {_few(places)} has values that are not finite: training diverged, or "
                "the file is damaged"
            )
        return np.ascontiguousarray(value).reshape(shape)

    return tensor


def _few(names: Iterable[str]) -> str:
    """Return the first three of some names."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

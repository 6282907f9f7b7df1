"""State dicts of Hugging Face, nanoGPT and UER-py under our names.

A state dict is a table of names and tensors, from `tensors.read`. Its names, wrapped or not, and
its config.json must describe a network like ours.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.formats import settings
from gpt2cli.formats.settings import SIZE_FIELDS
from gpt2cli.formats.tensors import StateDict, Stored, few
from gpt2cli.model.network import weight_shapes
from gpt2cli.model.sizes import ACTIVATIONS, LN_EPSILON, ModelConfig

# Returns a weight, given our name and its shape, as a float32 array.
ReadWeight = Callable[[str, tuple[int, ...]], np.ndarray]

LAYERS = {"hf": "h.", "nanogpt": "h.", "uer": "encoder.transformer."}  # prefix of a layer's number
TRANSPOSED = ("nanogpt", "uer")  # have the matrices of PyTorch's Linear, [out, in]
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
# Older versions of transformers and nanoGPT save the causal mask and its -1e4 beside the weights.
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
# What torch.compile, DataParallel, FSDP and checkpointing put before or into a weight's name.
WRAPPER = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
HEADS = {
    "hf": "lm_head.weight",
    "nanogpt": "lm_head.weight",
    "uer": "target.lm.output_layer.weight",
}
HEAD_OLD = {"lm_head.decoder.weight": "lm_head.weight"}  # microsoft/DialoGPT
# Heads beside the language model's: of trl and trlx, which score a text, and of transformers'
# GPT2DoubleHeadsModel. The logits do not need them.
OTHER_HEAD = re.compile(r"(v_head|value_head|multiple_choice_head)\.")
# Tensors that mean another kind of model -> what it is.
OTHER_KINDS = {
    r"(score|classifier|qa_outputs)\.": "a classifier, whose weights no longer predict text well",
    r".*\.(lora_[AB]|lora_embedding_[AB]|base_layer)\b": (
        "a model with a LoRA adapter that is not merged. Merge it in PEFT with merge_and_unload() "
        "and save_pretrained()"
    ),
    r".*\.(qweight|qzeros|g_idx|absmax|quant_map|SCB|weight_format|weight_packed|weight_scale)$": (
        f"a quantized model. {settings.FULL}"
    ),
}
LEAVES = {"g": "weight", "w": "weight", "b": "bias"}  # the first PyTorch ports kept ours


class Opened(NamedTuple):
    """A state dict that fits our network.

    Attributes:
        config: the sizes.
        tensor: reads one of our weights.
        notes: sentences for the user.
    """

    config: ModelConfig
    tensor: ReadWeight
    notes: list[str]


def format_of(weights: StateDict) -> str:
    """Return the format, hf, nanogpt or uer, that uses these names and shapes."""
    names = _ours(weights, "hf", [])
    if any(WRAPPER.sub("", name).startswith("embedding.word") for name in weights.tensors):
        return "uer"
    shape = names["h.0.attn.c_attn.weight"].shape if "h.0.attn.c_attn.weight" in names else ()
    return "nanogpt" if len(shape) == 2 and shape[0] == 3 * shape[1] else "hf"


def _ours(weights: StateDict, format: str, notes: list[str]) -> dict[str, Stored]:
    """Return the tensors without what programs put before their names; add to the notes.

    Names begin at the table of positions: whatever stands before it also stands before the layers,
    and before the output matrix, but for `transformer.`. Programs that save a shared tensor once
    may have the token table only as the output matrix (accelerate, safetensors' save_model).

    Raises:
        UserError: two tensors get the same name.
    """
    plain = {name: WRAPPER.sub("", name) for name in weights.tensors}
    if format == "uer":
        plain = {name: UER_OLD.get(new, new) for name, new in plain.items()}
    else:
        plain = {name: _with_usual_leaf(new) for name, new in plain.items()}
        table = next((n for n in plain.values() if re.search(r"(^|\.)wpe\.weight$", n)), "")
        inner = table.removesuffix("wpe.weight")
        outer = inner.removesuffix("transformer.")
        for name, new in plain.items():
            new = new.removeprefix(inner if new.startswith(inner) else outer)
            plain[name] = HEAD_OLD.get(new, new)
        plain = {name: new for name, new in plain.items() if not BUFFER.fullmatch(new)}
        if "wte.weight" not in plain.values():
            plain = {n: "wte.weight" if new == HEADS["hf"] else new for n, new in plain.items()}
        heads = [name for name, new in plain.items() if OTHER_HEAD.match(new)]
        if heads:
            notes.append(f"ignored {few(heads)}: a head that scores texts, not the language model")
        plain = {name: new for name, new in plain.items() if not OTHER_HEAD.match(new)}
    found: dict[str, str] = {}
    for name, new in plain.items():
        if new in found:
            raise UserError(f"{weights.file} has both {found[new]} and {name}: two models in one")
        found[new] = name
    return {new: weights.tensors[name] for new, name in found.items()}


def _with_usual_leaf(name: str) -> str:
    """Return a name with the last part that is used today."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{LEAVES.get(leaf, leaf)}" if stem else name


def open_weights(
    weights: StateDict,
    config_path: Path | None = None,
    n_head: int | None = None,
    as_published: bool = False,
    activation: str | None = None,
) -> Opened:
    """Return the sizes of a state dict, and the function that reads one of our weights from it.

    Args:
        weights: from `tensors.read`.
        config_path: JSON file with the sizes (default: the config.json beside the weights).
        n_head: number of attention heads, where nothing else gives it.
        as_published: keep UER-py's gains and epsilon 1e-5 instead of converting exactly.
        activation: one of sizes.ACTIVATIONS, where nothing else gives it.

    Raises:
        UserError: a field, name or shape does not fit our network.
    """
    format, file, notes = format_of(weights), weights.file, list(weights.notes)
    where = config_path or file.parent / "config.json"
    has_json = bool(config_path) or where.is_file()
    values = {**weights.settings, **(files.read_object(where) if has_json else {})}
    where = where if has_json or not weights.settings else file
    fields = "uer" if format == "uer" else "hf"
    settings.check(values, fields, where)  # a better message than a missing weight
    names = _ours(weights, format, notes)
    config = _config_of(names, format, values, where, n_head)
    chosen = settings.activation_of(values, fields, where)
    if activation and chosen not in (None, activation):
        raise UserError(f"--activation {activation} contradicts {chosen} of {where}. Leave it out")
    if format == "nanogpt" and not (chosen or activation):
        chosen = "gelu"
        notes.append(
            f"{file.name} does not say which activation function it was trained with: taken as "
            "gelu, nanoGPT's since June 2023. For an older one, or minGPT: --activation gelu_new"
        )
    elif not (values or activation):
        notes.append(f"no file names the activation function: taken as {ACTIVATIONS[0]}")
    exact = format == "uer" and not as_published
    config = dataclasses.replace(
        config,
        activation=chosen or activation or ACTIVATIONS[0],
        ln_epsilon=UER_LN_EPSILON if exact else config.ln_epsilon,
    )
    notes += settings.notes(values, fields, config.n_ctx)
    head = names.pop(HEADS[format], None)
    if head is None and values.get("tie_word_embeddings", True) is not True:
        raise UserError(
            f"{where}: tie_word_embeddings is false, but {file} has no {HEADS[format]}: the model "
            "is incomplete"
        )
    if not any(name.endswith(".bias") for name in names) and format == "nanogpt":
        names |= _zero_biases(config, file)
    _check_names_and_shapes(names, config, format, file)
    tensor = _reader(names, config, format, file, exact)
    scale = settings.query_scale(
        {**values, "n_layer": config.n_layer}, config.n_embd // config.n_head
    )
    if scale is not None:
        tensor = _with_scaled_queries(tensor, config, scale)
        notes.append(
            "its attention is scaled in another way (scale_attn_weights, "
            "scale_attn_by_inverse_layer_idx): the weights of the queries were scaled instead, "
            "with the same result"
        )
    if head is not None:
        _check_head(head, tensor("model/wte", (config.n_vocab, config.n_embd)), file)
    return Opened(config, tensor, notes)


def _check_head(head: Stored, table: np.ndarray, file: Path) -> None:
    """Reject (UserError) an output matrix that is not the token table."""
    if head.shape != table.shape or not np.array_equal(head.read(), table):
        raise UserError(
            f"{file}: the output matrix (lm_head, output_layer) differs from the token "
            "embedding; GPT-2 uses one table for both, so this is another kind of model"
        )


def _zero_biases(config: ModelConfig, file: Path) -> dict[str, Stored]:
    """Return zeros for all biases: nanoGPT's `bias=False` leaves them out."""
    return {
        place: Stored(file, shape, lambda shape=shape: np.zeros(shape, np.float32))  # type: ignore
        for name, shape in weight_shapes(config).items()
        if name.endswith("/b")
        for place in places_of(name, "nanogpt")
    }


def _with_scaled_queries(tensor: ReadWeight, config: ModelConfig, scale: list[float]) -> ReadWeight:
    """Return the same function, with each layer's queries scaled."""

    def scaled(name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = tensor(name, shape)
        found = re.fullmatch(r"model/h(\d+)/attn/c_attn/[wb]", name)
        if found:
            value = value.copy()
            value[..., : config.n_embd] *= np.float32(scale[int(found[1])])
        return value

    return scaled


def _config_of(
    names: dict[str, Stored], format: str, values: dict[str, Any], where: Path, n_head: int | None
) -> ModelConfig:
    """Return the sizes by the weights' shapes; config.json must agree with them and adds n_head."""
    sizes = _sizes_of(names, format, where)
    fields = SIZE_FIELDS["uer" if format == "uer" else "hf"]
    inner = sizes["n_inner"] or 4 * sizes["n_embd"]
    for ours, theirs in fields.items():
        for name in theirs:
            real = inner if ours == "n_inner" else sizes.get(ours)
            usual = ours == "n_inner" and values.get(name) is None and inner == 4 * sizes["n_embd"]
            if name in values and real is not None and values[name] != real and not usual:
                raise UserError(
                    f"{where}: {name} is {values[name]!r:.50}, but the weights have {real}. "
                    "Use the config.json that belongs to them"
                )
    stated = [values[name] for name in fields["n_head"] if name in values]
    if not stated and n_head is None:
        known = f"{where} has no {fields['n_head'][0]}" if values else f"no {where}"
        raise UserError(
            f"the number of attention heads cannot be read from the weights, and there is {known}: "
            "give --config FILE or --n_head NUMBER"
        )
    epsilon = LN_EPSILON if format == "uer" else values.get("layer_norm_epsilon", LN_EPSILON)
    epsilon = 0.0 if type(epsilon) is int and epsilon == 0 else epsilon
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
            f"{where.parent}: the weights lack {few(lacking)}, so they are not a GPT-2's "
            f"({len(names)} tensors: {few(names)})"
        )
    for name in (table, positions):
        if len(names[name].shape) != 2:
            raise UserError(f"{names[name].file}: {name} is {list(names[name].shape)}, not 2-D")
    layer = re.compile(re.escape(LAYERS[format]) + r"(\d+)\.")
    layers = {int(found[1]) for name in names if (found := layer.match(name))}
    n_vocab, n_embd = names[table].shape
    (matrix, *_) = places_of("model/h0/mlp/c_fc/w", format)
    wide = names[matrix].shape if matrix in names else ()
    wide = wide[::-1] if format in TRANSPOSED else wide  # [n_embd, n_inner]
    n_inner = wide[1] if len(wide) == 2 and wide[0] == n_embd else 4 * n_embd
    return {
        "n_vocab": n_vocab,
        "n_ctx": names[positions].shape[0],
        "n_embd": n_embd,
        "n_layer": max(layers, default=-1) + 1,
        "n_inner": None if n_inner == 4 * n_embd else n_inner,
    }


def places_of(name: str, format: str) -> tuple[str, ...]:
    """Return the tensors in a state dict of a format that our weight `name` consists of.

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
    the TRANSPOSED formats.
    """
    shapes = weight_shapes(config)
    places = {name: places_of(name, format) for name in shapes}
    expected = {place for found in places.values() for place in found}
    missing = [name for name in expected if name not in names]
    extra = [name for name in names if name not in expected]
    for pattern, kind in OTHER_KINDS.items():
        found = [name for name in extra if re.match(pattern, name)]
        if found:
            raise UserError(f"{file} has {few(found)}, unlike GPT-2: it is {kind}")
    if missing:
        raise UserError(f"{file} lacks {few(missing)}, so the model is incomplete")
    if extra:
        raise UserError(f"{file} has {few(extra)}, unlike GPT-2: it is another kind of model")
    for name, shape in shapes.items():
        if len(shape) == 3:
            shape = shape[:0:-1] if format in TRANSPOSED else shape[1:]
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
        value = value.T if format in TRANSPOSED and len(shape) == 3 else value
        value = value * gain if exact and name.endswith("/g") else value
        if not np.isfinite(value).all():
            raise UserError(
                f"{file}: {few(places)} has values that are not finite: training diverged, or "
                "the file is damaged"
            )
        return np.ascontiguousarray(value).reshape(shape)

    return tensor

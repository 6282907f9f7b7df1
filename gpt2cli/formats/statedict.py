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
from gpt2cli.formats.names import (
    HEADS,
    LAYERS,
    OTHER_KINDS,
    TRANSPOSED,
    format_of,
    places_of,
    unwrapped,
)
from gpt2cli.formats.settings import SIZE_FIELDS
from gpt2cli.formats.tensors import StateDict, Stored, few
from gpt2cli.model.sizes import ACTIVATIONS, LN_EPSILON, ModelConfig
from gpt2cli.model.weights import weight_shapes

# Returns a weight, given our name and its shape, as a float32 array.
ReadWeight = Callable[[str, tuple[int, ...]], np.ndarray]

# UER-py divides by the sample deviation of a row plus 1e-6. With scaled gains and almost nothing
# added to the variance, OpenAI's formula gives the same result up to rounding.
UER_LN_EPSILON = 1e-12


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
    fields = "uer" if format == "uer" else "hf"
    where = config_path or file.parent / "config.json"
    has_json = bool(config_path) or where.is_file()
    values = {**weights.settings, **(files.read_object(where) if has_json else {})}
    where = where if has_json or not weights.settings else file
    settings.check(values, fields, where)  # a better message than a missing weight
    names = unwrapped(weights, format, notes)
    config = _config_of(names, format, values, where, n_head)
    named = settings.activation_of(values, fields, where)
    if activation and named not in (None, activation):
        raise UserError(f"--activation {activation} contradicts {named} of {where}. Leave it out")
    exact = format == "uer" and not as_published
    config = dataclasses.replace(
        config,
        activation=named or activation or _usual_activation(format, file, bool(values), notes),
        ln_epsilon=UER_LN_EPSILON if exact else config.ln_epsilon,
    )
    notes += settings.notes(values, fields, config.n_ctx)
    head = names.pop(HEADS[format], None)
    if head is None and values.get("tie_word_embeddings", True) is not True:
        raise UserError(
            f"{where}: tie_word_embeddings is false, but {file} has no {HEADS[format]}: the "
            "model is incomplete"
        )
    if not any(name.endswith(".bias") for name in names) and format == "nanogpt":
        names |= _zero_biases(config, file)
    _check_names_and_shapes(names, config, format, file)
    tensor = _with_our_scale(_reader(names, config, format, file, exact), config, values, notes)
    if head is not None:
        _check_head(head, tensor("model/wte", (config.n_vocab, config.n_embd)), file)
    return Opened(config, tensor, notes)


def _usual_activation(format: str, file: Path, has_settings: bool, notes: list[str]) -> str:
    """Return the activation function of a model that does not name it; add to the notes."""
    if format == "nanogpt":
        notes.append(
            f"{file.name} does not name the activation function: assuming gelu, as in nanoGPT "
            "since June 2023. For an older checkpoint, or minGPT, use --activation gelu_new"
        )
        return "gelu"
    if not has_settings:
        notes.append(f"no file names the activation function: assuming {ACTIVATIONS[0]}")
    return ACTIVATIONS[0]


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


def _with_our_scale(
    tensor: ReadWeight, config: ModelConfig, values: dict[str, Any], notes: list[str]
) -> ReadWeight:
    """Return `tensor` with the queries scaled for our attention; add to the notes."""
    head = config.n_embd // config.n_head
    scale = settings.query_scale({**values, "n_layer": config.n_layer}, head)
    if scale is None:
        return tensor
    notes.append(
        "its attention uses another scale (scale_attn_weights, scale_attn_by_inverse_layer_idx): "
        "the weights of the queries were scaled instead, with the same result"
    )

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
        known = f"{where} has no {fields['n_head'][0]}" if values else f"there is no {where}"
        raise UserError(
            f"the number of attention heads cannot be read from the weights, and {known}: "
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
    # a longer number is not a layer's: _check_names_and_shapes rejects the name
    layer = re.compile(re.escape(LAYERS[format]) + r"([0-9]{1,4})\.")
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

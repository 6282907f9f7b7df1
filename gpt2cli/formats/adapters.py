"""LoRA adapters of PEFT (arXiv 2106.09685): recognized, and merged into their base.

An adapter's folder has adapter_config.json and adapter_model.safetensors or .bin. A matrix W
[in, out] of the base becomes W + s (B A)^T, with A [r, in], B [out, r], s = alpha / r.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2cli import counts, files
from gpt2cli.errors import UserError
from gpt2cli.formats import tensors
from gpt2cli.formats.statedict import ReadWeight
from gpt2cli.formats.tensors import StateDict, Stored, few

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
IN_PEFT = "Merge it in PEFT with merge_and_unload() and save_pretrained()"
ALPHA = 8  # PEFT's LoraConfig.lora_alpha, where the file has none
PLACE = re.compile(
    r"(?:.*\.)?h\.(\d+)\.((?:attn|mlp)\.c_(?:attn|proj|fc))\.lora_([AB])(?:\.\w+)?\.weight",
    re.ASCII,
)
# Fields of PEFT's LoraConfig that merging obeys, or that do not change the merged weights. Any
# other field that is set means more than two matrices for each weight.
OBEYED = """
peft_type base_model_name_or_path r lora_alpha use_rslora rank_pattern target_modules
fan_in_fan_out lora_dropout task_type inference_mode auto_mapping parent_library peft_version
revision exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size
eva_config runtime_config ensure_weight_tying
"""
# More fields, and their values that do not change the merged weights. Other values of
# init_lora_weights change the weights of the base.
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}


class Adapter(NamedTuple):
    """An adapter's folder.

    Attributes:
        folder: its path.
        base: name of the model that it was trained on, from adapter_config.json.
        values: the content of adapter_config.json.
    """

    folder: Path
    base: str
    values: dict[str, Any]

    def __str__(self) -> str:
        kind = str(self.values.get("peft_type", "PEFT")).replace("LORA", "LoRA")
        return f"a {kind:.20} adapter for {self.base} ({CONFIG})"


def find(path: Path) -> Adapter | None:
    """Return the adapter in a folder without a whole model, or of one of its files; else None."""
    folder = path if path.is_dir() else path.parent
    named = path if path.name in WEIGHTS else None
    whole = path.is_dir() and any(
        (folder / (name + end)).is_file()
        for name in tensors.HF_WEIGHTS
        for end in ("", tensors.INDEX)
    )
    if not (folder / CONFIG).is_file() or whole or not (path.is_dir() or named):
        return None
    values = files.read_object(folder / CONFIG)
    return Adapter(folder, f"{values.get('base_model_name_or_path') or 'unknown'!s:.200}", values)


def reject(adapter: Adapter) -> None:
    """Reject an adapter that has no base; the message says how to merge it.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"{adapter.folder} is not a model but {adapter}: it changes the weights of that model. "
        f"Merge it into the folder of its base: gpt2cli convert {adapter.folder} DST --base FOLDER"
    )


def merged(adapter: Adapter, base: ReadWeight, shapes: dict[str, tuple[int, ...]]) -> ReadWeight:
    """Return the function that reads the weights of the base with the adapter merged into them.

    Args:
        adapter: from `find`.
        base: reads the base's weights.
        shapes: of the base's weights, by our names.

    Raises:
        UserError: it is not a plain LoRA adapter, or does not fit the base.
    """
    _check(adapter)
    pairs = _pairs(_weights(adapter), shapes)
    values = adapter.values
    alpha = values.get("lora_alpha", ALPHA)
    by_root = values.get("use_rslora", False)
    if not counts.is_real(alpha) or type(by_root) is not bool:
        raise UserError(
            f"{adapter.folder / CONFIG}: lora_alpha must be a number and use_rslora true or false, "
            f"got {alpha!r:.50} and {by_root!r:.50}"
        )

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = base(name, shape)
        if name not in pairs:
            return value
        a, b = (pairs[name][letter].read().astype(np.float64) for letter in "AB")
        scale = alpha / (math.sqrt(len(a)) if by_root else len(a))
        added = value + (scale * (b @ a).T).reshape(shape)
        if not np.isfinite(added).all():
            raise UserError(f"{adapter.folder}: the matrices for {name} are not finite")
        return added.astype(np.float32)

    return tensor


def _check(adapter: Adapter) -> None:
    """Reject (UserError) an adapter with more than two matrices for each weight."""
    values, where = adapter.values, adapter.folder / CONFIG
    if values.get("peft_type") != "LORA":
        kind = json.dumps(values.get("peft_type"))
        raise UserError(
            f"{where}: peft_type is {kind}, but only LORA can be merged here. {IN_PEFT}"
        )
    for name, value in values.items():
        plain = value in PLAIN.get(name, ()) if isinstance(value, str | bool) else not value
        if name not in OBEYED.split() and value and not plain:
            raise UserError(
                f"{where}: {name} is {json.dumps(value):.50}, which cannot be merged here. "
                f"{IN_PEFT}"
            )


def _weights(adapter: Adapter) -> StateDict:
    path = next((p for n in WEIGHTS if (p := adapter.folder / n).is_file()), None)
    if path is None:
        raise UserError(
            f"{adapter.folder} has no {' or '.join(WEIGHTS)}. Copy or download it again"
        )
    return tensors.read(path)


def _pairs(weights: StateDict, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Stored]]:
    """Return our name of each changed weight -> its matrices A and B.

    Raises:
        UserError: another tensor, a missing one, or a wrong shape.
    """
    pairs: dict[str, dict[str, Stored]] = {}
    found = {name: PLACE.fullmatch(name) for name in weights.tensors}
    others = [name for name, match in found.items() if match is None]
    if others or not found:
        raise UserError(
            f"{weights.file} must contain only LoRA matrices of GPT-2's layers, but it has "
            f"{few(others) or 'no tensors'}. {IN_PEFT}"
        )
    for name, match in found.items():
        assert match is not None
        ours = f"model/h{match[1]}/{match[2].replace('.', '/')}/w"
        pairs.setdefault(ours, {})[match[3]] = weights.tensors[name]
    for ours, pair in pairs.items():
        if ours not in shapes or len(pair) != 2:
            raise UserError(
                f"{weights.file}: the base has no {ours}, or one of its two matrices is missing. "
                "Is --base the model that it was trained on?"
            )
        a, b = (pair[letter].shape for letter in "AB")
        n_in, n_out = shapes[ours][-2:]
        if a[1:] != (n_in,) or b != (n_out, a[0]) or not a[0]:
            raise UserError(
                f"{weights.file}: matrices {list(a)} and {list(b)} do not fit {ours} "
                f"{[n_in, n_out]}. Is --base the model that it was trained on?"
            )
    return pairs

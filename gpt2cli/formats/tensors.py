"""Files of named tensors: .safetensors, what torch.save wrote, and several of either with an index.

Nothing but tensors and plain containers is ever loaded from them.
"""

import functools
import importlib
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors

from gpt2cli import files
from gpt2cli.console import visible
from gpt2cli.errors import UserError

INDEX = ".index.json"  # of a split model; its weight_map maps tensor names to file names
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order transformers tries them
STATE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt)(-\d+)?$")  # UER-py adds the step: .bin-1000
# Where a program saves more than the weights, the key that they are under: nanoGPT's train.py,
# PyTorch's tutorials and Lightning, DeepSpeed.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
# nanoGPT's name of a size in `model_args` -> its name in a config.json
NANOGPT_ARGS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
NANOGPT_OTHERS = ("bias", "dropout")  # the weights show it; only for training


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape, and how to read it as a float32 array."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class StateDict:
    """The tensors of a model, from one file or several.

    Attributes:
        file: the file, or the index of several.
        tensors: name -> tensor.
        settings: sizes from the file itself, by their names in a config.json.
        notes: sentences for the user about the file.
    """

    file: Path
    tensors: dict[str, Stored]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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


def read(file: Path) -> StateDict:
    """Return the tensors of a file of weights, or of all files that an index lists.

    Raises:
        UserError: a file is damaged or missing, or contains more than tensors and plain values.
    """
    if not file.name.endswith(INDEX):
        if file.suffix == ".safetensors":
            return StateDict(file, _read_safetensors(file))
        return _read_torch(file)
    placed = files.read_object(file).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(n, str) for n in placed.values()):
        raise UserError(f"{file} has no weight_map of names and files. Download it again")
    stored: dict[str, Stored] = {}
    for name in sorted(set(placed.values())):
        part = file.with_name(name) if name and Path(name).name == name else None
        # os.path.isfile, unlike Path.is_file, is False for impossible names
        if part is None or not os.path.isfile(part) or name.endswith(INDEX):
            raise UserError(
                f"{file} lists {visible(name):.80}, which is not beside it. Download it again"
            )
        stored |= read(part).tensors
    missing = [name for name in placed if name not in stored]
    if missing:
        raise UserError(
            f"{placed[missing[0]]} lacks {few(missing)}, which {file} lists. Download both again"
        )
    return StateDict(file, stored)


def _read_safetensors(file: Path) -> dict[str, Stored]:
    """Return the tensors of a .safetensors file, widened to float32."""
    import ml_dtypes  # noqa: F401  (comes with TensorFlow; adds bfloat16 to NumPy)

    try:
        handle = safetensors.safe_open(file, "np")
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or incomplete ({error}). Download it again") from None

    def tensor(name: str) -> np.ndarray:
        kind = parts[name].get_dtype()
        if kind not in ("F16", "BF16", "F32", "F64"):
            raise UserError(f"{file}: {name} is {kind}, but weights must be F16, BF16, F32 or F64")
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
            "weights in a .bin or .pt need PyTorch, which is not installed. Install it with: "
            'bin/install torch (or pip install ".[torch]"), or get the model as .safetensors'
        ) from None
    if tuple(map(int, found.__version__.split(".")[:2])) < (2, 6):
        raise UserError(  # CVE-2025-32434
            f"PyTorch {found.__version__} may run code from a .bin even with weights_only. "
            "Update it with: pip install -U torch, or get the model as .safetensors"
        )
    return found


def _read_torch(file: Path) -> StateDict:
    """Return the tensors of a state dict written by torch.save; nothing else is unpickled."""
    load = functools.partial(torch().load, file, weights_only=True, map_location="cpu")
    try:
        try:
            state = load(mmap=True)
        except RuntimeError:  # before PyTorch 1.6 the file was not a zip, and cannot be mapped
            state = load()
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} contains more than tensors, or is not a PyTorch file. Other objects could run "
            "code, so they are never loaded: save the state dict alone"
        ) from None
    except (RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{file} is damaged or not a PyTorch file ({reason}). Get it again"
        ) from None
    state, settings, notes = _unwrapped(state, file)
    size = file.stat().st_size
    for name, value in state.items():
        is_whole = str(value.layout) == "torch.strided" and value.device.type == "cpu"
        if not is_whole or value.numel() * value.element_size() > size:
            raise UserError(
                f"{file}: {few([name])} is a view, sparse or without values, not a plain tensor of "
                "this file. Call contiguous() on it and save the state dict again"
            )

    def tensor(name: str) -> np.ndarray:
        if not state[name].is_floating_point():
            raise UserError(
                f"{file}: {name} is {state[name].dtype}, but weights must be floating-point"
            )
        return state[name].detach().float().numpy()

    stored = {
        name: Stored(file, tuple(value.shape), functools.partial(tensor, name))
        for name, value in state.items()
    }
    return StateDict(file, stored, settings, tuple(notes))


def _unwrapped(loaded: Any, file: Path) -> tuple[Mapping[str, Any], dict[str, Any], list[str]]:
    """Return the state dict inside a saved file, its settings, and notes about the rest."""
    settings: dict[str, Any] = {}
    notes = []
    state = loaded
    while isinstance(state, Mapping) and not _is_state_dict(state):
        key = next((k for k in WRAPPERS if isinstance(state.get(k), Mapping)), None)
        if key is None:
            break
        skipped = [str(k) for k in state if k not in (key, "model_args")]
        if skipped:
            notes.append(f"only {key} of the training checkpoint is read; ignored {few(skipped)}")
        arguments = state.get("model_args")
        if isinstance(arguments, Mapping):
            settings = {t: arguments[n] for n, t in NANOGPT_ARGS.items() if n in arguments}
            others = [str(n) for n in arguments if n not in (*NANOGPT_ARGS, *NANOGPT_OTHERS)]
            if others:
                notes.append(f"ignored {few(others)} of model_args, which nanoGPT does not have")
        state = state[key]
    if not isinstance(state, Mapping) or not _is_state_dict(state):
        raise UserError(f"{file} is not a state dict: save named tensors alone")
    return state, settings, notes


def _is_state_dict(state: Mapping[Any, Any]) -> bool:
    return all(isinstance(n, str) and hasattr(v, "shape") for n, v in state.items())


def few(names: Iterable[str]) -> str:
    """Return the first three of some names, and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{visible(name):.80}" for name in names[:3]) + more

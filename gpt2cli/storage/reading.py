"""A checkpoint, read and checked without TensorFlow: weights, the optimizer's variables, the state.

The weights must be those that the sizes of their folder require, undamaged and finite.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import Values, weight_shapes
from gpt2cli.storage import folders, runs
from gpt2cli.storage.bundle import Bundle
from gpt2cli.storage.folders import ModelFolder

BLOCK = 1 << 16  # numbers that stay in a core's cache between two looks at them

# A model's weights, as opposed to an optimizer's slots and counters in the same checkpoint.
OURS = re.compile(
    r"model/(wte|wpe|ln_f/[gb]|h\d+/(ln_[12]/[gb]|(attn|mlp)/c_\w+/[wb]))"
    r"|newslm/(embeddings|layer\d+)/\w+(/(kernel|bias|gamma|beta))?"
)


@contextlib.contextmanager
def _reading(prefix: Path) -> Iterator[None]:
    """Turn the errors of `Bundle` into a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else os.strerror(error.errno or 0)
        if isinstance(error, FileNotFoundError):
            reason = f"{Path(error.filename).name} is missing"
        raise UserError(
            f"cannot read {prefix}.*: it is damaged or cut short ({reason[:200]}). Fetch it again "
            "with gpt2cli download, or use an older checkpoint of the run"
        ) from error


def open_checked(folder: ModelFolder) -> tuple[Bundle, ModelConfig]:
    """Compare a folder's checkpoint with its sizes; return the checkpoint and the sizes.

    Where GPT2_ML's JSON file gives the sizes, the weights decide n_vocab: the release has 21130
    rows for 21128 tokens.

    Raises:
        UserError: a weight is missing, unknown or of another shape, or a file is damaged.
    """
    config, described, prefix = folder.known_sizes(), folder.sizes_path, folder.checkpoint
    assert described is not None and prefix is not None
    with _reading(prefix):
        bundle = Bundle(prefix)
    found = bundle.entries
    table = found.get("newslm/embeddings/word_embed")
    if described.name != "hparams.json" and table and len(table.shape) == 2:
        config = dataclasses.replace(config, n_vocab=table.shape[0])
    expected = weight_shapes(config)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and OURS.fullmatch(name)]
    if missing:
        raise UserError(
            f"{prefix} does not belong to this model: it lacks {_few(missing)}. "
            f"Check that {described} is of the same size and kind"
        )
    if extra:
        raise UserError(
            f"{prefix} has weights that {described} does not describe: {_few(extra)}. "
            f"Use the {described.name} that belongs to it"
        )
    for name, shape in expected.items():
        entry = found[name]
        if entry.shape != shape or not entry.is_floating:
            raise UserError(
                f"{prefix}: {name} is {entry.kind} {list(entry.shape)}, but {described.name} "
                f"requires float32 {list(shape)}. Use the {described.name} of this checkpoint"
            )
    return bundle, config


def _few(names: Iterable[str]) -> str:
    """Return up to three names and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def verify(folder: Path) -> None:
    """Compare a folder's weights with its hparams.json and their checksums (UserError)."""
    config, stored = open_weights(folders.open_model(folder))
    for name, shape in weight_shapes(config).items():
        stored(name, shape)


def open_weights(folder: ModelFolder) -> tuple[ModelConfig, Values]:
    """Return the sizes of a folder's checkpoint and a function that reads a weight by name.

    The function compares the weight's checksum. Its arrays are read-only views of the file.

    Raises:
        UserError: there is no checkpoint, or it is damaged, has another size or contains numbers
            that are not finite; the text names the file. The function raises it too.
    """
    bundle, config = open_checked(folder)
    prefix = bundle.prefix
    if google_crc32c.implementation != "c":
        say(
            "the package google-crc32c has no compiled code for this Python, so checking the "
            "weights takes minutes. Try: pip install --force-reinstall google-crc32c"
        )

    def stored(name: str, shape: Any) -> np.ndarray:
        with _reading(prefix):
            value = bundle.read(name)
        if not is_finite(value):
            raise UserError(
                f"{prefix}: {name} has values that are not finite. Training diverged, or the file "
                "is damaged: use an older checkpoint"
            )
        return value

    return config, stored


def is_finite(values: np.ndarray) -> bool:
    """Report whether all numbers are finite; a NaN comes out of both minimum and maximum.

    For 124M, this takes two thirds of the time of np.isfinite(values).all(), and no memory.
    """
    flat = values.reshape(-1)
    blocks = (flat[at : at + BLOCK] for at in range(0, flat.size, BLOCK))
    with np.errstate(invalid="ignore"):  # a warning of bfloat16's
        return all(np.isfinite(b.min()) and np.isfinite(b.max()) for b in blocks)


def load_state(prefix: Path) -> dict[str, Any] | None:
    """Return the state beside a run's checkpoint, or None."""
    step = prefix.name.removeprefix("model-")
    return runs.read_state(prefix.parent, int(step)) if step.isdecimal() else None


def load_training(prefix: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Return the optimizer's tensors by name, and the state, of a run's checkpoint.

    They are {} and None for a model folder and a run of another program.
    """
    state = load_state(prefix)
    if state is None:
        return {}, None
    path = prefix.with_name(f"optimizer-{state['step']}")
    with _reading(path):
        bundle = Bundle(path)
        return {name: bundle.read(name) for name in bundle.entries}, state


def load_slots(prefix: Path, optimizer: str) -> dict[str, np.ndarray]:
    """Return AdaFactor's moments in a checkpoint of GPT2_ML by name; empty where there are none.

    Args:
        prefix: the checkpoint.
        optimizer: name of our optimizer; its variables' names start with it.
    """
    with _reading(prefix):
        bundle = Bundle(prefix)
        names = [name for name in bundle.entries if "/adafactor_v" in name]
        return {f"{optimizer}/{name.replace('/', '_')}": bundle.read(name) for name in names}

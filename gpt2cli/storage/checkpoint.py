"""Weights <-> files: TensorFlow checkpoints under the original's names, and run folders.

A model folder contains hparams.json, a vocabulary and one checkpoint. A run folder is a model
folder with one checkpoint per save, `model-<step>`, each with its training state beside it:

    model-100.index, .data-00000-of-00001      weights alone, which nshepperd's code can read
    optimizer-100.index, .data-00000-of-00001  the optimizer's variables
    state-100.json                             step, seed, ..., and checksums: see runs.py
    checkpoint, counter                        the newest save, for TensorFlow and nshepperd
"""

import contextlib
import dataclasses
import glob
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.model.network import GPT2
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import weight_shapes
from gpt2cli.storage import destinations, folders, runs
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.tensorflow import tf


@contextlib.contextmanager
def _reading(prefix: Path) -> Iterator[None]:
    """Turn TensorFlow's errors about a file into a UserError."""
    try:
        yield
    except (tf.errors.OpError, ValueError, RuntimeError, LookupError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"cannot read {prefix}.*: it is damaged or cut short ({reason}). Fetch it again with "
            "gpt2cli download, or use an older checkpoint of the run"
        ) from error


def open_checked(folder: ModelFolder) -> tuple[Any, ModelConfig]:
    """Compare a folder's checkpoint with its sizes; return a reader and the sizes.

    Where GPT2_ML's JSON file gives the sizes, the weights decide n_vocab: the release has 21130
    rows for 21128 tokens.

    Raises:
        UserError: a weight is missing, unknown or of another shape, or a file is damaged.
    """
    config, described, prefix = folder.known_sizes(), folder.sizes_path, folder.checkpoint
    assert described is not None and prefix is not None
    destinations.check_path(prefix.parent, prefix.name)
    with _reading(prefix):
        reader = tf.train.load_checkpoint(str(prefix))
        found = reader.get_variable_to_shape_map()
        kinds = reader.get_variable_to_dtype_map()
        needed = sum(kinds[name].size * np.prod(found[name], dtype=int) for name in found)
        shards = prefix.parent.glob(f"{glob.escape(prefix.name)}.data-*-of-*")
        if sum(path.stat().st_size for path in shards) < needed:
            raise ValueError(f"its data is shorter than the {needed} bytes listed in its index")
    table = "newslm/embeddings/word_embed"
    if described.name != "hparams.json" and len(found.get(table, ())) == 2:
        config = dataclasses.replace(config, n_vocab=found[table][0])
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
        if tuple(found[name]) != shape or not kinds[name].is_floating:
            raise UserError(
                f"{prefix}: {name} is {kinds[name].name} {list(found[name])}, but {described.name} "
                f"requires float32 {list(shape)}. Use the {described.name} of this checkpoint"
            )
    return reader, config


# A model's weights, as opposed to an optimizer's slots and counters in the same checkpoint.
OURS = re.compile(
    r"model/(wte|wpe|ln_f/[gb]|h\d+/(ln_[12]/[gb]|(attn|mlp)/c_\w+/[wb]))"
    r"|newslm/(embeddings|layer\d+)/\w+(/(kernel|bias|gamma|beta))?"
)


def _few(names: Iterable[str]) -> str:
    """Return up to three names and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def verify(folder: Path) -> None:
    """Compare a folder's weights with its hparams.json and their checksums (UserError).

    A checkpoint's index has the CRC-32C of every weight, which TensorFlow compares when it reads.
    """
    config, stored = open_weights(folders.open_model(folder))
    for name, shape in weight_shapes(config).items():
        stored(name, shape)


def load(
    source: str | Path | ModelFolder,
    precision: str = "float32",
    weights_precision: str | None = None,
) -> GPT2:
    """Load a network with its weights; see `folders.find_checkpoint` and `GPT2`.

    Raises:
        UserError: there is no checkpoint, or it is damaged, has another size or contains numbers
            that are not finite; the text names the file.
    """
    folder = source if isinstance(source, ModelFolder) else folders.open_model(source)
    config, stored = open_weights(folder)
    return GPT2(config, stored, precision, weights_precision)


def open_weights(folder: ModelFolder) -> tuple[ModelConfig, Callable[[str, Any], np.ndarray]]:
    """Return the sizes of a folder's checkpoint and a function that reads a weight by name.

    Raises:
        UserError: see `load`; the function raises it too.
    """
    reader, config = open_checked(folder)
    prefix = folder.checkpoint
    assert prefix is not None

    def stored(name: str, shape: Any) -> np.ndarray:
        with _reading(prefix):
            value = reader.get_tensor(name)
        if not np.isfinite(value).all():
            raise UserError(
                f"{prefix}: {name} has values that are not finite. Training diverged, or the file "
                "is damaged: use an older checkpoint"
            )
        return value

    return config, stored


def write(prefix: str | Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors by name as a checkpoint; if that fails, the old checkpoint stays.

    The files are those of tf.compat.v1.train.Saver, with one shard.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    write_all({Path(prefix): tensors})


def write_all(
    checkpoints: Mapping[Path, Mapping[str, Any]],
    sealed: Callable[[dict[str, str]], None] = lambda digests: None,
) -> None:
    """Write several checkpoints; all are on disk before the first is renamed.

    The index of an existing prefix is removed first: a shard without an index does not count.

    Args:
        checkpoints: prefix -> name -> tensor.
        sealed: function called before the renaming with file name -> SHA-256.

    Raises:
        UserError: see `write`.
    """
    # TensorFlow follows a link at this path, so the path must be hard to guess
    token = secrets.token_hex(8)
    parts = {p: p.with_name(f".{p.name}.{os.getpid()}-{token}.part") for p in checkpoints}
    digests = {}
    try:
        for prefix in checkpoints:
            prefix.parent.mkdir(parents=True, exist_ok=True)
        size = sum(_bytes_of(tensors) for tensors in checkpoints.values())
        files.check_room(prefix, size)
        for prefix, tensors in checkpoints.items():
            tf.raw_ops.SaveV2(
                prefix=str(parts[prefix]),
                tensor_names=list(tensors),
                shape_and_slices=[""] * len(tensors),
                tensors=list(tensors.values()),
            )
            for ending in runs.ENDINGS:
                with open(f"{parts[prefix]}{ending}", "rb") as file:
                    os.fsync(file.fileno())
                digests[prefix.name + ending] = files.digest(f"{parts[prefix]}{ending}")
        sealed(digests)
        for prefix in checkpoints:
            Path(f"{prefix}.index").unlink(missing_ok=True)
        for prefix, part in parts.items():
            for ending in runs.ENDINGS:
                os.replace(f"{part}{ending}", f"{prefix}{ending}")
            files.sync_folder(prefix.parent)
    except OSError as error:
        raise files.cannot_write(prefix, error) from error
    except tf.errors.OpError as error:
        reason = reason_of(error)
        numbers = {os.strerror(number): number for number in files.ADVICE}
        raise files.cannot_write(prefix, OSError(numbers.get(reason, 0), reason)) from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):  # for example, the disk has become read-only
                for left in part.parent.glob(f"{glob.escape(part.name)}*"):
                    left.unlink(missing_ok=True)


def reason_of(error: tf.errors.OpError) -> str:
    """Return the reason in TensorFlow's "{{node}} path; No space left on device [Op:SaveV2]"."""
    return re.sub(r"^.*; |\{\{.*?\}\} ?| \[Op:\w+\].*$", "", error.message.splitlines()[0])


def _bytes_of(tensors: Mapping[str, Any]) -> int:
    return sum(tf.as_dtype(t.dtype).size * math.prod(t.shape) for t in tensors.values())


def save(network: GPT2, folder: str | Path) -> None:
    """Write a model folder's hparams.json, checkpoint `model.ckpt` and SHA256SUMS."""
    folder = Path(folder)
    with files.replacing(folder / "hparams.json") as file:
        file.write(network.config.to_json().encode())
    write(folder / "model.ckpt", network.weights)
    _name_newest(folder, "model.ckpt", ["model.ckpt"])
    folders.write_sums(folder)


def save_run(
    folder: str | Path,
    network: GPT2,
    optimizer_variables: Mapping[str, Any],
    state: Mapping[str, Any],
    vocabulary: Mapping[str, bytes] | None = None,
) -> None:
    """Add the checkpoint of `state["step"]` to a run folder; the others stay.

    The folder does not change until the new files are on disk.

    Args:
        folder: the run's folder.
        network: the network with its weights.
        optimizer_variables: name -> variable.
        state: JSON object from which training resumes; has "step".
        vocabulary: from `folders.vocabulary_of`, to write with the sizes into the folder; None if
            the run has them.

    Raises:
        UserError: see `write`.
    """
    try:
        _save_run(Path(folder), network, optimizer_variables, state, vocabulary)
    except OSError as error:
        raise files.cannot_write(folder, error) from error


def _save_run(
    folder: Path,
    network: GPT2,
    optimizer_variables: Mapping[str, Any],
    state: Mapping[str, Any],
    vocabulary: Mapping[str, bytes] | None,
) -> None:
    step = state["step"]
    before = runs.states(folder).values()
    state = {**state, "save": 1 + max((s.get("save", 0) for s in before), default=0)}
    # the weights last: they make it a checkpoint
    saved = {f"optimizer-{step}": optimizer_variables, f"model-{step}": network.weights}

    def seal(digests: dict[str, str]) -> None:
        if vocabulary is not None:
            folders.write_description(folder, network.config, vocabulary)
        runs.set_aside(folder, step)
        runs.write_state(folder, state, digests)

    try:
        write_all({folder / name: tensors for name, tensors in saved.items()}, seal)
    finally:
        runs.recover(folder)


def name_newest(folder: str | Path, steps: list[int]) -> None:
    """Name the last of these steps in `checkpoint` and `counter`, which other programs read."""
    names = [f"model-{step}" for step in steps]
    _name_newest(folder, names[-1], names)
    with files.replacing(Path(folder) / "counter") as file:
        file.write(f"{steps[-1]}\n".encode())


def _name_newest(folder: str | Path, newest: str, names: list[str]) -> None:
    """Write the `checkpoint` file as TensorFlow does, with names relative to the folder."""
    lines = [f'model_checkpoint_path: "{newest}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    with files.replacing(Path(folder) / "checkpoint") as file:
        file.write("\n".join(lines).encode() + b"\n")


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
    step = state["step"]
    path = prefix.with_name(f"optimizer-{step}")
    with _reading(path):
        reader = tf.train.load_checkpoint(str(path))
        names = reader.get_variable_to_shape_map()
        return {name: reader.get_tensor(name) for name in names}, state


def load_slots(prefix: Path, optimizer: str) -> dict[str, np.ndarray]:
    """Return AdaFactor's moments in a checkpoint of GPT2_ML by name; empty where there are none.

    Args:
        prefix: the checkpoint.
        optimizer: name of our optimizer; its variables' names start with it.
    """
    with _reading(prefix):
        reader = tf.train.load_checkpoint(str(prefix))
        names = [n for n in reader.get_variable_to_shape_map() if "/adafactor_v" in n]
        slots = {f"{optimizer}/{n.replace('/', '_')}": reader.get_tensor(n) for n in names}
    return slots

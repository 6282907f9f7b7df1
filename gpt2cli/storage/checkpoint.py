"""Networks <-> files: TensorFlow checkpoints under the original's names, and run folders.

Reading alone is in reading.py, which does not import TensorFlow.

A model folder contains hparams.json, a vocabulary and one checkpoint. A run folder is a model
folder with one checkpoint per save, `model-<step>`, each with its training state beside it:

    model-100.index, .data-00000-of-00001      weights alone, which nshepperd's code can read
    optimizer-100.index, .data-00000-of-00001  the optimizer's variables
    state-100.json                             step, seed, ..., and checksums: see runs.py
    checkpoint, counter                        the newest save, for TensorFlow and nshepperd
"""

import contextlib
import glob
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt2cli import files
from gpt2cli.model.network import GPT2
from gpt2cli.storage import folders, reading, runs
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.tensorflow import tf


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
    config, stored = reading.open_weights(folder)
    return GPT2(config, stored, precision, weights_precision)


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

"""Weights <-> files: TensorFlow checkpoints under the original's names, and run folders.

A model folder holds hparams.json, a vocabulary and one checkpoint; a run folder is a model folder
with a checkpoint a save, `model-<step>`, and beside each of them what only training needs:

    model-100.index, .data-00000-of-00001      weights alone, readable by nshepperd's code
    optimizer-100.index, .data-00000-of-00001  the optimizer's variables
    state-100.json                             step, seed, ..., and checksums: see runs.py
    checkpoint, counter                        the newest save, as TensorFlow and nshepperd name it
"""

import contextlib
import dataclasses
import glob
import math
import os
import re
from pathlib import Path

import numpy as np

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.model import network as model
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import folders, runs
from gpt2cli.tensorflow import tf


@contextlib.contextmanager
def _reading(prefix):
    """Turn TensorFlow's complaints about a file into ours."""
    try:
        yield
    except (tf.errors.OpError, ValueError, RuntimeError, LookupError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{prefix}.* cannot be read, it is damaged or cut short ({reason}). "
            "Fetch it again with: gpt2cli download, or restore an older checkpoint of the run"
        ) from error


def open_checked(prefix, described=None):
    """A reader of the checkpoint at `prefix` and its ModelConfig, which must be of one model.

    n_vocab is that of the weights where GPT2_ML's json gives the sizes: the released 21128 tokens
    have 21130 rows.

    Args:
        described: the file with the sizes, where it does not lie beside the checkpoint.
    """
    if described is None:
        config, described = folders.read_config(prefix.parent), folders.config_path(prefix.parent)
    else:
        config = ModelConfig.from_json(files.read_text(described), where=str(described))
    if "[" in str(prefix) or "]" in str(prefix):
        raise UserError(f"TensorFlow reads no path with [ or ] in it: rename {prefix.parent}")
    with _reading(prefix):
        reader = tf.train.load_checkpoint(str(prefix))
        found = reader.get_variable_to_shape_map()
        kinds = reader.get_variable_to_dtype_map()
        needed = sum(kinds[name].size * np.prod(found[name], dtype=int) for name in found)
        shards = prefix.parent.glob(f"{glob.escape(prefix.name)}.data-*-of-*")
        if sum(path.stat().st_size for path in shards) < needed:
            raise ValueError(f"its data is shorter than the {needed} bytes that its index lists")
    table = "newslm/embeddings/word_embed"
    if described.name != "hparams.json" and len(found.get(table, ())) == 2:
        config = dataclasses.replace(config, n_vocab=found[table][0])
    expected = model.weight_shapes(config)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and OURS.fullmatch(name)]
    if missing:
        raise UserError(
            f"{prefix} is not a checkpoint of this model: it lacks {_few(missing)}. "
            f"Is it of another size or kind than {described} says?"
        )
    if extra:
        raise UserError(
            f"{prefix} has more than {described} says: {_few(extra)}. "
            f"Use the {described.name} that belongs to it"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape or not kinds[name].is_floating:
            raise UserError(
                f"{prefix}: {name} is {kinds[name].name} {list(found[name])}, {described.name} "
                f"asks for float32 {list(shape)}. Use the one that belongs to this checkpoint"
            )
    return reader, config


# A model's weights, and not what a program keeps beside them: slots of an optimizer, counters.
OURS = re.compile(
    r"model/(wte|wpe|ln_f/[gb]|h\d+/(ln_[12]/[gb]|(attn|mlp)/c_\w+/[wb]))"
    r"|newslm/(embeddings|layer\d+)/\w+(/(kernel|bias|gamma|beta))?"
)


def _few(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def verify(folder):
    """Open a folder's checkpoint and compare names and shapes with its hparams.json (UserError)."""
    open_checked(folders.find_checkpoint(folder))


def load(path, precision="float32", weights_precision=None):
    """A GPT2 with the weights that `path` means; see `folders.find_checkpoint` and `model.GPT2`.

    Raises:
        UserError: no checkpoint, a damaged one, one of another size, or one with numbers that are
            not finite; the text names the file.
    """
    config, stored = open_weights(folders.find_checkpoint(path))
    return model.GPT2(config, stored, precision, weights_precision)


def open_weights(prefix, described=None):
    """The ModelConfig of a checkpoint and the function that reads its weights for a `model.GPT2`.

    Raises:
        UserError: as `load`, and the function as well.
    """
    reader, config = open_checked(prefix, described)

    def stored(name, shape):
        with _reading(prefix):
            value = reader.get_tensor(name)
        if not np.isfinite(value).all():
            raise UserError(
                f"{prefix}: {name} has values that are not finite; the training that wrote it "
                "diverged, or the file is damaged. Use an older checkpoint"
            )
        return value

    return config, stored


def write(prefix, tensors):
    """Write {name: tensor} as a checkpoint; nobody sees half of it, an older one stays if it fails.

    The files are those of tf.compat.v1.train.Saver, one shard.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    write_all({Path(prefix): tensors})


def write_all(checkpoints, sealed=lambda digests: None):
    """`write` for several {prefix: {name: tensor}}: all are on disk before the first is renamed.

    Where a prefix exists its index is removed first: without an index a shard counts for nothing.

    Args:
        sealed: is called in between, with the SHA-256 of each file by its name.
    """
    parts = {p: p.with_name(f".{p.name}.{os.getpid()}.part") for p in checkpoints}
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
        # "{{node}} path; No space left on device [Op:SaveV2]": the words between are for people
        reason = re.sub(r"^.*; |\{\{.*?\}\} ?| \[Op:\w+\]$", "", error.message.splitlines()[0])
        raise files.cannot_write(prefix, OSError(0, reason)) from error
    finally:
        for part in parts.values():
            for left in part.parent.glob(f"{glob.escape(part.name)}*"):
                left.unlink(missing_ok=True)


def _bytes_of(tensors):
    return sum(tf.as_dtype(t.dtype).size * math.prod(t.shape) for t in tensors.values())


def save(network, folder):
    """Write a model folder's hparams.json and checkpoint `model.ckpt`, and SHA256SUMS."""
    folder = Path(folder)
    with files.replacing(folder / "hparams.json") as file:
        file.write(network.config.to_json().encode())
    write(folder / "model.ckpt", network.weights)
    _name_newest(folder, "model.ckpt", ["model.ckpt"])
    folders.write_sums(folder)


def save_run(folder, network, optimizer_variables, state, source=None):
    """Add the checkpoint of `state["step"]` to a run folder; the others stay.

    Nothing of the folder changes before the new files are on the disk.

    Args:
        folder: the run's folder.
        network: the GPT2.
        optimizer_variables: {name: variable} of the optimizer.
        state: JSON object that training needs to go on; has "step".
        source: the model folder whose description this one gets; it has its own if not given.
    """
    folder, step = Path(folder), state["step"]
    before = runs.states(folder).values()
    state = {**state, "save": 1 + max((s.get("save", 0) for s in before), default=0)}
    # the weights last: they make it a checkpoint
    saved = {f"optimizer-{step}": optimizer_variables, f"model-{step}": network.weights}

    def seal(digests):
        if source is not None:
            folders.copy_description(source, folder, network.config)
        runs.set_aside(folder, step)
        runs.write_state(folder, state, digests)

    try:
        write_all({folder / name: tensors for name, tensors in saved.items()}, seal)
    finally:
        runs.recover(folder)


def name_newest(folder, steps):
    """Have `checkpoint` and `counter` name the last of these steps, for other programs."""
    names = [f"model-{step}" for step in steps]
    _name_newest(folder, names[-1], names)
    with files.replacing(Path(folder) / "counter") as file:
        file.write(f"{steps[-1]}\n".encode())


def _name_newest(folder, newest, names):
    """Write the `checkpoint` file as TensorFlow does, with names relative to the folder."""
    lines = [f'model_checkpoint_path: "{newest}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    with files.replacing(Path(folder) / "checkpoint") as file:
        file.write("\n".join(lines).encode() + b"\n")


def load_state(prefix):
    """The state beside a run's checkpoint, or None."""
    step = prefix.name.removeprefix("model-")
    return runs.read_state(prefix.parent, int(step)) if step.isdecimal() else None


def load_training(prefix):
    """What lies beside a run's checkpoint: (optimizer's tensors by name, state), or ({}, None).

    A model folder, or a run of another program, has neither.
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


def load_slots(prefix, optimizer):
    """AdaFactor's moments in a checkpoint of GPT2_ML, as `load_training` gives them; or {}.

    Args:
        optimizer: the name of ours, which its variables' names begin with.
    """
    with _reading(prefix):
        reader = tf.train.load_checkpoint(str(prefix))
        names = [n for n in reader.get_variable_to_shape_map() if "/adafactor_v" in n]
        slots = {f"{optimizer}/{n.replace('/', '_')}": reader.get_tensor(n) for n in names}
    return slots

"""The checkpoints of a run folder: which are whole, which is the newest, which may go.

state-STEP.json, which is written last but for the weights' own names, holds what training needs to
go on, the order in which checkpoints were saved, and the SHA-256 of every file of its checkpoint
and of itself. A checkpoint without one is another program's, and counts if its files are there.
"""

import functools
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from gpt2cli import files
from gpt2cli.errors import UserError

SHARD = ".data-00000-of-00001"  # the data file of a checkpoint; we write one
ENDINGS = (SHARD, ".index")
_NUMBER = r"(0|[1-9][0-9]*)"
_WEIGHTS = re.compile(rf"model-{_NUMBER}\.index")
_PARTS = re.compile(
    rf"(?:model|optimizer)-{_NUMBER}\.(?:index|meta|data-\d+-of-\d+)|state-{_NUMBER}\.json", re.A
)
_HALF_DONE = re.compile(  # files.replacing and checkpoint.write_all
    r".+\.\d+-[0-9a-f]{6}\.part|\.(model|optimizer)-\d+\.\d+\.part\..*", re.A
)
_ASIDE = ".old-"  # what the files of a step are named while it is written again


def steps(folder):
    """The steps of which there are weights, whole or not, ascending."""
    found = (_WEIGHTS.fullmatch(path.name) for path in Path(folder).glob("model-*.index"))
    return sorted(int(match[1]) for match in found if match)


def write_state(folder, state, digests):
    """Write the state of a checkpoint before its other files get their names.

    Args:
        state: JSON object; has "step".
        digests: the SHA-256 of each of those files, by name.
    """
    state = {**state, "files": digests}
    with files.replacing(_state_path(folder, state["step"])) as file:
        sealed = {**state, "sha256": _seal(state)}
        file.write(json.dumps(sealed, indent=2).encode() + b"\n")


def read_state(folder, step):
    """The state of a step, or None where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = _state_path(folder, step)
    if not path.is_file():
        return None
    state = files.read_object(path)
    seal = state.pop("sha256", None)
    expected = _seal(state) if "files" in state else None  # our first runs had neither
    if seal != expected or state.get("step") != step or not _is_state(state):
        raise UserError(f"{path} is damaged")
    return state


def _is_state(state):
    """Whether what everything relies on is of its type; the rest may be missing."""
    number = (int, float)
    pair, best = state.get("running_loss", [0, 0]), state.get("best") or {"step": 0, "loss": 0}
    plain = {"step": int, "save": int, "seed": int, "worse": int, "kept_at": number}
    return (
        all(type(state.get(name, 0)) in (t if t is number else (t,)) for name, t in plain.items())
        and isinstance(pair, list)
        and [type(value) in number for value in pair] == [True, True]
        and isinstance(best, dict)
        and type(best.get("step")) is int
        and type(best.get("loss")) in number
        and type(state.get("validation_loss", 0)) in number
        and isinstance(state.get("due", []), list)
        and isinstance(state.get("files", {}), dict)
    )


def fault(folder, step, to_train=True):
    """What is wrong with the checkpoint of a step, in words, or None if it is whole.

    Args:
        to_train: compare the optimizer's state too, which is twice as much to read as the weights.
    """
    folder = Path(folder)
    for ending in ENDINGS:
        if not any(folder.glob(f"model-{step}{ending.replace('00001', '*')}")):
            return f"{folder}/model-{step}{ending} is missing"
    try:
        state = read_state(folder, step)
    except UserError as error:
        return str(error)
    if state is None:
        missing = is_ours(folder, step)
        return f"{_state_path(folder, step)} is missing" if missing else None
    for name, digest in state.get("files", {}).items():
        path = folder / Path(name).name
        if name.startswith("optimizer") and not to_train:
            continue
        if not os.path.isfile(path):  # False for what no file may be named
            return f"{path} is missing"
        try:
            if _digest(path) != digest:
                return f"{path} is damaged: its SHA-256 is not the one that was recorded"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return None


def newest(folder, to_train=True):
    """The step of the newest whole checkpoint; one that is damaged is told of on stderr.

    Args:
        to_train: as of `fault`.

    Raises:
        UserError: all are damaged, or there is none.
    """
    found, before = _newest_first(folder), []
    for step in found:
        wrong = fault(folder, step, to_train)
        if wrong is None:
            for text in before:
                print(f"{text}; the checkpoint of step {step} is used", file=sys.stderr)
            return step
        before.append(wrong)
    raise UserError(
        f"{'; '.join(before)}. No other checkpoint is in {folder}. If only the optimizer's state "
        "is damaged, go on with --restore_from weights; else start anew from a model"
        if before
        else f"no checkpoint in {folder}"
    )


def states(folder):
    """{step: state} of the checkpoints that have a readable one, in the order of their saving."""
    found = {}
    for step in steps(folder):
        try:
            found[step] = read_state(folder, step)
        except UserError:
            continue
    known = [step for step, state in found.items() if state is not None]
    return {step: found[step] for step in sorted(known, key=lambda s: found[s].get("save", s))}


def _newest_first(folder):
    """All steps: those whose state is damaged, ours by the order of saving, another program's.

    But first a step of another program that goes on from ours, and says so in `checkpoint`.
    """
    ours = list(states(folder))[::-1]
    others = [step for step in steps(folder)[::-1] if step not in ours]
    damaged = [step for step in others if is_ours(folder, step)]
    foreign = [step for step in others if step not in damaged]
    later = [s for s in foreign if named(folder) == f"model-{s}" and s > max(ours, default=0)]
    return [*later, *damaged, *ours, *(step for step in foreign if step not in later)]


def named(folder):
    """The checkpoint that the file `checkpoint` names, or None; another machine's path is cut."""
    path = Path(folder) / "checkpoint"
    text = files.read_bytes(path).decode("utf-8", "replace") if path.is_file() else ""
    found = re.search(r'^model_checkpoint_path: *"(.*)"', text, re.M)
    return Path(found[1]).name if found else None


def is_ours(folder, step):
    """Whether there is more of a step than weights, which is all that other programs write."""
    beside = (_state_path(folder, step), Path(folder) / f"optimizer-{step}.index")
    return any(path.exists() for path in beside)


def best(known):
    """Of the last run in `states` the step with the lowest validation loss; None where none has."""
    losses = {step: state.get("validation_loss") for step, state in _of_last_run(known).items()}
    losses = {step: loss for step, loss in losses.items() if loss is not None}
    return min(losses, key=losses.get, default=None)


def _of_last_run(known):
    """Of {step: state} those of the run that saved last: --overwrite begins another one."""
    run = list(known.values())[-1].get("run") if known else None
    return {step: state for step, state in known.items() if state.get("run") == run}


def prune(folder, saved, keep, keep_best=False, replaced=()):
    """Remove checkpoints, now that `saved` is whole; returns the steps that stay, oldest first.

    Those stay that are among the `keep` newest (0: all), whose state says "permanent", and with
    `keep_best` that of the lowest validation loss; and what another program wrote later.

    Args:
        replaced: steps of an older run in this folder, all of which go, as do all of our own whose
            state names another run.
    """
    ours = states(folder)
    known = {s: v for s, v in _of_last_run(ours).items() if s not in replaced or s == saved}
    later = [s for s in steps(folder) if s > saved and not is_ours(folder, s) and s not in replaced]
    gone = {*ours, *later, *replaced}
    others = [step for step in steps(folder) if step not in gone]
    ordered = [*others, *known]
    kept = {*ordered[-keep:], *later, saved}  # all of them for 0
    kept |= {step for step, state in known.items() if state.get("permanent")}
    if keep_best:
        kept |= {best(known)}
    for is_index in (True, False):  # first: without it the others count for nothing
        for path in Path(folder).iterdir():
            match = _PARTS.fullmatch(path.name)
            if match and path.is_file() and (path.suffix == ".index") == is_index:
                if int(match[1] or match[2]) not in kept:
                    path.unlink(missing_ok=True)
    return [step for step in ordered if step in kept]


def set_aside(folder, step):
    """Rename the files of a step that is about to be written again; `recover` decides."""
    for path in _files_of(Path(folder), step):
        os.replace(path, path.with_name(_ASIDE + path.name))


def recover(folder):
    """Of steps that were being written again: keep the new files if they are whole, else the old.

    Only for who holds the run's lock.
    """
    aside = [path for path in Path(folder).glob(f"{_ASIDE}*") if path.is_file()]
    matches = [_PARTS.fullmatch(path.name.removeprefix(_ASIDE)) for path in aside]
    for step in {int(match[1] or match[2]) for match in matches if match}:
        whole = step in steps(folder) and fault(folder, step) is None
        for path in Path(folder).glob(f"{_ASIDE}*-{step}.*"):
            if whole:
                path.unlink()
            else:
                os.replace(path, path.with_name(path.name.removeprefix(_ASIDE)))


def _files_of(folder, step):
    found = ((path, _PARTS.fullmatch(path.name)) for path in folder.iterdir())
    return [path for path, match in found if match and int(match[1] or match[2]) == step]


def clear(folder):
    """Put right what a killed writer left half done; only for who holds the run's lock."""
    recover(folder)
    for path in Path(folder).iterdir():
        if _HALF_DONE.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _state_path(folder, step):
    return Path(folder) / f"state-{step}.json"


def _seal(state):
    """The SHA-256 of a state's content, whatever the spaces of its file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(path):
    """files.digest, but a file that has not changed since is not read again."""
    found = os.stat(path)
    return _digest_of(path, found.st_ino, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest_of(path, inode, size, changed):
    return files.digest(path)

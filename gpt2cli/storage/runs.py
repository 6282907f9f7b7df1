"""The checkpoints of a run folder: which are undamaged, which is the newest, which may be removed.

state-STEP.json contains all that training needs to resume, the order in which checkpoints were
saved, and the SHA-256 of each file of its checkpoint and of itself. Only the weights get their
names after it. A checkpoint without a state is another program's, and counts if its files exist.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gpt2cli import __version__, counts, files
from gpt2cli.console import say
from gpt2cli.errors import NewerFormatError, UserError
from gpt2cli.options import MAX_SEED

State = dict[str, Any]

FORMAT = 1  # of a state; raise it when earlier versions must not resume the run

SHARD = ".data-00000-of-00001"  # the data file of a checkpoint; we write one
ENDINGS = (SHARD, ".index")
_NUMBER = r"(0|[1-9][0-9]*)"
_WEIGHTS = re.compile(rf"model-{_NUMBER}\.index")
_PARTS = re.compile(
    rf"(?:model|optimizer)-{_NUMBER}\.(?:index|meta|data-\d+-of-\d+)|state-{_NUMBER}\.json", re.A
)
LONGEST_NAME = 255 - len(".data-00000-of-00001")  # bytes, on all usual file systems
_HALF_DONE = re.compile(  # files.replacing and checkpoint.write_all
    r".+\.\d+-[0-9a-f]{6}\.part|\.(model|optimizer)-\d+\.\d+(-[0-9a-f]+)?\.part\..*", re.A
)
_ASIDE = ".old-"  # prefix of a step's files while the step is written again


def steps(folder: str | Path) -> list[int]:
    """Return the steps that have weights, damaged or not, in ascending order."""
    found = (_WEIGHTS.fullmatch(path.name) for path in Path(folder).glob("model-*.index"))
    return sorted(int(match[1]) for match in found if match)


def write_state(folder: str | Path, state: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write the state of step `state["step"]` before its other files get their names.

    `digests` are the SHA-256 of these files, by name.
    """
    state = {**state, "format": FORMAT, "gpt2cli": __version__, "files": digests}
    with files.replacing(_state_path(folder, state["step"])) as file:
        sealed = {**state, "sha256": _seal(state)}
        file.write(json.dumps(sealed, indent=2).encode() + b"\n")


def read_state(folder: str | Path, step: int) -> State | None:
    """Return the state of a step, or None where there is none.

    Raises:
        UserError: it is damaged.
        NewerFormatError: a later version wrote it in another format.
    """
    path = _state_path(folder, step)
    if not path.is_file():
        return None
    state = files.read_object(path)
    seal = state.pop("sha256", None)
    expected = _seal(state) if "files" in state else None  # our first runs had neither
    if seal == expected and seal:
        files.check_format(state, FORMAT, path)
    if seal != expected or state.get("step") != step or not _is_state(state):
        raise UserError(f"{path} is damaged")
    return state


def _is_state(state: State) -> bool:
    """Return whether the values that other code relies on have their types, where they exist."""
    whole = (state.get(name, 0) for name in ("step", "save", "seed", "worse"))
    pair, best = state.get("running_loss", [0, 0]), state.get("best") or {"step": 0, "loss": 0}
    return (
        all(counts.is_whole(value, 0, MAX_SEED) for value in whole)
        and counts.is_real(state.get("kept_at", 0))
        and _is_number(state.get("validation_loss", 0))
        and isinstance(pair, list)
        and len(pair) == 2
        and all(_is_number(value) for value in pair)
        and isinstance(best, dict)
        and counts.is_whole(best.get("step"), 0, MAX_SEED)
        and _is_number(best.get("loss"))
        and isinstance(state.get("due", []), list)
        and isinstance(state.get("files", {}), dict)
        and isinstance(state.get("flags", {}), dict)
    )


def _is_number(value: Any) -> bool:
    """Return whether a value can be a loss: any float, because a diverged loss is not finite."""
    return type(value) is float or counts.is_real(value)


def fault(folder: str | Path, step: int, to_train: bool = True) -> str | None:
    """Describe the damage of a checkpoint; None if it is undamaged.

    With `to_train`, check the optimizer's state too, which is twice as large as the weights.

    Raises:
        NewerFormatError: a later version wrote its state in another format.
    """
    folder = Path(folder)
    for ending in ENDINGS:
        if not any(folder.glob(f"model-{step}{ending.replace('00001', '*')}")):
            return f"{folder}/model-{step}{ending} is missing"
    try:
        state = read_state(folder, step)
    except NewerFormatError:
        raise
    except UserError as error:
        return str(error)
    if state is None:
        return f"{_state_path(folder, step)} is missing" if is_ours(folder, step) else None
    for name, digest in state.get("files", {}).items():
        path = folder / Path(name).name
        if name.startswith("optimizer") and not to_train:
            continue
        if not os.path.isfile(path):  # unlike Path.is_file, False for impossible names
            return f"{path} is missing"
        try:
            if _digest(path) != digest:
                return f"{path} is damaged: its SHA-256 differs from the recorded one"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return None


def newest(folder: str | Path, to_train: bool = True) -> int:
    """Return the step of the newest undamaged checkpoint; report damaged ones on stderr.

    Raises:
        UserError: all are damaged, or there is none.
    """
    faults: list[str] = []
    for step in _newest_first(folder):
        found = fault(folder, step, to_train)
        if found is None:
            for text in faults:
                say(f"{text}; using the checkpoint of step {step} instead")
            return step
        faults.append(found)
    if not faults:
        raise UserError(f"no checkpoint in {folder}")
    raise UserError(
        f"{'; '.join(faults)}. {folder} has no other checkpoint. If only the optimizer's state is "
        "damaged, resume with --restore_from weights; otherwise start again from a model"
    )


def states(folder: str | Path) -> dict[int, State]:
    """Return step -> state of the checkpoints with a readable state, in the order of saving.

    Raises:
        NewerFormatError: a later version wrote a state in another format.
    """
    found: dict[int, State] = {}
    for step in steps(folder):
        try:
            state = read_state(folder, step)
        except NewerFormatError:
            raise
        except UserError:
            continue
        if state is not None:
            found[step] = state
    return dict(sorted(found.items(), key=lambda item: item[1].get("save", item[0])))


def _newest_first(folder: str | Path) -> list[int]:
    """Return all steps: damaged states, then ours by the order of saving, then other programs'.

    If another program continued from our newest step and says so in `checkpoint`, its step comes
    first.
    """
    ours = list(states(folder))[::-1]
    others = [step for step in steps(folder)[::-1] if step not in ours]
    damaged = [step for step in others if is_ours(folder, step)]
    foreign = [step for step in others if step not in damaged]
    later = [s for s in foreign if named(folder) == f"model-{s}" and s > max(ours, default=0)]
    return [*later, *damaged, *ours, *(step for step in foreign if step not in later)]


def named(folder: str | Path) -> str | None:
    """Return the checkpoint that the file `checkpoint` names, without its folder, or None.

    Raises:
        UserError: no file can have such a name.
    """
    path = Path(folder) / "checkpoint"
    text = files.read_bytes(path).decode("utf-8", "replace") if path.is_file() else ""
    found = re.search(r'^model_checkpoint_path: *"(.*)"', text, re.M)
    name = Path(found[1]).name if found else None
    if name and len(name.encode()) > LONGEST_NAME:
        raise UserError(
            f"{path} names a checkpoint of {len(name):,} characters, so it is damaged. Remove it, "
            "or name a checkpoint by its path"
        )
    return name


def is_ours(folder: str | Path, step: int) -> bool:
    """Return whether a step has more than weights; other programs write nothing else."""
    beside = (_state_path(folder, step), Path(folder) / f"optimizer-{step}.index")
    return any(path.exists() for path in beside)


def best(known: Mapping[int, State]) -> int | None:
    """Return the last run's step with the lowest validation loss; None if no step has one."""
    validated = {s: v for s, v in _of_last_run(known).items() if "validation_loss" in v}
    return min(validated, key=lambda step: validated[step]["validation_loss"], default=None)


def _of_last_run(known: Mapping[int, State]) -> dict[int, State]:
    """Return the states of the run that saved last: --overwrite starts another run."""
    run = list(known.values())[-1].get("run") if known else None
    return {step: state for step, state in known.items() if state.get("run") == run}


def prune(
    folder: str | Path,
    saved: int,
    keep: int,
    keep_best: bool = False,
    replaced: Collection[int] = (),
) -> list[int]:
    """Remove old checkpoints after `saved` is complete; return the remaining steps, oldest first.

    Checkpoints that another program wrote later, and permanent ones, always stay.

    Args:
        folder: the run's folder.
        saved: step that was just saved.
        keep: number of newest checkpoints to keep; 0 keeps all.
        keep_best: keep the one with the lowest validation loss too.
        replaced: steps of an older run in this folder, which are all removed, as are our own steps
            whose state names another run.
    """
    ours = states(folder)
    known = {s: v for s, v in _of_last_run(ours).items() if s not in replaced or s == saved}
    later = [s for s in steps(folder) if s > saved and not is_ours(folder, s) and s not in replaced]
    others = [step for step in steps(folder) if step not in {*ours, *later, *replaced}]
    ordered = [*others, *known]
    kept: set[int | None] = {*ordered[-keep:], *later, saved}  # [-0:] is all of them
    kept |= {step for step, state in known.items() if state.get("permanent")}
    if keep_best:
        kept.add(best(known))
    removed = [p for p in Path(folder).iterdir() if _step_of(p.name) not in {*kept, None}]
    # the index first: without it the other files do not count
    for path in sorted(removed, key=lambda path: path.suffix != ".index"):
        if path.is_file():
            path.unlink(missing_ok=True)
    return [step for step in ordered if step in kept]


def set_aside(folder: str | Path, step: int) -> None:
    """Rename the files of a step that will be written again, until `recover` removes one set."""
    for path in Path(folder).iterdir():
        if _step_of(path.name) == step:
            os.replace(path, path.with_name(_ASIDE + path.name))


def recover(folder: str | Path) -> None:
    """Keep the new files of each step that was written again if they are undamaged, else the old.

    The caller must hold the run's lock.
    """
    aside = [path for path in Path(folder).glob(f"{_ASIDE}*") if path.is_file()]
    for step in {_step_of(path.name.removeprefix(_ASIDE)) for path in aside} - {None}:
        complete = step in steps(folder) and fault(folder, step) is None
        for path in Path(folder).glob(f"{_ASIDE}*-{step}.*"):
            if complete:
                path.unlink()
            else:
                os.replace(path, path.with_name(path.name.removeprefix(_ASIDE)))


def clear(folder: str | Path) -> None:
    """Clean up after a killed writer. The caller must hold the run's lock.

    Raises:
        NewerFormatError: a later version wrote the run; nothing is changed.
    """
    states(folder)
    recover(folder)
    for path in Path(folder).iterdir():
        if _HALF_DONE.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _step_of(name: str) -> int | None:
    """Return the step whose checkpoint has a file of this name; None for any other file."""
    match = _PARTS.fullmatch(name)
    return int(match[1] or match[2]) if match else None


def _state_path(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"state-{step}.json"


def _seal(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a state's content, whatever the white space in its file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    """Return `files.digest`, without reading an unchanged file again."""
    found = os.stat(path)
    return _digest_of(path, found.st_ino, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest_of(path: Path, inode: int, size: int, changed: int) -> str:
    return files.digest(path)

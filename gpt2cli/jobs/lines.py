"""A file of JSON lines that takes hours to write and survives a crash.

Lines are added to NAME.part, which becomes NAME when all are there. NAME.part.json records the job
that they belong to: the same job resumes, and the lines of a different one are moved away.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from gpt2cli import __version__, counts, files, locks, paths
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.options import MAX_SEED

FORMAT = 1  # of a note and its lines; raise it when earlier versions must not resume the job


class Lines:
    """The lines of an unfinished job; made by `gathered`.

    Attributes:
        job: the recorded job.
        found: of each line that an earlier run left, its "index" and whether it has an "error".
        count: the number of whole lines.
    """

    def __init__(self, path: Path, job: dict[str, Any], file: IO[bytes]) -> None:
        self.job = job
        self.found: list[tuple[int | None, bool]] = []
        self._path = path
        self._file = file
        self._ends = [0]  # of each line, in bytes
        for value, size in _whole_lines(path):
            self.found.append((value.get("index"), "error" in value))
            self._ends.append(self._ends[-1] + size)
        self.count = len(self.found)

    def keep(self, number: int) -> None:
        """Continue after the first `number` of the lines in `found`; discard the others."""
        self.found, self.count = self.found[:number], number
        self._file.truncate(self._ends[number])

    def add(self, values: Iterable[dict[str, Any]]) -> None:
        """Append a line for each value; UserError if it cannot be written."""
        found = [encoded(value) + b"\n" for value in values]
        data = memoryview(b"".join(found))
        with _explained(self._path):
            while data:
                data = data[self._file.write(data) :]
        self.count += len(found)


@contextlib.contextmanager
def gathered(
    path: Path,
    job: dict[str, Any],
    usual: dict[str, Any],
    seed: int,
    parts: Sequence[Path] = (),
) -> Iterator[Lines]:
    """Yield the Lines of `path`, which gets them when the block ends without an exception.

    Args:
        job: JSON object with everything that the lines depend on, and the number of "processes".
        usual: what a key means that the record of an earlier version lacks.
        seed: for a new job whose "seed" is None.
        parts: files from which the block takes the lines, removed when the job is finished.
            Those of an older job are moved away.

    Raises:
        BusyError: another process writes it.
        UserError: it cannot be written, or was begun by another number of processes or by a later
            version.
    """
    part, note, lock = _beside(path)
    with locks.locked(lock, "sample", target=path):
        before: dict[str, Any] = {}
        if os.path.lexists(part):
            before = _recorded(note, usual)
        is_drawn = job["seed"] is None
        known = job | {"seed": before.get("seed")} if is_drawn else job
        has_seed = counts.is_whole(before.get("seed"), 0, MAX_SEED)
        if before != known or not has_seed:
            if has_seed and before | {"processes": job["processes"]} == known:
                count = before["processes"]
                others = f" and {path}.*-of-{count}*" if count != 1 else ""
                raise UserError(
                    f"{path} was begun with --processes {count}, not "
                    f"{job['processes']}. Use that number to resume, or delete {note}{others} to "
                    "start from scratch"
                )
            _move_away(part)
            # only parts that an older job's note or this job names: a user's own --shard results
            # may be called NAME.3-of-8 too
            for each in sorted({*_parts_of(path, before.get("processes")), *parts}):
                unfinished, own_note, own_lock = _beside(each)
                with locks.locked(own_lock, "sample", target=each):  # of a process that still runs
                    _move_away(each)
                    _move_away(unfinished)
                    own_note.unlink(missing_ok=True)
            known = job | {"seed": seed} if is_drawn else job
            with files.replacing(note, "w", encoding="utf-8") as file:
                json.dump({"gpt2cli": __version__, **known}, file, indent=1)
        with _explained(part):  # unbuffered: closing a buffer would try a failed write again
            file = paths.open_own(part, "ab", buffering=0)
        with file:
            yield Lines(part, known, file)
            with _explained(part):
                os.fsync(file.fileno())
                os.replace(part, path)
        files.sync_folder(path.parent)
        for each in parts:
            for name in (each, *_beside(each)):
                name.unlink(missing_ok=True)
        note.unlink(missing_ok=True)


def _recorded(note: Path, usual: dict[str, Any]) -> dict[str, Any]:
    """Return the job that a note records; {} if it is damaged: the lines may be of any job."""
    noted = files.read_own(note, FORMAT)
    before = usual | noted
    before["processes"] = before.get("processes") or 1
    before.pop("gpt2cli", None)
    return before if noted and counts.is_whole(before["processes"], 1) else {}


def _parts_of(path: Path, count: object) -> set[Path]:
    """Return NAME.1-of-3, ... for a job that `count` processes began; none for one process."""
    if type(count) is not int or not 1 < count < 10_000:
        return set()
    return {path.with_name(f"{path.name}.{k}-of-{count}") for k in range(1, count + 1)}


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a file, or of its NAME.part while it is unfinished."""
    existing = path if path.is_file() else _beside(path)[0]
    if existing.is_file():
        yield from (value for value, _ in _whole_lines(existing))


def encoded(value: object) -> bytes:
    """Return the JSON of a line, with ? for what UTF-8 cannot encode."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace")


def _beside(path: Path) -> list[Path]:
    """Return the paths of NAME.part, its note and the lock of NAME."""
    names = (f"{path.name}.part", f"{path.name}.part.json", f".{path.name}.lock")
    return [path.with_name(name) for name in names]


def _move_away(path: Path) -> None:
    """Rename a file to NAME.old, .old-2, ..., whichever is free; remove it if it is empty."""
    if not path.is_file():
        return
    with _explained(path):
        if not path.stat().st_size:
            path.unlink()
            return
        old = files.move_away(path)
    say(f"{path} belongs to a different job; moved to {old}")


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (object, bytes) of each line, up to the first that is damaged or not whole."""
    with paths.open_own(path, "rb") as lines:
        for line in lines:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                return
            if not isinstance(value, dict) or not counts.is_whole(value.get("index"), 0, 2**63):
                return
            if not isinstance(value.get("tokens", []), list):
                return
            yield value, len(line)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a failed write into a UserError that says how to resume."""
    try:
        yield
    except BrokenPipeError:  # not of this file
        raise
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. {files.advice(error)}, then rerun "
            "the same command to resume"
        ) from error

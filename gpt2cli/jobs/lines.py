"""A file of JSON lines that takes hours to fill: whole line by whole line, and gone on with.

The lines gather in NAME.part until all are there, and then it becomes NAME. NAME.part.json says of
which job they are, so that the same command goes on with them, and another does not.

Several processes fill a part each, NAME.1-of-2 and NAME.2-of-2, which are such files themselves.
The note says how many began it; finished parts stay until the lines of all are in NAME.part.
"""

import contextlib
import heapq
import json
import operator
import os
import sys
from pathlib import Path

from gpt2cli import files
from gpt2cli.errors import UserError


class Lines:
    """The lines of an unfinished job; made by `gathered`.

    Attributes:
        job: what was recorded of it when it began.
        found: of each line that was there already its "index" and whether it has an "error".
    """

    def __init__(self, path, job, file):
        self.job, self.found, self._out, self._file = job, [], path, file
        self._path, self._note, _ = _beside(path)
        self._ends = [0]  # of each line, in bytes
        with open(self._path, "rb") as there:
            for value, size in _whole_lines(there):
                self.found.append((value.get("index"), "error" in value))
                self._ends.append(self._ends[-1] + size)

    def keep(self, number):
        """Go on behind the first `number` of the lines that were found."""
        self.found = self.found[:number]
        self._file.truncate(self._ends[number])

    def add(self, objects):
        """Append a line each; UserError if they cannot be written."""
        text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects)
        data = memoryview(text.encode("utf-8", errors="replace"))
        with _told(self._path):
            while data:
                data = data[self._file.write(data) :]

    @property
    def parts(self):
        """The files that the processes fill that began it; none of one process alone."""
        return _parts(self._out, self.job)

    def has_parts(self):
        """Whether there is anything in them."""
        return any(_filled(self.parts))

    def share(self, count):
        """Let so many processes fill a part each, anew: what has their names now is set aside."""
        with _told(self._path):
            for part in (*self.parts, *_parts(self._out, {"processes": count})):
                _set_part_aside(part)
        self.job = self.job | {"processes": count}
        _write_note(self._note, self.job)

    def in_parts(self):
        """The lines of all parts as far as they are filled, one part after the other."""
        for path in _filled(self.parts):
            with open(path, "rb") as file:
                yield from (value for value, _ in _whole_lines(file))

    def join(self):
        """Take the lines of all parts, which are finished, by their "index"; yields each."""
        self.keep(0)
        with contextlib.ExitStack() as stack:
            parts = [stack.enter_context(open(part, encoding="utf-8")) for part in self.parts]
            values = [map(json.loads, part) for part in parts]
            for value in heapq.merge(*values, key=operator.itemgetter("index")):
                self.add([value])
                yield value


@contextlib.contextmanager
def gathered(path, job, drawn):
    """Let one process at a time gather the lines of `path`, which gets them when the block ends.

    What an earlier command left of another job is set aside as NAME.part.old.

    Args:
        job: JSON object: all that the lines depend on; None for what may be drawn.
        drawn: a value for each of those, if nothing was recorded.

    Yields:
        Lines.

    Raises:
        BusyError: another process is at it.
        UserError: it cannot be written.
    """
    path = Path(path)
    part, note, lock = _beside(path)
    job, drawn = ({**values, "processes": None} for values in (job, drawn))  # see Lines.share
    with files.locked(lock, "sample", of=path):
        before = dict.fromkeys(drawn) | _read_note(note)
        known = job | {key: before[key] for key in drawn if job[key] is None}
        if before != known or not (part.exists() or any(_filled(_parts(path, before)))):
            known = job | {key: value for key, value in drawn.items() if job[key] is None}
            with _told(part):
                _set_aside(part)
                for old in _parts(path, before):
                    _set_part_aside(old)
            _write_note(note, known)
        with contextlib.ExitStack() as stack:
            with _told(part):  # without a buffer, which would be written again when it is closed
                file = stack.enter_context(open(part, "ab", buffering=0))
                lines = Lines(path, known, file)
            yield lines
            with _told(part):
                os.fsync(file.fileno())
                for each in lines.parts:  # before the rename: where NAME is, they are not
                    _remove(each, *_beside(each))
                os.replace(part, path)
        files.sync_folder(path.parent)
        note.unlink(missing_ok=True)


def _beside(path):
    """NAME.part, its note and its lock, for the file NAME."""
    names = (f"{path.name}.part", f"{path.name}.part.json", f".{path.name}.lock")
    return [path.with_name(name) for name in names]


def _parts(path, job):
    """NAME.1-of-3, NAME.2-of-3, NAME.3-of-3 where a job's note says that three processes began."""
    count = job.get("processes")
    if type(count) is not int or count < 2:
        return []
    return [path.with_name(f"{path.name}.{k}-of-{count}") for k in range(1, count + 1)]


def _filled(parts):
    """Of each part the file that has its lines: itself, or NAME.part if there is more than none."""
    for path in parts:
        part = _beside(path)[0]
        if path.is_file():
            yield path
        elif part.is_file() and part.stat().st_size:
            yield part


def _set_part_aside(path):
    part, note, lock = _beside(path)
    with files.locked(lock, "sample", of=path):  # not from under a process that still fills it
        for filled in (path, part):
            _set_aside(filled)
        _remove(path, part, note)


def _set_aside(part):
    if part.is_file() and part.stat().st_size:
        old = _free(part)
        os.replace(part, old)
        print(f"{part} is of another job: set aside as {old}", file=sys.stderr)


def _remove(*paths):
    for path in paths:
        path.unlink(missing_ok=True)


def _free(part):
    """NAME.part.old, .old-2, ...: the first that does not exist."""
    names = (f"{part.name}.old{number}" for number in ("", *(f"-{n}" for n in range(2, 10**6))))
    return next(p for p in map(part.with_name, names) if not p.exists())


def _read_note(path):
    """The job that was recorded, or {} where nothing can be read."""
    with contextlib.suppress(UserError):
        return files.read_object(path)
    return {}


def _write_note(path, job):
    with files.replacing(path, "w", encoding="utf-8") as file:
        json.dump(job, file, indent=1)


def _whole_lines(lines):
    """(object, bytes) of each line, up to the first that is not whole."""
    for line in lines:
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            return
        if not isinstance(value, dict):
            return
        yield value, len(line)


@contextlib.contextmanager
def _told(path):
    """Turn a failed write into a UserError that says that nothing is lost."""
    try:
        yield
    except BrokenPipeError:  # not of this file
        raise
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Free space; the same command goes "
            "on where it stopped"
        ) from error

"""A file of JSON lines that takes hours to fill: whole line by whole line, and gone on with.

The lines gather in NAME.part until all are there, and then it becomes NAME. NAME.part.json says of
which job they are, so that the same command goes on with them, and another does not.
"""

import contextlib
import json
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
        self.job, self.found, self._path, self._file = job, [], path, file
        self._ends = [0]  # of each line, in bytes
        with open(path, "rb") as there:
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


@contextlib.contextmanager
def gathered(path, job, drawn):
    """Let one process at a time gather the lines of `path`, which gets them when the block ends.

    What an earlier process left of another job is set aside as NAME.part.old.

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
    part, note = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    with files.locked(path.with_name(f".{path.name}.lock"), "sample", of=path):
        before = _read_note(note)
        known = job | {key: before.get(key) for key in drawn if job[key] is None}
        if not part.exists() or before != known:
            known = job | {key: value for key, value in drawn.items() if job[key] is None}
            with _told(part):
                if part.exists() and part.stat().st_size:
                    old = _free(part)
                    os.replace(part, old)
                    print(f"{part} is of another job: set aside as {old}", file=sys.stderr)
            with files.replacing(note, "w", encoding="utf-8") as file:
                json.dump(known, file, indent=1)
        with contextlib.ExitStack() as stack:
            with _told(part):  # without a buffer, which would be written again when it is closed
                file = stack.enter_context(open(part, "ab", buffering=0))
                lines = Lines(part, known, file)
            yield lines
            with _told(part):
                os.fsync(file.fileno())
                os.replace(part, path)
        files.sync_folder(path.parent)
        note.unlink(missing_ok=True)


def _free(part):
    """NAME.part.old, .old-2, ...: the first that does not exist."""
    names = (f"{part.name}.old{number}" for number in ("", *(f"-{n}" for n in range(2, 10**6))))
    return next(p for p in map(part.with_name, names) if not p.exists())


def _read_note(path):
    """The job that was recorded, or {} where nothing can be read."""
    with contextlib.suppress(UserError):
        return files.read_object(path)
    return {}


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

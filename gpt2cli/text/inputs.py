"""The files of a corpus: found by name, and counted while they are read."""

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpt2cli.console import counted
from gpt2cli.errors import UserError

NAMED = 3  # files that a line names for each reason


class Found(NamedTuple):
    """The files that a name stands for.

    Attributes:
        paths: the files, sorted.
        hidden: the number of hidden files and folders that were left out.
        left_out: a reason -> the paths that were left out for it.
    """

    paths: list[Path]
    hidden: int
    left_out: dict[str, list[Path]]


class Tally:
    """Counts what was read and what was skipped, for one line at the end.

    Attributes:
        documents: the number of documents that were read.

    Args:
        found: the files.
    """

    def __init__(self, found: Found) -> None:
        self.documents = 0
        self._files = len(found.paths)
        self._skipped = {why: list(paths) for why, paths in found.left_out.items()}
        self._counts = {"hidden file or folder": found.hidden, "empty record": 0}
        self._notes: dict[str, list[Path]] = {}

    def skip_record(self) -> None:
        """Count an empty record."""
        self._counts["empty record"] += 1

    def skip_file(self, why: str, path: Path) -> None:
        """Count a file from which nothing was read."""
        self._skipped.setdefault(why, []).append(path)

    def note(self, note: str, path: Path) -> None:
        """Note something about the way in which a file was read."""
        self._notes.setdefault(note, []).append(path)

    def lines(self) -> Iterator[str]:
        """Yield the lines for standard error; documents of encoded files do not count."""
        skipped = [_plural(number, what) for what, number in self._counts.items() if number]
        skipped += [f"{what}: {_names(paths)}" for what, paths in self._skipped.items()]
        documents = f", {counted(self.documents, 'document')}" if self.documents else ""
        rest = f"; skipped: {'; '.join(skipped)}" if skipped else ""
        yield f"read {counted(self._files, 'file')}{documents}{rest}"
        for note, paths in self._notes.items():
            yield f"{note}: {_names(paths)}"


def _plural(number: int, noun: str) -> str:
    """Return `1 hidden file or folder` or `2 hidden files or folders`."""
    return counted(number, noun.replace("file or", "files or") if number > 1 else noun)


def _names(paths: Sequence[Path]) -> str:
    """Return the first names, and the number of the others."""
    shown = ", ".join(map(str, paths[:NAMED]))
    return f"{shown} and {len(paths) - NAMED} more" if len(paths) > NAMED else shown


def find(path: str | Path) -> Found:
    """Return the files that a file name, a folder or a glob stands for.

    Hidden files are left out. Links to folders are followed, but each folder is read once; a glob
    with ** follows none.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return Found([path], 0, {})
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which does not exist. Fix the link"
        )
    left_out: dict[str, list[Path]] = {}
    hidden = 0
    if path.is_dir():
        found, hidden = _in_folder(path, left_out)
    elif "**" in path.parts:
        found = list(_below(path, left_out))
    else:
        found = [Path(name) for name in glob.glob(str(path))]
    paths = []
    for name in sorted(set(found)):
        if name.is_file():
            paths.append(name)
        elif name.is_symlink() and not name.exists():
            left_out.setdefault("links to files that do not exist", []).append(name)
        elif not name.is_dir():
            left_out.setdefault("neither files nor folders", []).append(name)
    if not paths:
        problem = "the folder contains no files" if path.is_dir() else "no file matches"
        skipped = "".join(f" ({what}: {_names(names)})" for what, names in left_out.items())
        raise UserError(
            f"{problem}: {path.absolute()}{skipped}. Name a text file, a folder of them or a glob"
        )
    return Found(paths, hidden, left_out)


def _in_folder(top: Path, left_out: dict[str, list[Path]]) -> tuple[list[Path], int]:
    """Return all files below a folder, and the number of hidden entries.

    Links to folders come last, so that a folder that is there twice keeps its own name.
    """
    found: list[Path] = []
    hidden = 0
    seen: set[tuple[int, int]] = set()
    folders, links = deque([top]), deque[Path]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        try:
            there = folder.stat()
            if (there.st_dev, there.st_ino) in seen:
                left_out.setdefault("links to folders already read", []).append(folder)
                continue
            seen.add((there.st_dev, there.st_ino))
            with os.scandir(folder) as entries:
                entries_by_name = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
        for entry in entries_by_name:
            if entry.name.startswith("."):
                hidden += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif entry.is_symlink() and os.path.isdir(entry.path):  # not for a link to itself
                links.append(Path(entry.path))
            else:
                found.append(Path(entry.path))
    return found, hidden


def _below(pattern: Path, left_out: dict[str, list[Path]]) -> Iterator[Path]:
    """Yield the matches of a glob with **; unlike the glob module, follow no link to a folder."""
    magic = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    top, rest = Path(*pattern.parts[:magic]), pattern.parts[magic:]
    for folder, names, _ in os.walk(top):
        names[:] = [name for name in names if not name.startswith(".")]
        linked = [Path(folder, name) for name in names if Path(folder, name).is_symlink()]
        if linked:
            left_out.setdefault("linked folders, which ** does not follow", []).extend(linked)
    if rest[-1] == "**":  # pathlib's ** matches folders only
        rest += ("*",)
    for path in top.glob(str(Path(*rest))):
        hidden = any(part.startswith(".") for part in path.relative_to(top).parts)
        if not hidden or any(part.startswith(".") for part in rest):
            yield path

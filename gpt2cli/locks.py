"""Locks: one process at a time writes a file or a folder."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gpt2cli import paths
from gpt2cli.errors import BusyError, UserError
from gpt2cli.files import cannot_write

try:
    import fcntl
except ImportError:  # on Windows two processes in one folder go unnoticed
    fcntl = None  # type: ignore[assignment]  # checked before use


@contextlib.contextmanager
def locked(path: str | Path, work: str, target: str | Path | None = None) -> Iterator[None]:
    """Let one process at a time do some work; a dead process holds no lock.

    Args:
        path: the lock file, which exists while the lock is held.
        work: name of the work for messages: "download", "train".
        target: file or folder that the work writes, for messages (default: the lock's folder).

    Raises:
        BusyError: another process holds the lock.
        UserError: the lock file cannot be created.
    """
    path = Path(path)
    file = None
    while file is None:
        file = _open_lock(path, work, target or path.parent)
    with file, _folder_of(path) as folder:
        with contextlib.suppress(OSError):  # the lock works on a full disk too
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
            file.flush()
        try:
            yield
        finally:
            place = path if folder is None else path.name
            with contextlib.suppress(OSError):
                found = os.stat(place, dir_fd=folder, follow_symlinks=False)
                if os.path.samestat(found, os.fstat(file.fileno())):
                    os.unlink(place, dir_fd=folder)


@contextlib.contextmanager
def _folder_of(path: Path) -> Iterator[int | None]:
    """Open a file's folder, to find it after a rename too; None where that is impossible."""
    folder = None
    if os.unlink in os.supports_dir_fd:  # not on Windows
        with contextlib.suppress(OSError):  # a folder that this user may write to, but not read
            folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield folder
    finally:
        if folder is not None:
            os.close(folder)


def _open_lock(path: Path, work: str, target: str | Path) -> IO[str] | None:
    """Open and lock a file; None if its last holder removed it between the two."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(paths.open_own(path, "a+", encoding="utf-8"))
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip()
            raise BusyError(
                f"another gpt2cli {work} is writing {target}{f' ({holder})' if holder else ''}. "
                "Wait for it to end, or choose another name"
            ) from None
        except OSError as error:  # a file system without locks
            raise UserError(f"cannot lock {path}: {error.strerror}. Use another disk") from error
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                stack.pop_all()
                return file
    return None


@contextlib.contextmanager
def filling(folder: str | Path, work: str) -> Iterator[None]:
    """Lock a folder as `locked` does; remove it again if nothing was written to it."""
    folder = Path(folder)
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    made: dict[Path, os.stat_result] = {}
    try:
        with locked(folder / ".lock", work):
            made = {each: os.stat(each) for each in missing}
            yield
    finally:
        for empty in missing:
            with contextlib.suppress(OSError):  # not empty: the work succeeded
                # keep a folder that somebody else has put in its place
                if empty not in made or os.path.samestat(os.stat(empty), made[empty]):
                    empty.rmdir()

"""Files and folders: replaced as a whole, read, locked, compared."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gpt2cli.errors import BusyError, UserError

try:
    import fcntl
except ImportError:  # on Windows two processes in one folder go unnoticed
    fcntl = None  # type: ignore[assignment]  # checked before use

SPARE = 2**20  # bytes that must stay free on a disk after a large file is written


@contextlib.contextmanager
def replacing(
    path: str | Path, mode: str = "wb", through: bool = False, **open_options: Any
) -> Iterator[IO[Any]]:
    """Open `path` for writing so that a reader sees either the old file or the whole new one.

    The file is written beside `path` and renamed when the block ends; if the block raises, the old
    file stays. A link is replaced, not followed: it may lead to another's file.

    Args:
        path: the file.
        mode: as in open.
        through: for a path that the user named: replace the target of a link, and write into a
            device, a pipe or a socket.
        open_options: more arguments of open.

    Raises:
        UserError: the folder cannot be created or written to, or the disk is full.
    """
    if through and is_special(path):
        try:
            with open(path, mode, **open_options) as file:
                yield file
        except BrokenPipeError:
            raise
        except OSError as error:
            raise cannot_write(path, error) from error
        return
    path = Path(target_of(path) if through else path)
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, **open_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BrokenPipeError:  # comes from the block, not from this file
        raise
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def not_through_links(path: str, flags: int) -> int:
    """Open a file, as `opener` of open; OSError for a link, which may lead to another's file."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def is_special(path: str | Path) -> bool:
    """Return whether a path is a device, a pipe or a socket: something to write into."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def target_of(path: str | Path) -> str:
    """Return the path that a link leads to, or else the path; devices and pipes keep theirs."""
    is_link = os.path.islink(path) and not is_special(path)
    return os.path.realpath(path) if is_link else str(path)


def sync_folder(path: str | Path) -> None:
    """Flush a folder's names to the disk, on systems that can open a folder."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder that replaces `path` when the block succeeds, and is removed otherwise.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}")
    part, old = beside.with_name(f"{beside.name}.part"), beside.with_name(f"{beside.name}.old")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        part.mkdir(parents=True)
        yield part
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, old)
        os.rename(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if os.path.lexists(old) and not os.path.lexists(path):  # interrupted in between
            os.rename(old, path)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
            with contextlib.suppress(OSError):  # it was a file or a link
                left.unlink()
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty: the block succeeded
                folder.rmdir()


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """Return the UserError for an OSError from writing `path`."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}. Free some space, or choose a folder you "
        "can write to. The previous content is unchanged"
    )


def check_room(path: str | Path, size: int) -> None:
    """Raise UserError if the disk of `path` has no room for `size` bytes."""
    there = next(folder for folder in Path(path).absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < size + SPARE:
        reason = f"it needs {size:,} bytes, but the disk has only {free:,} free"
        raise cannot_write(path, OSError(errno.ENOSPC, reason))


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file; UserError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file; UserError if it cannot be read or is not UTF-8."""
    return decode(read_bytes(path), path)


def decode(content: bytes, where: str | Path) -> str:
    """Return UTF-8 bytes as text, without a byte order mark; UserError names `where` it is from."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: byte {error.start} ({error.reason})") from None


def parse_json(
    content: bytes | str, where: str | Path, hook: Callable[..., Any] | None = None
) -> Any:
    """Return the value of a JSON text; UserError names `where` it is from.

    `hook` is object_pairs_hook of json.loads.
    """
    text = decode(content, where) if isinstance(content, bytes) else content
    try:
        return json.loads(text, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from None


def parse_object(content: bytes | str, where: str | Path) -> dict[str, Any]:
    """Return the object of a JSON text; UserError names `where` it came from.

    An object may have a key twice only with the same value: programs differ in which one counts.
    """

    def with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            for key, value in pairs:
                if values[key] != value:
                    raise UserError(f"{where} has {key!r:.50} twice, with other values. Keep one")
        return values

    values = parse_json(content, where, with_each_key_once)
    if not isinstance(values, dict):
        raise UserError(f"{where} must contain one JSON object. Copy or fetch it again")
    return values


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; UserError if it cannot be read or is not an object."""
    return parse_object(read_bytes(path), path)


def digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal checksum of a file; OSError if it cannot be read."""
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


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
    with file:
        with contextlib.suppress(OSError):  # the lock works on a full disk too
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _open_lock(path: Path, work: str, target: str | Path) -> IO[str] | None:
    """Open and lock a file; None if its last holder removed it between the two."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a+", encoding="utf-8", opener=not_through_links))
        except OSError as error:
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link, and a lock must be a file. Remove the link"
                ) from None
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
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        with locked(folder / ".lock", work):
            yield
    finally:
        for empty in (folder, *missing):
            with contextlib.suppress(OSError):  # not empty: the work succeeded
                empty.rmdir()

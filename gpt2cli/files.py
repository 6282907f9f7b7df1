"""How a file or a folder is replaced so that nobody ever sees half of it, read, and locked."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from pathlib import Path

from gpt2cli.errors import BusyError, UserError

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder go unnoticed there
    fcntl = None

SPARE = 2**20  # bytes that should be left on a disk when a large file has been written


@contextlib.contextmanager
def replacing(path, mode="wb", **open_options):
    """Open `path` for writing so that a reader sees the old file or the whole new one.

    It is written beside `path` and renamed when the block ends; if that raises, the old stays.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, **open_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BrokenPipeError:  # not of this file
        raise
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def sync_folder(path):
    """Have the disk know the names that a folder now has; where a folder cannot be opened, no."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def replacing_folder(path):
    """A new folder that takes the place of `path` when the block ends well, and else goes.

    What is there goes when the new one is in its place.

    Raises:
        UserError: it cannot be made or written to.
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
            with contextlib.suppress(OSError):  # a file or a link stood there
                left.unlink()
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty: all went well
                folder.rmdir()


def cannot_write(path, error):
    """The UserError for an OSError that came from writing `path`."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}. "
        "Free space or choose a folder that you may write to; what was there before is unchanged"
    )


def check_room(path, size):
    """UserError where the disk on which `path` is or will be lacks the room for so many bytes."""
    there = next(folder for folder in Path(path).absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < size + SPARE:
        reason = f"it takes {size:,} bytes, and {free:,} are free on the disk"
        raise cannot_write(path, OSError(errno.ENOSPC, reason))


def read_bytes(path):
    """The bytes of a file; UserError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def read_text(path):
    """The text of a UTF-8 file; UserError where it cannot be read or is something else."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} ({error.reason})") from None


def read_object(path):
    """The object in a JSON file; UserError where it cannot be read or is something else."""
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}). Copy or fetch it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object. Copy or fetch it again")
    return values


def digest(path, algorithm="sha256"):
    """The checksum of a file, in hexadecimal; OSError where it cannot be read."""
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


@contextlib.contextmanager
def locked(path, what, of=None):
    """Let one process at a time do `what`; the lock of one that has died is nobody's.

    Args:
        path: the lock's file, which is there as long as it is held.
        what: the work, for the message: "download", "train".
        of: what the work fills, for the message; by default the lock's folder.

    Raises:
        BusyError: another process is at it.
        UserError: the file cannot be made.
    """
    path = Path(path)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip()
            file.close()
            raise BusyError(
                f"another {what} is filling {of or path.parent}{holder and f' ({holder})'}. "
                "Wait until it ends, or choose another name"
            ) from None
        except OSError as error:  # a file system without locks
            file.close()
            raise UserError(
                f"{path} cannot be locked: {error.strerror}. Use another disk"
            ) from error
        with contextlib.suppress(OSError):  # the one before removed it between open and flock
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()
    with file:
        with contextlib.suppress(OSError):  # a full disk does not keep us from holding the lock
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def filling(folder, what):
    """`locked` of a folder, which goes again if nothing came into it."""
    folder = Path(folder)
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        with locked(folder / ".lock", what):
            yield
    finally:
        for empty in (folder, *missing):
            with contextlib.suppress(OSError):  # not empty: all went well
                empty.rmdir()

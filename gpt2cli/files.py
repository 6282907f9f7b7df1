"""Files and folders: replaced as a whole, read, compared."""

import contextlib
import errno
import functools
import hashlib
import json
import mmap
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from gpt2cli import __version__, paths
from gpt2cli.errors import NewerFormatError, UserError

POPULATE_READ = 22  # Linux's MADV_POPULATE_READ, which Python's mmap does not name
SPARE = 2**20  # bytes that must stay free on a disk after a large file is written

# What the user can do, by the reason why a file cannot be written.
ADVICE = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EIO: "Check the disk",
    errno.EFBIG: "Raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "Make the disk writable",
    errno.EACCES: "Change the permissions",
    errno.EPERM: "Change the permissions",
}


@contextlib.contextmanager
def replacing(
    path: str | Path,
    mode: str = "wb",
    through: bool = False,
    access: int | None = None,
    **open_options: Any,
) -> Iterator[IO[Any]]:
    """Open `path` for writing so that a reader sees either the old file or the whole new one.

    The file is written beside `path` and renamed when the block ends; if the block raises, the old
    file stays. A link is replaced, not followed: it may lead to another's file.

    Args:
        path: the file.
        mode: as in open.
        through: for a path that the user named: replace the target of a link, and write into a
            device, a pipe or a socket. Binary content is written there only when it is complete.
        access: the permissions of the file (default: those of the old file).
        open_options: more arguments of open.

    Raises:
        UserError: the folder cannot be created or written to, the disk is full, or `path` is
            neither a file nor a link.
    """
    if through and paths.is_stream(path):
        with _writing_into(path, mode, **open_options) as file:
            yield file
        return
    path = Path(paths.target_of(path) if through else path)
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        old = _permissions_of(path)
        access = old if access is None else access
        # nobody may open a private file before it has its permissions
        opener = functools.partial(_create, access=0o666 if access is None else 0o600)
        with open(part, mode, opener=opener, **open_options) as file:
            if access is not None:
                with contextlib.suppress(OSError):  # a disk without permissions
                    os.chmod(part, access)
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


@contextlib.contextmanager
def _writing_into(path: str | Path, mode: str, **open_options: Any) -> Iterator[IO[Any]]:
    """Open a stream for writing. Binary content, whose writer may seek, is written at the end.

    Raises:
        UserError: it cannot be written to.
    """
    try:
        if "b" not in mode:
            with paths.open_stream(path, mode, **open_options) as stream:
                yield stream
            return
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with paths.open_stream(path, "wb") as stream:
                shutil.copyfileobj(file, stream)
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write into {path}: {reason}. Choose another output") from error


def _permissions_of(path: Path) -> int | None:
    """Return the permissions of a file that will be replaced; None where there is none.

    Raises:
        UserError: it is neither a file nor a link.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):
        return None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {paths.kind_of(mode)}, not a file. Remove it, or move it away")
    return stat.S_IMODE(mode)


def _create(path: str, flags: int, access: int) -> int:
    """Open a file that must not exist, as `opener` of open."""
    return os.open(path, flags | os.O_EXCL, access)


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
    except UserError as error:  # about a file in `part`: name the folder that the user knows
        error.args = (str(error).replace(str(part), str(path)),)
        raise
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
        f"cannot write {path}: {error.strerror or error}. {advice(error)}, or choose a folder you "
        "can write to. The previous content is unchanged"
    )


def advice(error: OSError) -> str:
    """Return what the user can do about a failed write: "Free some space"."""
    return ADVICE.get(error.errno or 0, "Check the path")


def check_format(record: Mapping[str, Any], known: int, where: str | Path) -> None:
    """Reject (UserError) a record that a later version of gpt2cli wrote in another format.

    Args:
        record: a JSON object with "format" (default: 1), and perhaps "gpt2cli", the version that
            wrote it.
        known: the latest format that this version reads.
        where: the record's file.
    """
    found = record.get("format", 1)
    if type(found) is int and found <= known:
        return
    raise NewerFormatError(
        f"{where} has format {found!r:.20} and was written by gpt2cli "
        f"{record.get('gpt2cli', '(unknown version)')!s:.20}. This is gpt2cli {__version__}, "
        f"which reads formats up to {known}. Install that version, or use another folder"
    )


def check_room(path: str | Path, size: int) -> None:
    """Raise UserError if the disk of `path` has no room for `size` bytes."""
    there = next(folder for folder in Path(path).absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < size + SPARE:
        reason = f"it needs {size:,} bytes, but the disk has only {free:,} free"
        raise cannot_write(path, OSError(errno.ENOSPC, reason))


def fetch(mapped: mmap.mmap, offset: int, size: int) -> None:
    """Have part of a mapped file read now: an error of the disk is an OSError, and SIGBUS later."""
    if sys.platform != "linux":
        return
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        mapped.madvise(POPULATE_READ, start, offset + size - start)
    except OSError as error:
        if error.errno == errno.EFAULT:  # others are of Linux before 5.14, which reads later
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error


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

    A key may appear twice only with the same value, because programs differ in which one they use.
    """

    def with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            for key, value in pairs:
                if values[key] != value:
                    raise UserError(f"{where} has {key!r:.50} twice, with two values. Keep one")
        return values

    values = parse_json(content, where, with_each_key_once)
    if not isinstance(values, dict):
        raise UserError(f"{where} must contain one JSON object. Copy or fetch it again")
    return values


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; UserError if it cannot be read or is not an object."""
    return parse_object(read_bytes(path), path)


def move_away(path: Path) -> Path:
    """Rename a file to NAME.old, NAME.old-2, ..., whichever is free; return the new path."""
    old = paths.unused(f"{path}.old")
    os.replace(path, old)
    return old


def read_own(path: str | Path, known: int) -> dict[str, Any]:
    """Return the object in one of the program's own JSON files; {} if it is missing or damaged.

    Args:
        path: the file.
        known: the latest format that this version reads.

    Raises:
        UserError: another user may have prepared it; see `paths.open_own`.
        NewerFormatError: see `check_format`.
    """
    record: dict[str, Any] = {}
    try:
        with paths.open_own(path, "rb") as file:
            content = file.read()
    except OSError:
        return {}
    with contextlib.suppress(UserError):
        record = parse_object(content, path)
    check_format(record, known, path)
    return record


def digest(path: str | Path, algorithm: str = "sha256", header: bytes = b"") -> str:
    """Return the hexadecimal checksum of a header and a file; OSError if it cannot be read."""
    hasher = hashlib.new(algorithm, header, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()

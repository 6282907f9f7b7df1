"""Checks of paths, made before anything is written.

A path that the user names may be a device, a pipe or a socket, which is written into, or a link,
which is followed. One of the program's own files, such as a lock, may have been prepared by another
user.
"""

import contextlib
import errno
import itertools
import os
import re
import socket
import stat
from pathlib import Path
from typing import IO, Any

from gpt2cli.errors import UsageError, UserError

TRIES = 9  # to create a file while another process creates and removes it
MAX_LINKS = 40  # as in Linux, which takes more links in a row for a loop
# Not 0o666: with a umask of 0 others could write to the file, and `open_own` would reject it.
OWN_MODE = 0o664

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DESCRIPTOR = re.compile(r"/dev/std(in|out|err)|/(?:dev|proc/(?:self|thread-self))/fd/(\d{1,9})")


def kind_of(mode: int) -> str:
    """Return "a link", "a pipe", ... for the st_mode of a path."""
    return _KINDS.get(stat.S_IFMT(mode), "a file")


def descriptor_of(path: str | Path) -> int | None:
    """Return the number of the open file that a path such as /dev/stdout leads to, or None."""
    place = os.fspath(path)
    for _ in range(MAX_LINKS):
        if found := _DESCRIPTOR.fullmatch(place):
            return int(found[2]) if found[2] else ("in", "out", "err").index(found[1])
        try:
            place = os.path.join(os.path.dirname(place), os.readlink(place))
        except (OSError, ValueError):
            return None
    return None


def is_stream(path: str | Path) -> bool:
    """Return whether a path is something to write into: a device, pipe, socket or open file."""
    if descriptor_of(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def target_of(path: str | Path) -> str:
    """Return the path that a link leads to; any other path, and that of a stream, is unchanged."""
    is_link = os.path.islink(path) and not is_stream(path)
    return os.path.realpath(path) if is_link else str(path)


def open_stream(path: str | Path, mode: str, **options: Any) -> IO[Any]:
    """Open a stream to write into it, as open does; nothing is created or truncated."""
    number = descriptor_of(path)
    if number is not None:
        return os.fdopen(os.dup(number), mode, **options)
    if stat.S_ISSOCK(os.stat(path).st_mode):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.fspath(path))
            return os.fdopen(os.dup(connection.fileno()), mode, **options)

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags & ~(os.O_CREAT | os.O_TRUNC))

    return open(path, mode, opener=opener, **options)


def check_file(path: str, flag: str) -> None:
    """Reject, before any work, a path where no file can be written.

    Args:
        path: as the user typed it.
        flag: the flag that names it.

    Raises:
        UsageError: it is empty.
        UserError: it is a folder, a loop of links or an address, or it cannot be written to.
    """
    found = _look_at(path, flag, "file")
    number = descriptor_of(path)
    if number is not None:
        try:
            is_given = os.get_inheritable(number)  # the files of this process are not
        except OSError:
            is_given = False
        if not is_given:
            raise UserError(
                f"cannot write into {path}: no file was opened with this number. Choose another "
                "output"
            )
        return
    if os.path.basename(path) in ("", ".", "..") or (found and stat.S_ISDIR(found.st_mode)):
        raise UserError(f"{path} is a folder; --{flag} takes the name of a file")
    target = Path(target_of(path))
    check_access(target if found and is_stream(path) else target.parent, path, flag)


def check_folder(path: str | Path, flag: str) -> Path:
    """Reject, before any work, a path where no folder can be written.

    Returns:
        The folder, which a link may lead to.

    Raises:
        UsageError: it is empty.
        UserError: something else is there, or it cannot be written to.
    """
    path = os.fspath(path)
    found = _look_at(path, flag, "folder")
    if found is None and os.path.islink(path.rstrip(os.sep)):
        raise UserError(
            f"{path} is a link to {os.readlink(path.rstrip(os.sep))}, which does not exist. "
            "Create that folder, or remove the link"
        )
    if found and not stat.S_ISDIR(found.st_mode):
        kind = kind_of(found.st_mode)
        raise UserError(f"cannot write {path}: it is {kind}, not a folder. Name another folder")
    target = Path(target_of(path.rstrip(os.sep) or path))
    check_access(target, path, flag)
    return target


def check_folder_in(parent: str, name: str, flag: str) -> Path:
    """Reject a folder that cannot be written, as `check_folder` does; return its path.

    Args:
        parent: the folder above it, as the user typed it.
        name: its name.
        flag: the flag that names `parent`.
    """
    check_folder(parent, flag)
    check_folder(Path(parent, name), flag)
    return Path(parent, name)


def _look_at(path: str, flag: str, wanted: str) -> os.stat_result | None:
    """Return the stat of what a path leads to; None if nothing is there."""
    if not path:
        raise UsageError(f"--{flag} must name a {wanted}, got ''")
    if _ADDRESS.match(path):
        raise UserError(f"{path} is an address, not a path on this machine. Name a {wanted}")
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except ValueError:  # a NUL
        raise UsageError(f"--{flag} must name a {wanted}, got {path!r}") from None
    except OSError as error:
        why = "its links form a loop" if error.errno == errno.ELOOP else error.strerror
        raise UserError(f"cannot write {path}: {why}. Name another {wanted}") from None


def check_access(place: Path, path: str | Path, flag: str) -> None:
    """Reject (UserError) `path` if this user may not write to `place` or the folder above it.

    Args:
        place: a stream or a folder; if it does not exist, the first folder above it that does.
        path: the path to name in the message.
        flag: the flag that names it.
    """
    candidates = (place, *place.absolute().parents)
    place = next((each for each in candidates if os.path.lexists(each)), place)
    advice = f"Choose another folder (--{flag})"
    if not place.is_dir() and not is_stream(place):
        raise UserError(f"cannot write {path}: {place} is not a folder. {advice}")
    if not os.access(place, os.W_OK | os.X_OK if place.is_dir() else os.W_OK):
        raise UserError(f"cannot write {path}: no permission to write to {place}. {advice}")


def unused(path: str | Path, ending: str = "") -> Path:
    """Return the first of NAME, NAME-2, NAME-3, ..., each with this ending, where nothing is."""
    names = itertools.chain([f"{path}"], (f"{path}-{number}" for number in itertools.count(2)))
    return next(Path(name + ending) for name in names if not os.path.lexists(name + ending))


def open_own(path: str | Path, mode: str, is_code: bool = False, **options: Any) -> IO[Any]:
    """Open one of the program's own files, if no other user can have prepared it.

    It must be a file, not a link, and if it is written, it must have only one name. It must belong
    to this user, to root, to the owner of its folder, or to a group that may write to the folder:
    they could replace it anyway. Other users must not be able to write to it, unless everyone may
    write to the folder, as on disks without permissions.

    Args:
        path: the file.
        mode: as in open; nothing is truncated before the file has been checked.
        is_code: its content is executed: it must belong to this user or root, and nobody else may
            write to it.
        options: more arguments of open.

    Raises:
        UserError: another user may have prepared it; the message says why.
        OSError: it cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        flags |= getattr(os, "O_NOFOLLOW", 0)
        flags |= getattr(os, "O_NONBLOCK", 0)  # a pipe must not hold this up
        for _ in range(TRIES if flags & os.O_CREAT else 0):
            with contextlib.suppress(FileExistsError):
                return os.open(name, flags | os.O_EXCL, OWN_MODE)
            if os.path.lexists(name):  # and was not removed in between
                break
        if fault := _fault(os.lstat(name), name, flags, is_code):
            raise _not_own(name, fault)
        handle = os.open(name, flags & ~os.O_TRUNC & ~os.O_CREAT)
        try:
            if fault := _fault(os.fstat(handle), name, flags, is_code):
                raise _not_own(name, fault)
            if flags & os.O_TRUNC:
                os.ftruncate(handle, 0)
        except BaseException:
            os.close(handle)
            raise
        return handle

    return open(path, mode, opener=opener, **options)


def _not_own(path: str, fault: str) -> UserError:
    return UserError(f"{path} {fault}, so it is not used. Remove it, then run the command again")


def _fault(found: os.stat_result, path: str, flags: int, is_code: bool) -> str | None:
    """Describe why another user may have prepared a file; None if that is impossible."""
    if not stat.S_ISREG(found.st_mode):
        return f"is {kind_of(found.st_mode)}, not a file"
    if flags & (os.O_WRONLY | os.O_RDWR) and found.st_nlink > 1:
        return "has a second name (a hard link)"
    if not hasattr(os, "geteuid"):  # Windows has no such owners
        return None
    folder = os.stat(os.path.dirname(path) or ".")
    owners = {os.geteuid(), 0} | (set() if is_code else {folder.st_uid})
    if found.st_uid not in owners and (is_code or not _is_shared(found, folder)):
        return f"belongs to user {found.st_uid}"
    open_to_all = folder.st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH
    others = stat.S_IWGRP | stat.S_IWOTH if is_code else 0 if open_to_all else stat.S_IWOTH
    return "can be changed by other users" if found.st_mode & others else None


def _is_shared(found: os.stat_result, folder: os.stat_result) -> bool:
    """Return whether a file is of a group that works in its folder, and that nobody else may use.

    Each of its members could replace the file anyway, and only they can give it this group.
    """
    writers = folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH | stat.S_ISVTX)
    return writers == stat.S_IWGRP and found.st_gid == folder.st_gid


def check_own_folder(path: Path) -> None:
    """Create a folder of this user's own, or make an existing one writable for this user alone.

    Raises:
        UserError: it is not a folder, or it belongs to another user.
        OSError: it cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o755, exist_ok=True)
    if not hasattr(os, "geteuid"):  # Windows
        return
    for found in (path.lstat(), path.stat()):
        if found.st_uid not in (os.geteuid(), 0):
            raise UserError(f"{path} belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        try:
            path.chmod(stat.S_IMODE(found.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
        except OSError:
            raise UserError(f"{path} can be changed by other users") from None

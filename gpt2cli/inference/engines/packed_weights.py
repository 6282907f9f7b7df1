"""The packed weights of a checkpoint on disk, so that later starts map them.

Packing takes longer than everything else when a model is loaded, and every process keeps its own
packed weights in memory. The files here are mapped instead: no weight is read, and processes share
them. LiteRT writes and reads such files itself, but it checks neither their content nor whose
weights they are, and aborts the process on a full disk. So it packs into memory here, the file is
written from there, and a file is used only if its name and its checksums are right.

A checkpoint's files are written when it is loaded for the second time: the first time leaves an
empty file as a mark. Only Linux has the files in memory that this needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from gpt2cli import console, files, locks, machine, paths
from gpt2cli.errors import BusyError, UserError
from gpt2cli.inference.engines import skeletons
from gpt2cli.inference.engines.litert_runtime import CompiledModel

FORMAT = 1  # of the files; part of their names' digest
LEAST = 2**24  # bytes; packing fewer takes no longer than reading them from a file
RECENT = 3600  # seconds; files that were used since are not removed to make room
FORGOTTEN = 30 * 86400  # seconds after which the mark of a checkpoint's first use is removed
PATIENCE = 60  # seconds to wait for another process that packs the same weights
# Lines of /proc/cpuinfo that decide which kernels XNNPACK takes, and so how it packs.
PROCESSOR = (
    *("vendor_id", "cpu family", "model", "flags"),
    *("CPU implementer", "CPU variant", "CPU part", "Features"),
)


class Built(NamedTuple):
    """A program that was assembled and packed.

    Args:
        model: ready to run.
        head: the start of its file: everything but the matrices.
        size: bytes of its file.
    """

    model: CompiledModel
    head: bytes
    size: int


class PackedWeights:
    """The files of one checkpoint.

    Args:
        identity: a digest of the checkpoint's content.
        most: bytes that the files of all checkpoints may have.
    """

    def __init__(self, identity: bytes, most: int) -> None:
        self._identity, self._most = identity, most
        self._written = 0  # bytes
        usable = hasattr(os, "memfd_create") and google_crc32c.implementation == "c"
        self._folder = skeletons.cache_folder() if usable else None

    def model(
        self, what: tuple[object, ...], size: int, build: Callable[[int | None], Built]
    ) -> CompiledModel:
        """Return a program with the packed weights on disk, or else built.

        Args:
            what: describes the program, in addition to the checkpoint.
            size: about the bytes of its packed weights.
            build: builds it; if it is given a descriptor, the packed weights go to that file.
        """
        if self._folder is None or size < LEAST:
            return build(None).model
        key = hashlib.sha256(repr((FORMAT, self._identity, *what)).encode())
        key.update(repr((_library(), _processor())).encode())
        kept = _Kept(self._folder, key.digest())
        model = kept.load()
        if model or not self._may_write(kept, size):
            return model or build(None).model
        try:
            with _waiting(kept.path("lock")):
                return kept.load() or self._built(kept, build)
        except (BusyError, OSError, UserError):  # nothing can be kept
            return build(None).model

    def report(self) -> None:
        """Print what was written."""
        if self._written:
            console.say(
                f"kept the packed weights ({self._written / 1e6:,.0f} MB) in {self._folder}: the "
                "next starts are faster (--weight_cache 0 keeps none)"
            )

    def _may_write(self, kept: _Kept, size: int) -> bool:
        """Return whether the weights should be kept; leave a mark if this is their first use."""
        import resource  # not on Windows, where nothing is kept

        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        is_limited = limit != resource.RLIM_INFINITY and limit < 2 * size
        if is_limited or size > self._most:
            return False
        try:
            if shutil.disk_usage(kept.folder).free < 3 * size:  # and as much stays free
                return False
            kept.path("seen").touch(exist_ok=False)
        except FileExistsError:
            return True
        except OSError:  # the folder is read-only, or does not exist
            return False
        _tidy(kept.folder)
        return False

    def _built(self, kept: _Kept, build: Callable[[int | None], Built]) -> CompiledModel:
        """Build a program, write its files, and return the program that uses them."""
        for left in kept.folder.glob(f"{kept.name}.*.part"):  # of a process that was killed
            left.unlink()
        packed = os.memfd_create("packed weights")
        try:
            built = build(packed)
            size = os.fstat(packed).st_size
            if not _make_room(kept.folder, size, self._most):
                return built.model
            with contextlib.suppress(OSError, UserError):  # the disk is full now
                kept.write(built, packed)
                self._written += size
                return kept.load() or built.model
            return built.model
        finally:
            os.close(packed)


class _Kept:
    """The files of one program: NAME.packed, NAME.head and NAME.seen.

    Args:
        folder: contains them.
        key: a digest of everything that they depend on.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        self.folder, self.name, self._key = folder, key.hex()[:32], key
        self._has_said = False  # what is wrong with the files

    def path(self, kind: str) -> Path:
        """Return the path of a file."""
        return self.folder / f"{self.name}.{kind}"

    def load(self) -> CompiledModel | None:
        """Return the program of the files; None if there are none that can be used."""
        again = "gpt2cli packs the weights again"
        try:
            return self._opened()
        except FileNotFoundError:
            return None
        except UserError as error:
            fault = f"{error}. For this command, gpt2cli packs the weights again"
        except OSError as error:
            fault = f"cannot read {self.path('packed')}: {error.strerror}. {again}"
        except (ValueError, RuntimeError) as error:
            fault = f"{self.path('packed')} is damaged ({error}). {again}"
        if not self._has_said:  # the second look at the same files
            console.say(fault)
        self._has_said = True
        return None

    def _opened(self) -> CompiledModel:
        """Return the program of the files, checked; see `load` for the errors."""
        with paths.open_own(self.path("head"), "rb", is_code=True) as file:
            numbers, _, head = self._unsealed(file.read()).partition(b"\n")
        with paths.open_own(self.path("packed"), "rb", is_code=True) as file:
            size, *expected = json.loads(numbers)
            if _measured(file.fileno()) != expected:
                raise ValueError("its checksum is wrong")
            model = _compiled(head, size, file.fileno())
        with contextlib.suppress(OSError):  # the folder is read-only
            os.utime(self.path("head"))  # it is the most recently used
        return model

    def write(self, built: Built, packed: int) -> None:
        """Write the files.

        Raises:
            UserError: the disk is full, or something that is not a file has one of the names.
        """
        with (
            mmap.mmap(packed, 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as numbers,
            files.replacing(self.path("packed"), access=0o444) as file,
        ):
            file.write(numbers)
        made = json.dumps([built.size, *_measured(packed)]).encode() + b"\n" + built.head
        with files.replacing(self.path("head"), access=0o644) as file:
            file.write(skeletons.sealed(made, self._key))

    def _unsealed(self, content: bytes) -> bytes:
        """Return what `skeletons.sealed` sealed with this key (ValueError)."""
        made = content[hashlib.sha256().digest_size :]
        if content != skeletons.sealed(made, self._key):
            raise ValueError("the checksum of its .head is wrong")
        return made


def _compiled(head: bytes, size: int, packed: int) -> CompiledModel:
    """Return a program whose matrices are only in the packed file.

    In the program's own file they are a hole. If LiteRT looked into it, it would find zeros and
    pack them; but then this file in memory would have grown.

    Raises:
        ValueError: it did; the packed file is not one for this program and this processor.
        RuntimeError: it cannot be loaded.
    """
    program = os.memfd_create("program")
    try:
        os.write(program, head)
        os.truncate(program, size)
        before = os.fstat(program).st_blocks
        model = CompiledModel(program, size, machine.cores(), Path(f"/proc/self/fd/{packed}"))
        if os.fstat(program).st_blocks != before:
            raise ValueError("it lacks a weight")
        return model
    finally:
        os.close(program)


def _measured(file: int) -> list[int]:
    """Return the size and the CRC-32C of a file."""
    size = os.fstat(file).st_size
    if not size:
        return [0, 0]
    with mmap.mmap(file, size, access=mmap.ACCESS_READ) as mapped:
        files.fetch(mapped, 0, size)
        data = np.frombuffer(mapped, np.uint8)
        try:
            return [size, google_crc32c.value(data)]
        finally:
            del data  # else the file cannot be unmapped


@contextlib.contextmanager
def _waiting(path: Path) -> Iterator[None]:
    """Hold a lock; wait if another process holds it (BusyError)."""
    end = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locks.locked(path, "start"))
                break
            except BusyError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
        yield


def _make_room(folder: Path, size: int, most: int) -> bool:
    """Remove the least recently used files until `size` bytes more are allowed.

    Returns:
        False if that would take files that were just used; then nothing is removed.
    """
    kept = []
    for path in folder.glob("*.packed"):
        with contextlib.suppress(OSError):  # another process removed it
            kept.append((path.with_suffix(".head").stat().st_mtime, path.stat().st_size, path))
    kept.sort()
    total, old = sum(size for _, size, _ in kept), []
    while kept and total + size > most:
        used, freed, path = kept.pop(0)
        if used > time.time() - RECENT:
            return False
        total -= freed
        old.append(path)
    for path in old:
        for kind in (".head", ".packed", ".seen"):
            path.with_suffix(kind).unlink(missing_ok=True)
    if old:
        console.say(
            f"removed {console.counted(len(old), 'file')} of packed weights from {folder}, the "
            "least recently used, to make room (--weight_cache)"
        )
    return True


def _tidy(folder: Path) -> None:
    """Remove old marks, and unfinished files of processes that were killed."""
    for pattern, age in (("*.seen", FORGOTTEN), ("*.part", RECENT)):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                is_used = path.with_suffix(".packed").exists()
                if not is_used and path.stat().st_mtime < time.time() - age:
                    path.unlink()


def _library() -> tuple[int, int]:
    """Return size and date of LiteRT's library; importlib.metadata takes longer than all else."""
    spec = util.find_spec("ai_edge_litert")
    assert spec and spec.origin, "setup.py requires it"
    found = os.stat(Path(spec.origin).with_name("libLiteRt.so"))
    return found.st_size, found.st_mtime_ns


def _processor() -> str:
    """Return what decides which kernels run."""
    lines = set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in PROCESSOR:
                lines.add((name.strip(), " ".join(sorted(value.split()))))
    return repr((platform.machine(), sorted(lines)))

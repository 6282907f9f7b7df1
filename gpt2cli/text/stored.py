"""Token ids in .npz and .npy files, written in bounded memory and checked when they are read."""

import contextlib
import io
import itertools
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpt2cli import files, machine, paths
from gpt2cli.errors import UserError
from gpt2cli.text import marks

ZIP = b"PK"  # the first bytes of an archive, also of an empty one
HEADER = 10_000  # bytes; NumPy's own limit (max_header_size)
BOMB = 2**30  # bytes to which any array may unpack
SPOOL = 2**25  # bytes of a chunk that wait in memory until its end is known

Ids = tuple[np.ndarray, bool]  # some ids of a chunk, and whether the chunk ends with them
LAST: Ids = (np.empty(0, np.int32), True)  # ends the last chunk where no other ids do


def dtype_of(n_vocab: int) -> np.dtype:
    """Return uint16 if all ids fit into it, else int32."""
    return np.dtype(np.uint16 if n_vocab <= 2**16 else np.int32)


def save_npz(path: str | Path, parts: Iterable[Ids]) -> None:
    """Write the output of `encode` as nshepperd/gpt-2's encode.py does: chunks as arr_0, arr_1, ...

    An array's length comes before its ids, so a long chunk waits on the disk for its end.

    Raises:
        UserError: the file cannot be written.
    """
    dtype: np.dtype | None = None  # of the chunk
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(files.replacing(path, through=True))
        beside = None if paths.is_stream(path) else os.path.dirname(paths.target_of(path)) or "."
        chunk = stack.enter_context(tempfile.SpooledTemporaryFile(SPOOL, dir=beside))
        # The fastest level: encoding should not wait for the compressor.
        archive = stack.enter_context(
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        )
        for ids, ends in itertools.chain(parts, [LAST]):
            if len(ids):
                dtype = _append(chunk, ids, 0, dtype or ids.dtype)
            if ends and dtype:
                _add_member(archive, chunk, dtype)
                chunk.seek(0)
                chunk.truncate()
                dtype = None


def _append(file: IO[bytes], ids: np.ndarray, start: int, dtype: np.dtype) -> np.dtype:
    """Write ids at the end of a file of ids of a type; return the type that the file then has.

    Marked ids after plain ones of 16 bits make the file one of 32 bits.

    Args:
        file: open for reading and writing, and at its end.
        ids: one or more.
        start: the place of the first id.
        dtype: the type of the ids in the file.
    """
    if marks.is_marked(ids) and dtype.kind == "u":
        dtype, narrow = ids.dtype, dtype
        for stop in range((file.tell() - start) // narrow.itemsize, 0, -(2**20)):
            first = max(stop - 2**20, 0)  # from the back, so that no id is overwritten unread
            file.seek(start + first * narrow.itemsize)
            block = np.frombuffer(file.read((stop - first) * narrow.itemsize), narrow)
            file.seek(start + first * dtype.itemsize)
            file.write(block.astype(dtype).data)
        file.seek(0, os.SEEK_END)
    file.write(ids.astype(dtype, copy=False).data)
    return dtype


def _add_member(archive: zipfile.ZipFile, chunk: IO[bytes], dtype: np.dtype) -> None:
    """Write a file of ids into a zip archive as its next array."""
    header = _header(dtype, chunk.tell() // dtype.itemsize)
    with archive.open(f"arr_{len(archive.filelist)}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        chunk.seek(0)
        shutil.copyfileobj(chunk, member)


def _header(dtype: np.dtype, length: int) -> dict[str, Any]:
    """Return the NumPy header of a 1-D array."""
    descr = np.lib.format.dtype_to_descr(dtype)
    return {"descr": descr, "fortran_order": False, "shape": (length,)}


def save_npy(path: str | Path, parts: Iterable[Ids], dtype: np.dtype) -> None:
    """Write the output of `encode` as one 1-D array that np.load can map, in bounded memory.

    Raises:
        UserError: the file cannot be written.
    """
    total = 0
    with files.replacing(path, "w+b", through=True) as file:
        # NumPy pads the header so that a longer shape fits into the same place.
        np.lib.format.write_array_header_1_0(file, _header(dtype, 0))
        start = file.tell()
        for ids, _ in parts:
            dtype = _append(file, ids, start, dtype) if len(ids) else dtype
            total += len(ids)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, _header(dtype, total))
        assert file.tell() == start, (file.tell(), start)


def check_range(ids: np.ndarray, n_vocab: int, where: str) -> int:
    """Raise UserError if an id is not in [0, n_vocab); return the lowest stored id, 0 if none.

    Only in an int32 array are negative ids marks.
    """
    lowest = 0
    for start in range(0, len(ids), 2**24):  # bounded memory for a mapped file
        block = ids[start : start + 2**24]
        low, high = int(block.min()), int(block.max())
        lowest = min(lowest, low)
        if low < 0 and ids.dtype == np.int32:
            block = marks.ids_of(block)
            low, high = int(block.min()), int(block.max())
        for value in (low, high):
            if not 0 <= value < n_vocab:
                raise UserError(
                    f"{where} has token {value}, but the model knows only 0 to {n_vocab - 1}. "
                    "Encode the text with the vocabulary of this model"
                )
    return lowest


def read(path: Path, n_vocab: int) -> Iterator[np.ndarray]:
    """Yield the checked chunks of an .npz (of any program) or .npy, which is mapped, not read.

    Raises:
        UserError: the file is damaged or does not contain ids, or an .npz does not fit into memory.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(ZIP)) == ZIP:
                yield from _of_archive(path, n_vocab)
                return
            file.seek(0)
            _shape_of(file)
        yield _checked(np.load(path, mmap_mode="r"), n_vocab, f"{path}: the array")
    except UserError:
        raise
    except Exception as error:  # NumPy reads a header with Python's parser, which raises anything
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is damaged or not a NumPy file ({reason:.200}). Make it again with: gpt2cli "
            "encode"
        ) from None


def _of_archive(path: Path, n_vocab: int) -> Iterator[np.ndarray]:
    """Yield the arrays of a zip archive; see `read`.

    Raises:
        ValueError: a member is not an array, or is shorter than its header says.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_size(path, members)
        if len({member.filename for member in members}) != len(members):
            raise ValueError("two of its arrays have the same name")
        for member in members:
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                shape, dtype = _shape_of(file)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{name:.50} is shorter than its header says")
            with archive.open(member) as file:
                found = np.lib.format.read_array(file, allow_pickle=False)
            yield _checked(found, n_vocab, f"{path}: {name:.50}")


def _check_size(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Reject (UserError) an archive that unpacks to more than text would, or than fits into memory.

    Real text is never that small: 2 bytes per token compress to a tenth, and the same token again
    and again to a 500th.
    """
    # several members may be the same bytes of the file
    packed = min(sum(member.compress_size for member in members), path.stat().st_size)
    size = sum(member.file_size for member in members)
    if size > max(BOMB, 200 * packed):
        raise UserError(
            f"{path} would unpack from {packed:,} to {size:,} bytes, which looks like an attack. "
            "If the file is yours, encode the text to a .npy"
        )
    free = machine.free_memory()
    if free is not None and size > free:
        raise UserError(
            f"{path} unpacks to {size:,} bytes, but only {free:,} bytes of memory are free. Encode "
            "the text to a .npy, which is not read into memory"
        )


def _shape_of(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and type that the header of an array states.

    Raises:
        ValueError: it is not a header, or too long: NumPy would read all of it first.
    """
    start = file.read(12)
    np.lib.format.read_magic(io.BytesIO(start))
    is_first = start[6:7] == b"\1"
    length = int.from_bytes(start[8:10] if is_first else start[8:12], "little")
    if length > HEADER:
        raise ValueError(f"its header has {length:,} bytes")
    header = io.BytesIO(start + file.read(length))
    np.lib.format.read_magic(header)
    reader = np.lib.format.read_array_header_1_0
    shape, _, dtype = (reader if is_first else np.lib.format.read_array_header_2_0)(header)
    return shape, dtype


def _checked(ids: Any, n_vocab: int, where: str) -> np.ndarray:
    """Return an array of ids; UserError if it is not a 1-D one of ids below n_vocab."""
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        kind = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else "no array"
        raise UserError(
            f"{where} is {kind}, not a 1-D array of integers. Make it with: gpt2cli encode"
        )
    check_range(ids, n_vocab, where)
    return ids

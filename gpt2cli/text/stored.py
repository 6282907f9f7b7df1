"""Token ids in .npz and .npy files, written in bounded memory and checked when they are read."""

import contextlib
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

from gpt2cli import files, paths
from gpt2cli.errors import UserError
from gpt2cli.text import marks

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
        UserError: the file is damaged or does not contain ids.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            yield _checked(loaded, n_vocab, f"{path}: the array")
            return
        with loaded as archive:
            _check_size(str(path), archive.zip.infolist())
            for name in archive.files:
                _check_member(archive.zip, f"{name}.npy", path)
                yield _checked(archive[name], n_vocab, f"{path}: {name}")
    except UserError:
        raise
    except Exception as error:  # NumPy reads a header with Python's parser, which raises anything
        raise UserError(
            f"{path} is damaged or not a NumPy file ({error}). Make it again with: gpt2cli encode"
        ) from None


def _check_size(where: str, members: Sequence[zipfile.ZipInfo]) -> None:
    """Reject (UserError) members of an archive that unpack to far more than any text does.

    Real text is never that small: 2 bytes per token compress to a tenth, and the same token again
    and again to a 500th.
    """
    packed = sum(member.compress_size for member in members)
    size = sum(member.file_size for member in members)
    if size > max(BOMB, 200 * packed):
        raise UserError(
            f"{where} would unpack from {packed:,} to {size:,} bytes, which looks like an attack. "
            "If the file is yours, encode the text to a .npy"
        )


def _check_member(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    """Reject an array that would take far more memory than its file, before it is read.

    Raises:
        ValueError: the array is shorter than its header says.
        UserError: the array would unpack to far more than any text.
    """
    if name not in archive.namelist():
        raise ValueError(f"{name} is not in it")
    member = archive.getinfo(name)
    _check_size(f"{path}: {name}", [member])
    with archive.open(name) as file:
        if np.lib.format.read_magic(file) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{name} is shorter than its header says")


def _checked(ids: Any, n_vocab: int, where: str) -> np.ndarray:
    """Return an array of ids; UserError if it is not a 1-D one of ids below n_vocab."""
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        kind = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else "no array"
        raise UserError(
            f"{where} is {kind}, not a 1-D array of integers. Make it with: gpt2cli encode"
        )
    check_range(ids, n_vocab, where)
    return ids

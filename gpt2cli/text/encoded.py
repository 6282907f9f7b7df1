"""Text files -> token ids, in memory or in an .npz or .npy file."""

import collections
import contextlib
import itertools
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.options import TextOptions
from gpt2cli.text import corpus
from gpt2cli.text.batches import Tokens
from gpt2cli.text.corpus import ENCODED, Part, Progress
from gpt2cli.text.encoder import Encoder

BOMB = 2**30  # bytes to which any array may unpack
SPOOL = 2**25  # bytes of a chunk that wait in memory until its end is known
SEPARATOR_LENGTH = len("<|endoftext|>")  # counts for --combine, as in nshepperd/gpt-2

Ids = tuple[np.ndarray, bool]  # some ids of a chunk, and whether the chunk ends with them
LAST: Ids = (np.empty(0, np.int32), True)  # ends the last chunk where no other ids do
Group = list[Part | None] | np.ndarray  # parts with None where a chunk ends, or a whole chunk
Seen = Callable[[str, np.ndarray, bool], None]


def dtype_of(n_vocab: int) -> np.dtype:
    """Return uint16 if all ids fit into it, else int32."""
    return np.dtype(np.uint16 if n_vocab <= 2**16 else np.int32)


def encode(
    paths: Iterable[Path],
    encoder: Encoder | None,
    options: TextOptions,
    n_vocab: int,
    progress: Progress = lambda size: None,
    seen: Seen | None = None,
) -> Iterator[Ids]:
    """Encode files, with the real end token after each document (WordPiece: [CLS] ... [SEP]).

    Files shorter than `options.combine` characters share a chunk with those after them. The chunks
    of an encoded file stay as they are.

    Args:
        paths: from `corpus.find`.
        encoder: the vocabulary, or None if no path is text.
        options: how to read text.
        n_vocab: the model's; every id must be below it.
        progress: called with the number of bytes just read.
        seen: called with each text, its ids without separators and whether a document ends with
            it, from several threads.

    Yields:
        (1-D array, whether it ends a chunk): long chunks come in parts. The array's type is
        `dtype_of(n_vocab)`; a mapped .npy keeps the type of its file.

    Raises:
        UserError: a file cannot be read, is not text in that encoding, or contains wrong ids.
    """
    dtype = dtype_of(n_vocab)

    def encode_group(group: Group) -> list[Ids]:
        if isinstance(group, np.memmap):
            return [(group, True)]
        if isinstance(group, np.ndarray):
            return [(group.astype(dtype), True)]
        assert encoder is not None
        documents = [part for part in group if part]
        texts = [part.text for part in documents]
        arrays = encoder.arrays(texts, special=options.special == "token") if texts else []
        if seen:
            for part, ids in zip(documents, arrays, strict=True):
                seen(part.text, ids, part.closes)
        parts = list(_assemble(group, iter(arrays), encoder))
        for ids, _ in parts:
            _check_range(ids, n_vocab, "the text in this folder's vocabulary")
        return [(ids.astype(dtype), ends) for ids, ends in parts]

    groups = _groups(paths, encoder, options, n_vocab, progress)
    with _no_threads_inside():
        for parts in _in_order(encode_group, groups, options.workers):
            yield from parts


def load(path: str | Path, encoder: Encoder | None, options: TextOptions, n_vocab: int) -> Tokens:
    """Return the tokens of a text, .csv, .jsonl, .npz or .npy file, a folder or a glob.

    Raises:
        UserError: see `corpus.find` and `encode`; or there are fewer than 2 tokens.
    """
    return Tokens(list(chunks(encode(corpus.find(path), encoder, options, n_vocab))), path)


def chunks(parts: Iterable[Ids]) -> Iterator[np.ndarray]:
    """Join the output of `encode` to one array per chunk; empty chunks are left out."""
    chunk: list[np.ndarray] = []
    for ids, ends in itertools.chain(parts, [LAST]):
        if len(ids):
            chunk.append(ids)
        if ends and chunk:
            yield chunk[0] if len(chunk) == 1 else np.concatenate(chunk)
            chunk = []


def _groups(
    paths: Iterable[Path],
    encoder: Encoder | None,
    options: TextOptions,
    n_vocab: int,
    progress: Progress,
) -> Iterator[Group]:
    """Yield the work of one thread at a time."""
    group: list[Part | None] = []
    size = 0  # characters in the group
    length = 0  # characters in the chunk, with its separators
    for path in paths:
        if path.suffix.lower() in ENCODED:
            if group or length:
                yield [*group, None]
                group, size, length = [], 0, 0
            yield from _read_encoded(path, n_vocab)
            progress(path.stat().st_size)
            continue
        if encoder is None:
            raise UserError(
                f"{path} is text, but the model folder has no vocabulary to read it with. Copy "
                "the vocabulary files into it, or use an encoded .npz or .npy"
            )
        for part in corpus.parts_of(path, encoder.CUT, options, progress):
            group.append(part)
            size += len(part.text) + 1  # blank lines take memory too
            length += len(part.text) + (SEPARATOR_LENGTH if part.closes else 0)
            if size >= corpus.BLOCK:
                yield group
                group, size = [], 0
        # nshepperd/gpt-2 load_dataset.py compares the length without the last separator.
        if length - SEPARATOR_LENGTH >= options.combine:
            group.append(None)
            length = 0
    if length:
        group.append(None)
    if group:
        yield group


def _in_order(
    encode_group: Callable[[Group], list[Ids]], groups: Iterable[Group], workers: int
) -> Iterator[list[Ids]]:
    """Encode groups in N threads (0: one per core), at most a few ahead of the consumer.

    Threads and not processes: tiktoken and tokenizers release the interpreter lock while they
    encode, and threads share the vocabulary and need no pipe for the ids.
    """
    workers = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    waiting: collections.deque[Future[list[Ids]]] = collections.deque()
    try:
        for group in groups:
            waiting.append(pool.submit(encode_group, group))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_threads_inside() -> Iterator[None]:
    """Keep `tokenizers` from spreading each call over all cores, unless the user set it to.

    It would do so whatever --workers says.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ.setdefault(name, "false")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def _assemble(
    group: Iterable[Part | None], arrays: Iterator[np.ndarray], encoder: Encoder
) -> Iterator[Ids]:
    """Put separators around the ids of a group's documents; yield as `encode` does."""
    before = np.array(encoder.prefix, np.int32)
    after = np.array(encoder.after, np.int32)
    found = [before[:0]]
    for part in group:
        if part is None:
            yield np.concatenate(found), True
            found = [before[:0]]
            continue
        if part.opens:
            found.append(before)
        found.append(next(arrays))
        if part.closes:
            found.append(after)
    yield np.concatenate(found), False


def save_npz(path: str | Path, parts: Iterable[Ids]) -> None:
    """Write the output of `encode` as nshepperd/gpt-2's encode.py does: chunks as arr_0, arr_1, ...

    An array's length comes before its ids, so a long chunk waits on the disk for its end.

    Raises:
        UserError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(files.replacing(path))
        chunk = stack.enter_context(
            tempfile.SpooledTemporaryFile(SPOOL, dir=str(Path(path).parent))
        )
        # The fastest level: encoding should not wait for the compressor.
        archive = stack.enter_context(
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        )
        for ids, ends in itertools.chain(parts, [LAST]):
            if len(ids):
                chunk.write(ids.data)
                dtype = ids.dtype
            if ends and chunk.tell():
                _add_member(archive, chunk, dtype)
                chunk.seek(0)
                chunk.truncate()


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
    with files.replacing(path) as file:
        # NumPy pads the header so that a longer shape fits into the same place.
        np.lib.format.write_array_header_1_0(file, _header(dtype, 0))
        start = file.tell()
        for ids, _ in parts:
            file.write(ids.astype(dtype, copy=False).data)
            total += len(ids)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, _header(dtype, total))
        assert file.tell() == start, (file.tell(), start)


def _check_range(ids: np.ndarray, n_vocab: int, where: str) -> None:
    """Raise UserError if an id is not in [0, n_vocab)."""
    for start in range(0, len(ids), 2**24):  # bounded memory for a mapped file
        block = ids[start : start + 2**24]
        for value in (int(block.min()), int(block.max())):
            if not 0 <= value < n_vocab:
                raise UserError(
                    f"{where} has token {value}, but the model knows only 0 to {n_vocab - 1}. "
                    "Encode the text with the vocabulary of this model"
                )


def _read_encoded(path: Path, n_vocab: int) -> Iterator[np.ndarray]:
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
            for name in archive.files:
                _check_member(archive.zip, f"{name}.npy", path)
                yield _checked(archive[name], n_vocab, f"{path}: {name}")
    except UserError:
        raise
    except Exception as error:  # NumPy reads a header with Python's parser, which raises anything
        raise UserError(
            f"{path} is damaged or not a NumPy file ({error}). Make it again with: gpt2cli encode"
        ) from None


def _check_member(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    """Reject an array that would take far more memory than its file, before it is read.

    Real text is never that small: 2 bytes per token compress to a tenth, and the same token again
    and again to a 500th.

    Raises:
        ValueError: the array is shorter than its header says.
        UserError: the array would unpack to far more than any text.
    """
    if name not in archive.namelist():
        raise ValueError(f"{name} is not in it")
    member = archive.getinfo(name)
    if member.file_size > max(BOMB, 200 * member.compress_size):
        raise UserError(
            f"{path}: {name} would unpack from {member.compress_size:,} to {member.file_size:,} "
            "bytes, which looks like an attack. If the file is yours, encode the text to a .npy"
        )
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
    _check_range(ids, n_vocab, where)
    return ids

"""Text files -> token ids, in memory or in an .npz or .npy file."""

import collections
import contextlib
import itertools
import math
import os
import shutil
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.text import corpus
from gpt2cli.text.batches import Tokens
from gpt2cli.text.corpus import ENCODED

BOMB = 2**30  # bytes to which anything may unpack
SPOOL = 2**25  # bytes of a chunk that wait for its end in memory
SEPARATOR_LENGTH = len("<|endoftext|>")  # counts for --combine as in nshepperd/gpt-2


def dtype_of(n_vocab):
    """The smaller of two integer types that holds all ids."""
    return np.dtype(np.uint16 if n_vocab <= 2**16 else np.int32)


def encode(paths, encoder, settings, n_vocab=None, progress=lambda size: None, seen=None):
    """Files -> token ids, after each document the real end token (WordPiece: [CLS] ... [SEP]).

    Files shorter than `settings.combine` characters share a chunk with those after them; the
    chunks of an encoded file are taken as they are.

    Args:
        paths: from `find`.
        encoder: from encoder.load, or None if no path is text.
        settings: a TextOptions.
        n_vocab: ids must be below it; the encoder's if not given.
        progress: is told the bytes that were read.
        seen: is given each text, its ids without separators and whether a document ends with it,
            from several threads.

    Yields:
        (1-D array, whether it ends a chunk): long chunks come in parts. The array's type is
        dtype_of(n_vocab), or, of a mapped .npy, what it is in the file.

    Raises:
        UserError: a file cannot be read, is not text in that encoding, or holds wrong ids.
    """
    n_vocab = n_vocab or encoder.n_vocab
    dtype = dtype_of(n_vocab)

    def encode_group(group):
        if isinstance(group, np.memmap):
            return [(group, True)]
        if isinstance(group, np.ndarray):
            return [(group.astype(dtype), True)]
        documents = [part for part in group if part]
        texts = [part.text for part in documents]
        arrays = encoder.arrays(texts, special=settings.special == "token") if texts else []
        if seen:
            for part, ids in zip(documents, arrays, strict=True):
                seen(part.text, ids, part.closes)
        parts = list(_assemble(group, iter(arrays), encoder))
        for ids, _ in parts:
            _check_range(ids, n_vocab, "the text in this folder's vocabulary")
        return [(ids.astype(dtype), ends) for ids, ends in parts]

    groups = _groups(paths, encoder, settings, n_vocab, progress)
    with _no_threads_inside():
        for parts in _in_order(encode_group, groups, settings.workers):
            yield from parts


def load(path, encoder, settings, n_vocab):
    """The tokens of a text, .csv, .jsonl, .npz or .npy file, folder or glob, as `Tokens`.

    Args:
        encoder: from encoder.load, or None if the model folder has no vocabulary.
        settings: a TextOptions.
        n_vocab: of the model; every id must be below it.

    Raises:
        UserError: nothing there, not readable, not for this model, or fewer than 2 tokens.
    """
    parts = encode(corpus.find(path), encoder, settings, n_vocab)
    chunks = [c[0] if len(c) == 1 else np.concatenate(c) for c in _chunks(parts)]
    return Tokens(chunks, path)


def _groups(paths, encoder, settings, n_vocab, progress):
    """Work for the threads: lists of Part with None where a chunk ends, or chunks read ready."""
    group, size, length = [], 0, 0
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
                f"{path} is text, and this model folder has no vocabulary to read it with. Copy "
                "the vocabulary files into it, or give an encoded .npz or .npy"
            )
        for part in corpus.parts_of(path, encoder.CUT, settings, progress):
            group.append(part)
            size += len(part.text) + 1  # blank lines take memory too
            length += len(part.text) + SEPARATOR_LENGTH * part.closes
            if size >= corpus.BLOCK:
                yield group
                group, size = [], 0
        # nshepperd/gpt-2 load_dataset.py asks for the length without the last separator.
        if length - SEPARATOR_LENGTH >= settings.combine:
            group.append(None)
            length = 0
    if length:
        group.append(None)
    if group:
        yield group


def _in_order(function, items, workers):
    """map() in so many threads, 0 for one a core; a few items ahead of the consumer at most.

    Threads and not processes: tiktoken and tokenizers let go of the interpreter lock while they
    encode, and threads need neither a copy of the vocabulary each nor a pipe for the ids.
    """
    workers = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_threads_inside():
    """Let a call of `tokenizers` run in its caller's thread alone; a user's own choice stays.

    By itself it spreads every call over all cores, whatever --workers says.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ.setdefault(name, "false")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def _assemble(group, arrays, encoder):
    """Put separators around the ids of a group's documents: yields what `encode` yields."""
    before = np.array(encoder.prefix, np.int32)
    after = np.array([] if encoder.end is None else [encoder.end], np.int32)
    found = [before[:0]]
    for part in group:
        if part is None:
            yield np.concatenate(found), True
            found = [before[:0]]
        else:
            found += [before] * part.opens + [next(arrays)] + [after] * part.closes
    yield np.concatenate(found), False


def save_npz(path, parts):
    """Write what `encode` yields as nshepperd/gpt-2's encode.py does: a chunk each is arr_0, ...

    A long chunk waits on the disk for its end: its length stands before it. UserError if the file
    cannot be written.
    """
    end = [(np.empty(0, np.int32), True)]  # of the last chunk, where nothing says so
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(files.replacing(path))
        chunk = stack.enter_context(tempfile.SpooledTemporaryFile(SPOOL, dir=Path(path).parent))
        # The fastest level: encoding should not wait for the compressor.
        kind = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 1}
        archive = stack.enter_context(zipfile.ZipFile(file, "w", **kind))
        for ids, ends in itertools.chain(parts, end):
            if len(ids):
                chunk.write(ids.data)
                dtype = ids.dtype
            if ends and chunk.tell():
                _add_member(archive, chunk, dtype)
                chunk.seek(0)
                chunk.truncate()


def _add_member(archive, chunk, dtype):
    """Write a file of ids into a zip archive as its next array."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    header["shape"] = (chunk.tell() // dtype.itemsize,)
    with archive.open(f"arr_{len(archive.filelist)}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        chunk.seek(0)
        shutil.copyfileobj(chunk, member)


def save_npy(path, parts, dtype):
    """Write what `encode` yields as one 1-D array that np.load can map; nothing stays in memory.

    UserError if the file cannot be written.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    total = 0
    with files.replacing(path) as file:
        # NumPy pads the header so that a longer shape fits into the same place.
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (0,)})
        start = file.tell()
        for ids, _ in parts:
            file.write(ids.astype(dtype, copy=False).data)
            total += len(ids)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (total,)})
        assert file.tell() == start, (file.tell(), start)


def _chunks(parts):
    """What `encode` yields -> lists of the arrays of one chunk, empty chunks left out."""
    chunk = []
    for ids, ends in parts:
        if len(ids):
            chunk.append(ids)
        if ends and chunk:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _check_range(ids, n_vocab, where):
    """UserError if an id is not in [0, n_vocab)."""
    for start in range(0, len(ids), 2**24):  # bounded memory for a mapped file
        block = ids[start : start + 2**24]
        for value in (int(block.min()), int(block.max())):
            if not 0 <= value < n_vocab:
                raise UserError(
                    f"{where} has token {value}, and this model knows 0 to {n_vocab - 1}. "
                    "Encode the text with the vocabulary of the model that you use"
                )


def _read_encoded(path, n_vocab):
    """The chunks of an .npz (of any program) or .npy, checked; an .npy is mapped, not read.

    UserError for a file that is damaged or holds something else than ids.
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


def _check_member(archive, name, path):
    """Refuse an array that would take far more memory than its file, before it is read.

    ValueError where its header promises more than it holds, UserError where that is made to
    unpack to what no text does: 2 bytes a token compress to a tenth, the same token to a 500th.
    """
    if name not in archive.namelist():
        raise ValueError(f"{name} is not in it")
    member = archive.getinfo(name)
    if member.file_size > max(BOMB, 200 * member.compress_size):
        raise UserError(
            f"{path}: {name} would unpack from {member.compress_size:,} to {member.file_size:,} "
            "bytes, which looks like an attack. If it is yours, encode it to a .npy"
        )
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{name} is shorter than its header says")


def _checked(ids, n_vocab, where):
    """The array, if it is a 1-D one of ids below n_vocab."""
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        what = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else "no array"
        raise UserError(
            f"{where} is {what}, not one row of whole numbers. Make it with: gpt2cli encode"
        )
    _check_range(ids, n_vocab, where)
    return ids

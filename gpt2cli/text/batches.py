"""Token ids -> batches: random, sequential or by document for training, and once for evaluation.

Letters in shape comments: B rows of a batch, T tokens of a row.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2cli.console import counted
from gpt2cli.errors import UserError
from gpt2cli.text import marks

Span = tuple[int, int, int]  # chunk, start and stop of a row, in tokens


class Batch(NamedTuple):
    """Input of a model: `targets` follow `inputs`; `mask` is 1 where a prediction counts."""

    inputs: np.ndarray  # [B, T] int32
    targets: np.ndarray  # [B, T] int32
    mask: np.ndarray  # [B, T] float32


def _batch(rows: Sequence[np.ndarray], length: int, after: int = 0) -> Batch:
    """Return a batch of rows of at most length + 1 tokens; shorter ones are padded and masked.

    Tokens that are marked as read only (see `marks`) are masked too.

    Args:
        rows: the stored tokens of each row.
        length: predictions in a row.
        after: number of padding tokens after a shorter row that count as predictions.
    """
    tokens = np.zeros((len(rows), length + 1), np.int32)
    mask = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : max(len(row) - 1 + after, 0)] = 1
    if marks.is_marked(tokens):
        mask *= marks.is_learnt(tokens[:, 1:])
        tokens = marks.ids_of(tokens)
    return Batch(inputs=tokens[:, :-1].copy(), targets=tokens[:, 1:].copy(), mask=mask)


class Tokens:
    """A corpus as token ids.

    Attributes:
        chunks: 1-D integer arrays of stored ids (see `marks`).
        path: name of the corpus for messages.
        sizes: int64 [chunks], the number of tokens in each chunk.
        total: the number of all tokens.
    """

    def __init__(self, chunks: Sequence[np.ndarray], path: str | Path = "the dataset") -> None:
        self.chunks = chunks
        self.path = path
        self.sizes = np.fromiter(map(len, chunks), np.int64, len(chunks))
        self.total = int(self.sizes.sum())
        if self.sizes.max(initial=0) < 2:
            raise UserError(
                f"{path} contains {counted(self.total, 'token')}, but at least 2 in one chunk are "
                "needed. Is it the right file?"
            )

    @property
    def learnt(self) -> int:
        """The number of tokens that count in the loss: all but those marked as read only."""
        return sum(marks.learnt_count(chunk) for chunk in self.chunks)

    def whole(self) -> np.ndarray:
        """Return all chunks one after the other, [total]."""
        return self.chunks[0] if len(self.chunks) == 1 else np.concatenate(self.chunks)

    def fingerprint(self, blocks: int | None = None) -> int:
        """Return a checksum of all tokens and of the places where chunks end.

        Args:
            blocks: read about N blocks of 4,096 tokens, spread over the corpus; None reads all,
                which takes minutes for a file larger than memory.
        """
        found = zlib.crc32(self.sizes.data)
        size = 2**12
        stride = size if blocks is None else max(size, self.total // blocks)
        for chunk in self.chunks:
            for start in range(0, len(chunk), stride):
                found = zlib.crc32(np.ascontiguousarray(chunk[start : start + size]).data, found)
        return found

    def split(self, fraction: float, seed: int, end: int | None) -> "Split":
        """Divide the corpus by document, at random; each run of documents becomes a chunk.

        Args:
            fraction: share of the documents to hold out, 0 to 1; at least one, and not all.
            seed: 0 to 2**63 - 1; the same seed divides the same corpus in the same way.
            end: the id that ends a document; None if only chunks end one.

        Returns:
            The two parts of the corpus, and the number of documents in each.

        Raises:
            UserError: there is one document, or a part has no document with two tokens.
        """
        bounds = [_bounds(chunk, end) for chunk in self.chunks]
        count = sum(len(starts) for starts, _ in bounds)
        if count < 2:
            raise UserError(
                f"{self.path} contains {counted(count, 'document')}, but --val_fraction needs "
                "at least 2. Use --lines if each line is a document, or --val_dataset"
            )
        number = min(max(round(fraction * count), 1), count - 1)
        is_held = np.zeros(count, bool)
        is_held[_generator(seed | 2**63, 2**63).permutation(count)[:number]] = True
        parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        place = 0
        for chunk, (starts, stops) in zip(self.chunks, bounds, strict=True):
            own = is_held[place : place + len(starts)]
            place += len(starts)
            first = np.flatnonzero(np.diff(own, prepend=~own[:1]))  # of each run
            for begin, after in zip(first, [*first[1:], len(own)], strict=True):
                parts[int(own[begin])].append(chunk[starts[begin] : stops[after - 1]])
        name = f"{self.path} (--val_fraction {fraction})"
        return Split(Tokens(parts[0], name), Tokens(parts[1], name), count - number, number)

    def sampler(
        self,
        sampling: str,
        length: int,
        seed: int,
        end: int | None = None,
        uer_compat: bool = False,
    ) -> "Sampler":
        """Return the sampler that --sampling means.

        Args:
            sampling: random, sequential or documents, as TrainOptions explains them.
            length: predictions in a row.
            seed: 0 to 2**63 - 1.
            end: the id that ends a document; None if only chunks end one.
            uer_compat: for documents, see DocumentPieces.

        Raises:
            UserError: no document has two tokens.
        """
        if sampling == "random":
            return RandomWindows(self, length, seed)
        if sampling == "sequential":
            return SequentialWindows(self, length, seed)
        return DocumentPieces(self, length, seed, end, uer_compat)

    def evaluation_windows(self, n_ctx: int, batch_size: int = 1) -> Iterator[Batch]:
        """Yield batches up to [batch_size, n_ctx] that predict every token but the first once.

        Each window starts with the last token of the one before.
        """
        tokens = self.whole()
        starts = range(0, len(tokens) - 1, n_ctx)
        for first in range(0, len(starts), batch_size):
            rows = [tokens[i : i + n_ctx + 1] for i in starts[first : first + batch_size]]
            yield _batch(rows, len(rows[0]) - 1)  # only the very last row can be shorter


class Split(NamedTuple):
    """A corpus in two parts, and the number of documents in each."""

    tokens: Tokens
    held_out: Tokens
    documents: int
    held_out_documents: int


def _bounds(chunk: np.ndarray, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts and the ends of the documents in a chunk, int64 each."""
    stops = np.concatenate([np.zeros(0, np.int64), *(e for _, e in _document_ends(chunk, end))])
    return np.concatenate([np.zeros(min(len(stops), 1), np.int64), stops[:-1]]), stops


def _generator(*key: int) -> np.random.Generator:
    """Return the random generator that two numbers below 2**64 determine."""
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


class Sampler:
    """Batches that depend on seed and step alone, so that a run can resume at any step.

    Attributes:
        count: the number of rows in one pass over the text.
    """

    count: int
    after = 0  # see _batch

    def __init__(self, tokens: Tokens, length: int, seed: int) -> None:
        self.chunks, self.length, self.seed = tokens.chunks, length, seed

    def spans(self, step: int, number: int, random: np.random.Generator) -> Iterator[Span]:
        """Yield the spans of the `number` rows of a step."""
        raise NotImplementedError

    def batch(self, step: int, rows: int, noise: float = 0.0, n_vocab: int = 0) -> Batch:
        """Return the batch [rows, length] of step 0, 1, ...

        Args:
            step: number of the step.
            rows: number of rows.
            noise: share of the inputs that are replaced by random ids; targets stay.
            n_vocab: the random ids are below it; needed with noise.
        """
        random = _generator(self.seed, step)
        spans = self.spans(step, rows, random)
        found = [self.chunks[chunk][start:stop] for chunk, start, stop in spans]
        batch = _batch(found, self.length, self.after)
        if noise:
            wrong = random.random(batch.inputs.shape) < noise
            other = random.integers(n_vocab, size=batch.inputs.shape, dtype=np.int32)
            batch = batch._replace(inputs=np.where(wrong, other, batch.inputs))
        return batch

    def origin(self, step: int, rows: int) -> list[Span]:
        """Return the place of each row of a batch in the corpus."""
        return list(self.spans(step, rows, _generator(self.seed, step)))


class RandomWindows(Sampler):
    """Windows that start anywhere.

    Each place where length + 1 tokens of one chunk start is equally likely, up to the last one in
    the chunk; a chunk with fewer tokens counts as one place.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int) -> None:
        super().__init__(tokens, length, seed)
        self.count = math.ceil(tokens.total / length)
        self.places = np.cumsum(np.where(tokens.sizes < 2, 0, np.maximum(tokens.sizes - length, 1)))

    def spans(self, step: int, number: int, random: np.random.Generator) -> Iterator[Span]:
        for place in random.integers(self.places[-1], size=number):
            chunk, start = _locate(self.places, place)
            yield chunk, start, min(start + self.length + 1, len(self.chunks[chunk]))


class SequentialWindows(Sampler):
    """Windows one after the other from start to end of the text, and then again from the start.

    Within a chunk each window starts with the last token of the one before, so that a pass predicts
    every token of a chunk but the first once; the last window of a chunk may be short.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int) -> None:
        super().__init__(tokens, length, seed)
        self.places = np.cumsum(_divided_up(np.maximum(tokens.sizes - 1, 0), length))
        self.count = int(self.places[-1])

    def spans(self, step: int, number: int, random: np.random.Generator) -> Iterator[Span]:
        for row in range(step * number, (step + 1) * number):
            chunk, window = _locate(self.places, row % self.count)
            start = window * self.length
            yield chunk, start, min(start + self.length + 1, len(self.chunks[chunk]))


def _divided_up(numbers: np.ndarray, divisor: int) -> np.ndarray:
    """Divide whole numbers exactly, rounding up."""
    return (numbers + divisor - 1) // divisor


def _locate(bounds: np.ndarray, place: int) -> tuple[int, int]:
    """Return (chunk, place in it) of a place in the corpus; `bounds` are the ends of chunks."""
    chunk = int(np.searchsorted(bounds, place, side="right"))
    return chunk, int(place - (bounds[chunk - 1] if chunk else 0))


class DocumentPieces(Sampler):
    """Pieces of up to length + 1 tokens of one document, in a new order each pass.

    A document ends after each `end` id and at the end of its chunk. Its pieces follow each other
    without overlap, so the first token of a later piece is never predicted (UER-py uer/utils/
    dataset.py:455-467); a piece of one token is left out.

    With `uer_compat` the padding after a short piece is predicted once, and a piece of one token is
    kept for that (uer/utils/dataloader.py:174-179).

    Attributes:
        starts: int64 [count], the start of each piece in the concatenated chunks.
        sizes: uint16 or int32 [count], the number of tokens in each piece.
    """

    def __init__(
        self, tokens: Tokens, length: int, seed: int, end: int | None, uer_compat: bool
    ) -> None:
        super().__init__(tokens, length, seed)
        self.after = 1 if uer_compat else 0
        self.bounds = np.cumsum(tokens.sizes)
        size_type = np.uint16 if length < 2**16 - 1 else np.int32
        smallest = 1 if uer_compat else 2
        starts, sizes = [np.zeros(0, np.int64)], [np.zeros(0, size_type)]
        for chunk, bound in zip(self.chunks, self.bounds, strict=True):
            for first, ends in _document_ends(chunk, end):
                start, size = _cut(first, ends, length + 1)
                kept = size >= smallest
                starts.append(start[kept] + (bound - len(chunk)))
                sizes.append(size[kept].astype(size_type))
        self.starts, self.sizes = np.concatenate(starts), np.concatenate(sizes)
        self.count = len(self.starts)
        if not self.count:
            raise UserError(
                f"every document in {tokens.path} has fewer than 2 tokens. Is it the right file?"
            )
        self._pass: int | None = None  # the pass whose order is kept
        self._order: np.ndarray = np.zeros(0, np.int32)

    def spans(self, step: int, number: int, random: np.random.Generator) -> Iterator[Span]:
        row, stop = step * number, (step + 1) * number
        while row < stop:
            number_of_pass, place = divmod(row, self.count)
            pieces = self.order(number_of_pass)[place : place + stop - row]
            yield from map(self.piece, pieces)
            row += len(pieces)

    def order(self, number: int) -> np.ndarray:
        """Return the order of pass `number`, [count]: a permutation from seed and number alone."""
        if self._pass != number:
            self._order = np.zeros(0, np.int32)  # frees the old order before the new one is made
            order = np.arange(self.count, dtype=np.int32 if self.count < 2**31 else np.int64)
            # the top bit, which no seed has, keeps this apart from the generator of a step
            _generator(self.seed | 2**63, number).shuffle(order)
            self._pass, self._order = number, order
        return self._order

    def piece(self, number: int) -> Span:
        """Return the span of a piece."""
        chunk, start = _locate(self.bounds, self.starts[number])
        return chunk, start, start + int(self.sizes[number])


def _document_ends(chunk: np.ndarray, end: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (start of a document, int64 array of its end and the ends of those after it).

    The chunk may be a mapped file, so a part of it is read at a time. An end is one past the last
    token.
    """
    first = 0
    for start in range(0, len(chunk), 2**22):
        block = chunk[start : start + 2**22]
        stop = start + len(block)
        found = np.zeros(0, np.int64)
        if end is not None:
            found = np.flatnonzero(marks.is_end(block, end)) + (start + 1)
        if stop == len(chunk) and (not len(found) or found[-1] != stop):
            found = np.append(found, stop)
        if len(found):
            yield first, found
            first = int(found[-1])


def _cut(first: int, ends: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, sizes), int64, of the pieces of up to `size` tokens of documents.

    Args:
        first: start of the first document; each other one starts at the end of the one before.
        ends: int64 array.
        size: tokens in a whole piece.
    """
    begins = np.concatenate(([first], ends[:-1]))
    pieces = _divided_up(ends - begins, size)  # of each document
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(begins, pieces) + number * size
    return starts, np.minimum(np.repeat(ends, pieces) - starts, size)

"""Token ids -> batches: random, sequential or document by document, and all of them once.

Letters in shape comments: B rows of a batch, T tokens of a row.
"""

import zlib
from typing import NamedTuple

import numpy as np

from gpt2cli.errors import UserError


class Batch(NamedTuple):
    """What a model is fed: `targets` are what follows `inputs`; `mask` is 1 where that counts."""

    inputs: np.ndarray  # [B, T] int32
    targets: np.ndarray  # [B, T] int32
    mask: np.ndarray  # [B, T] float32


def _batch(rows, length, after=0):
    """Arrays of at most length + 1 tokens -> Batch; what they lack is 0 and masked.

    Args:
        after: predictions of what follows a row that is shorter, which is 0.
    """
    tokens = np.zeros((len(rows), length + 1), np.int32)
    mask = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : max(len(row) - 1 + after, 0)] = 1
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), mask)


class Tokens:
    """A corpus: `chunks`, a list of 1-D integer arrays, and `total`, the number of their tokens."""

    def __init__(self, chunks, path="the dataset"):
        self.chunks = chunks
        self.path = path
        self.sizes = np.fromiter(map(len, chunks), np.int64, len(chunks))
        self.total = int(self.sizes.sum())
        if self.sizes.max(initial=0) < 2:
            raise UserError(
                f"{path} holds {self.total} token{'s' * (self.total != 1)}; it takes 2 to predict "
                "one. Is it the right file?"
            )

    def whole(self):
        """All chunks one after the other, [total]."""
        return self.chunks[0] if len(self.chunks) == 1 else np.concatenate(self.chunks)

    def fingerprint(self):
        """A checksum of all tokens and of where chunks end."""
        found = zlib.crc32(self.sizes)
        for chunk in self.chunks:
            found = zlib.crc32(np.ascontiguousarray(chunk), found)
        return found

    def sampler(self, sampling, length, seed, end=None, uer_compat=False):
        """How training reads the text: a RandomWindows, SequentialWindows or DocumentPieces.

        Each has `count`, the rows in one pass over the text, and `batch(step, rows)`.

        Args:
            sampling: random, sequential or documents, as TrainOptions explains them.
            length: predictions in a row.
            seed: 0 to 2**63 - 1.
            end: the id that ends a document; None: only chunks end one.
            uer_compat: of documents: see DocumentPieces.

        Raises:
            UserError: of documents, if none has two tokens.
        """
        if sampling == "random":
            return RandomWindows(self, length, seed)
        if sampling == "sequential":
            return SequentialWindows(self, length, seed)
        return DocumentPieces(self, length, seed, end, uer_compat)

    def evaluation_windows(self, n_ctx, batch_size=1):
        """Batches, up to [batch_size, n_ctx], that predict every token but the first once.

        Each window begins with the last token of the one before.
        """
        tokens = self.whole()
        starts = range(0, len(tokens) - 1, n_ctx)
        for first in range(0, len(starts), batch_size):
            rows = [tokens[i : i + n_ctx + 1] for i in starts[first : first + batch_size]]
            yield _batch(rows, len(rows[0]) - 1)  # only the last row of all can be shorter


def _generator(*key):
    """A random generator that these two numbers below 2**64 determine."""
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


class _Sampler:
    """Batches for training that depend on seed and step alone, so that a run can go on anywhere.

    A kind of it has `count`, the rows in one pass over the text, and `spans(step, number, random)`,
    the (chunk, start, stop) of each row of a batch.
    """

    after = 0  # as of _batch

    def __init__(self, tokens, length, seed):
        self.chunks, self.length, self.seed = tokens.chunks, length, seed

    def batch(self, step, rows, noise=0.0, n_vocab=None):
        """The Batch of [rows, length] of step 0, 1, ...

        Args:
            noise: share of the inputs that become any of the n_vocab ids; targets stay.
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

    def origin(self, step, rows):
        """Where the rows of a batch come from: (chunk, start, stop) of each, in tokens."""
        return list(self.spans(step, rows, _generator(self.seed, step)))


class RandomWindows(_Sampler):
    """Windows that begin anywhere.

    Each place at which length + 1 tokens of one chunk begin is equally likely, those at the end of
    the chunk included; a chunk with fewer tokens counts as one place.
    """

    def __init__(self, tokens, length, seed):
        super().__init__(tokens, length, seed)
        self.count = -(-tokens.total // length)
        self.places = np.cumsum(np.where(tokens.sizes < 2, 0, np.maximum(tokens.sizes - length, 1)))

    def spans(self, step, number, random):
        for place in random.integers(self.places[-1], size=number):
            chunk, start = _locate(self.places, place)
            yield chunk, start, min(start + self.length + 1, len(self.chunks[chunk]))


class SequentialWindows(_Sampler):
    """Windows one after the other from start to end of the text, and then from the start again.

    Within a chunk each begins with the last token of the one before, so that a pass predicts every
    token but a chunk's first once; the last window of a chunk may be short.
    """

    def __init__(self, tokens, length, seed):
        super().__init__(tokens, length, seed)
        self.places = np.cumsum(-(-np.maximum(tokens.sizes - 1, 0) // length))
        self.count = int(self.places[-1])

    def spans(self, step, number, random):
        for row in range(step * number, (step + 1) * number):
            chunk, window = _locate(self.places, row % self.count)
            start = window * self.length
            yield chunk, start, min(start + self.length + 1, len(self.chunks[chunk]))


def _locate(bounds, place):
    """The number of the chunk in which a place lies, and the place in it; `bounds` are all ends."""
    chunk = int(np.searchsorted(bounds, place, side="right"))
    return chunk, int(place - (bounds[chunk - 1] if chunk else 0))


class DocumentPieces(_Sampler):
    """Pieces of up to length + 1 tokens of one document, in a new order each pass.

    A document ends after each `end` id and where a chunk ends. Its pieces follow each other without
    overlap, so the first token of a later one is never predicted (UER-py uer/utils/dataset.py:
    455-467); a piece of one token is left out.

    With `uer_compat` the padding that follows a short piece is predicted once, and a piece of one
    token is kept for that (uer/utils/dataloader.py:174-179).

    Attributes:
        starts: int64 [count], where each piece begins in the chunks laid end to end.
        sizes: uint16 or int32 [count], its tokens.
    """

    def __init__(self, tokens, length, seed, end=None, uer_compat=False):
        super().__init__(tokens, length, seed)
        self.after = int(uer_compat)
        self.bounds = np.cumsum(tokens.sizes)
        size_type = np.uint16 if length < 2**16 - 1 else np.int32
        starts, sizes = [np.zeros(0, np.int64)], [np.zeros(0, size_type)]
        for chunk, bound in zip(self.chunks, self.bounds, strict=True):
            for first, ends in _document_ends(chunk, end):
                start, size = _cut(first, ends, length + 1)
                kept = size > (0 if uer_compat else 1)
                starts.append(start[kept] + (bound - len(chunk)))
                sizes.append(size[kept].astype(size_type))
        self.starts, self.sizes = np.concatenate(starts), np.concatenate(sizes)
        self.count = len(self.starts)
        if not self.count:
            raise UserError(
                f"no document of {tokens.path} has two tokens, and it takes 2 to predict one. "
                "Is it the right file?"
            )
        self._order = None, None  # a pass and its order

    def spans(self, step, number, random):
        row, stop = step * number, (step + 1) * number
        while row < stop:
            number_of_pass, place = divmod(row, self.count)
            pieces = self.order(number_of_pass)[place : place + stop - row]
            yield from map(self.piece, pieces)
            row += len(pieces)

    def order(self, number):
        """The order of pass `number`, [count]: a permutation that seed and number determine."""
        if self._order[0] != number:
            self._order = None, None  # not two at a time
            order = np.arange(self.count, dtype=np.int32 if self.count < 2**31 else np.int64)
            # the top bit, which no seed has, keeps this apart from the generator of a step
            _generator(self.seed | 2**63, number).shuffle(order)
            self._order = number, order
        return self._order[1]

    def piece(self, number):
        """The (chunk, start, stop) of a piece."""
        chunk, start = _locate(self.bounds, self.starts[number])
        return chunk, start, start + int(self.sizes[number])


def _document_ends(chunk, end):
    """Yields (start of a document, array of the ends of it and of those after it), in places.

    A part of the chunk at a time, which may be a mapped file; ends are one past the last token.
    """
    first = 0
    for start in range(0, len(chunk), 2**22):
        block = chunk[start : start + 2**22]
        found = [] if end is None else np.flatnonzero(block == end) + (start + 1)
        stop = start + len(block)
        if stop == len(chunk) and (not len(found) or found[-1] != stop):
            found = np.append(found, stop)
        if len(found):
            found = np.asarray(found, np.int64)
            yield first, found
            first = found[-1]


def _cut(first, ends, size):
    """Documents -> (starts, sizes) of their pieces of up to `size` tokens, int64 arrays.

    Args:
        first: where the first document begins; each other begins where the one before ends.
        ends: int64 array.
    """
    begins = np.concatenate(([first], ends[:-1]))
    pieces = -(-(ends - begins) // size)  # of each document
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(begins, pieces) + number * size
    return starts, np.minimum(np.repeat(ends, pieces) - starts, size)

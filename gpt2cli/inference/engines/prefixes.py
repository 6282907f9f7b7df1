"""Common beginnings of texts, read once: the keys and values of their tokens are kept.

A text is read in pieces of PIECE tokens. A piece's keys and values depend on it and the pieces
before it alone, and the network computes them in the same way each time: to the last bit, a text's
numbers are the same whether its beginning was kept or is read now.
"""

import collections
from collections.abc import Sequence

import numpy as np

PIECE = 128  # tokens

Halves = Sequence[np.ndarray]  # keys and values of each layer in turn, each [1, H, PIECE, D]


class Prefixes:
    """The pieces that were used last, up to a number of bytes.

    Args:
        most: bytes; 0 keeps nothing.

    Attributes:
        size: bytes kept now.
        reused: tokens that did not have to be read again.
    """

    def __init__(self, most: int) -> None:
        self.most, self.size, self.reused = most, 0, 0
        # the ids of a text up to the end of the piece -> the piece; the last used are at the end
        self._pieces: collections.OrderedDict[bytes, Halves] = collections.OrderedDict()

    def find(self, ids: np.ndarray) -> list[Halves]:
        """Return the pieces of a text [n * PIECE] that are kept, up to the first that is not."""
        found: list[Halves] = []
        for end in range(PIECE, len(ids) + 1, PIECE):
            piece = self._pieces.get(ids[:end].tobytes())
            if piece is None:
                break
            found.append(piece)
        for number in range(len(found), 0, -1):  # a beginning is dropped after what needs it
            self._pieces.move_to_end(ids[: number * PIECE].tobytes())
        self.reused += PIECE * len(found)
        return found

    def keep(self, ids: np.ndarray, piece: Halves) -> None:
        """Keep the last piece of a text [n * PIECE], and drop the least used if it is too much."""
        size = sum(half.nbytes for half in piece)
        if size > self.most or ids.tobytes() in self._pieces:
            return
        self._pieces[ids.tobytes()] = piece
        self.size += size
        while self.size > self.most:
            _, dropped = self._pieces.popitem(last=False)
            self.size -= sum(half.nbytes for half in dropped)

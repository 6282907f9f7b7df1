"""Marks on stored token ids: tokens outside the loss, and end tokens inside a document.

A marked id is stored as ~value, a negative int32, and value is the id plus MARKED and perhaps the
other flags below. So a token that does not count in the loss is stored as ~(id + MARKED). Arrays
keep one number for each token and can be mapped, and a program that does not know the marks stops
at a negative id instead of learning it. The -1 or -100 with which other programs fill rows is not a
marked id.
"""

import numpy as np

INNER = 2**30  # an end token within a dialogue, which does not end the document
LEARNT = 2**29  # only with INNER: the token counts in the loss
MARKED = 2**28  # every marked id has it
_ID = MARKED - 1


def is_marked(ids: np.ndarray) -> bool:
    """Return whether any of these stored ids is marked."""
    return ids.dtype.kind == "i" and bool((ids < 0).any())


def read_only(ids: np.ndarray) -> np.ndarray:
    """Mark ids [T] as not counting in the loss."""
    return ~(ids.astype(np.int32) | MARKED)


def inner(ids: np.ndarray, end: int) -> np.ndarray:
    """Mark the end tokens among ids [T] as inside a document; the ids may be read_only or not."""
    plain = np.where(ids == end, ~(end | MARKED | INNER | LEARNT), ids)
    return np.where(ids == ~(end | MARKED), ~(end | MARKED | INNER), plain).astype(np.int32)


def ids_of(stored: np.ndarray) -> np.ndarray:
    """Return the token ids of stored ids of any shape; negative numbers without a mark stay."""
    if not is_marked(stored):
        return stored
    value = ~stored
    return np.where((stored < 0) & ((value & MARKED) != 0), value & _ID, stored)


def is_learnt(stored: np.ndarray) -> np.ndarray:
    """Return bool: whether each stored id counts in the loss."""
    return (stored >= 0) | ((~stored & LEARNT) != 0)


def is_end(stored: np.ndarray, end: int) -> np.ndarray:
    """Return bool: whether each stored id is an end token that ends a document."""
    found = stored == end
    return found if stored.dtype.kind == "u" else found | (stored == ~(end | MARKED))


def learnt_count(stored: np.ndarray) -> int:
    """Return the number of stored ids that count in the loss; read a mapped file in parts.

    The first one is included, although no token before it predicts it.
    """
    if stored.dtype.kind == "u":
        return len(stored)
    blocks = range(0, len(stored), 2**22)
    return sum(int(is_learnt(stored[start : start + 2**22]).sum()) for start in blocks)

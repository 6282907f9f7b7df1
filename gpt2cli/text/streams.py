"""Decoders for ids that arrive one by one."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Protocol


class Stream(Protocol):
    """A decoder whose `feed` and `finish` together give `decode` of all ids."""

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""

    def finish(self) -> str:
        """Return the text that was held back: no more ids will come."""


class ByteStream:
    """A decoder of tokens that are bytes; never yields half a character.

    Args:
        bytes_of: returns the bytes of ids.
    """

    def __init__(self, bytes_of: Callable[[Iterable[int]], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __copy__(self) -> ByteStream:
        twin = ByteStream(self._bytes_of)
        twin._decoder.setstate(self._decoder.getstate())
        return twin

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""
        return self._decoder.decode(self._bytes_of(ids))

    def finish(self) -> str:
        """Return the rest: U+FFFD for a character whose last bytes never came."""
        return self._decoder.decode(b"", final=True)


class TextStream:
    """A decoder of tokens whose text depends on their neighbours, such as Unigram's.

    A window of the last tokens is decoded with and without the new one, so that the time does not
    grow with the text.

    Args:
        decode: returns the text of ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._begin = 0  # of the window
        self._read = 0  # ids whose text was returned
        self._given = ""

    def __copy__(self) -> TextStream:
        twin = TextStream(self._decode)
        twin._ids, twin._begin, twin._read = [*self._ids], self._begin, self._read
        twin._given = self._given
        return twin

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""
        return "".join(self._add(int(index)) for index in ids)

    def _add(self, index: int) -> str:
        self._ids.append(index)
        before = self._decode(self._ids[self._begin : self._read])
        text = self._decode(self._ids[self._begin :])
        if text.endswith("\ufffd") or not text.startswith(before) or len(text) == len(before):
            return ""  # perhaps half a character
        self._begin, self._read = self._read, len(self._ids)
        fresh = text[len(before) :]
        self._given += fresh
        return fresh

    def finish(self) -> str:
        """Return the text that was held back until a character was whole."""
        text = self._decode(self._ids)
        return text[len(self._given) :] if text.startswith(self._given) else ""

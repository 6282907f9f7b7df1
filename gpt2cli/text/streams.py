"""Decoders for ids that arrive one by one."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2cli.text.tokenizer_json import TokenizerJson


class Stream(Protocol):
    """A decoder whose `feed` and `finish` together give `decode` of all ids."""

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""

    def finish(self) -> str:
        """Return the text that was held back: no more ids will come."""


class ByteStream:
    """A decoder whose `feed` and `finish` give `decode` of all ids, and never half a character.

    Args:
        encoder: its `bytes_of` gives the bytes of ids.
    """

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __copy__(self) -> ByteStream:
        twin = ByteStream(self._encoder)
        twin._decoder.setstate(self._decoder.getstate())
        return twin

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""
        return self._decoder.decode(self._encoder.bytes_of(ids))

    def finish(self) -> str:
        """Return the rest: U+FFFD for a character whose last bytes never came."""
        return self._decoder.decode(b"", final=True)


class TextStream:
    """A decoder for tokens that are not bytes, such as Unigram's and Metaspace's.

    Args:
        encoder: decodes all ids at the end.
        tokenizer: the library's.
    """

    def __init__(self, encoder: TokenizerJson, tokenizer: Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._encoder, self._tokenizer = encoder, tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._given = ""

    def __copy__(self) -> TextStream:
        twin = TextStream(self._encoder, self._tokenizer)
        twin._stream = copy.copy(self._stream)
        twin._ids, twin._given = [*self._ids], self._given
        return twin

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""
        fresh = ""
        for index in map(int, ids):
            if not self._encoder.knows(index):
                continue
            self._ids.append(index)
            fresh += self._stream.step(self._tokenizer, index) or ""
        self._given += fresh
        return fresh

    def finish(self) -> str:
        """Return the text that was held back until a character was whole."""
        text = self._encoder.decode(self._ids)
        return text[len(self._given) :] if text.startswith(self._given) else ""

"""What all tokenizers share: their special ids, and text from ids."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable

import numpy as np
import regex

from gpt2cli.errors import UserError
from gpt2cli.text.description import Description, bytes_by_id
from gpt2cli.text.streams import ByteStream, Stream, TextStream

NEVER = regex.compile(r"(?!)")  # a text is not cut
# Places where a text may be cut if the probes show that a tokenizer allows it.
CUTS = tuple(map(regex.compile, (r"(?r)(?<=\S)[ \n]", r"(?r)(?<=\S)\n")))
CUT_PROBES = (
    "one two\n three\n\nfour  five，六。 Seven\t8\n9",
    "it's a 'test', isn't it?\nwe'll see\n  indented {\n}\n\n\n1 234 5678\nÀé ﬁ ｆｕｌｌ\n",
    "中文 你好\n한국어 텍스트\nहिन्दी पाठ\nעברית\n😀 👍🏽\nе\u0301 a\u0301 \u00a0x\n",
)


class Tokenizer:
    """A tokenizer; see `encoder` for the attributes.

    Args:
        described: what it is.
    """

    CUT = NEVER

    def __init__(self, described: Description) -> None:
        tokens = described.tokens
        self.n_vocab = max(tokens.values(), default=-1) + 1
        self.start = None if described.start is None else tokens[described.start]
        self.end = None if described.end is None else tokens[described.end]
        self.ends = described.ends
        self.prefix, suffix = described.around()
        is_ended = self.end is None or suffix[-1:] == [self.end]
        self.after = suffix if is_ended else [*suffix, self.end]
        self.added = described.added
        self.banned: list[int] = []
        self.unknown = described.unknown
        self.is_byte_level = described.is_byte_level
        self._may_strip = any(e.get("rstrip") for e in described.values["added_tokens"])
        self._vocab = tokens
        self._bytes = bytes_by_id(described)
        self._missing: dict[str, bool] = {}  # character -> whether the vocabulary lacks it

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text; with `special`, the texts in `added` are those tokens."""
        return self.arrays([text], special)[0].tolist()

    def arrays(self, texts: Iterable[str], special: bool = False) -> list[np.ndarray]:
        """Return `encode` of each text as an int32 array; releases the interpreter lock.

        Raises:
            UserError: a text has characters without a token, and unknown ones have none either.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; unknown ids are dropped, bytes outside UTF-8 become U+FFFD."""
        if self.is_byte_level:
            return self.bytes_of(ids).decode("utf-8", "replace")
        return self._text([index for index in map(int, ids) if index in self._bytes])

    def _text(self, ids: list[int]) -> str:
        """Return the text of known ids, where tokens are not bytes."""
        raise NotImplementedError

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; those of a byte-level tokenizer may end inside a character."""
        return b"".join(self._bytes.get(int(index), b"") for index in ids)

    def stream(self) -> Stream:
        """Return a decoder for ids that arrive one by one."""
        if self.is_byte_level:
            return ByteStream(self.bytes_of)
        return TextStream(self.decode)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None."""
        return self._vocab.get(token)

    def missing(self, text: str) -> collections.Counter[str]:
        """Count the characters that have no token of their own."""
        if self.unknown is None:
            return collections.Counter()
        counts = collections.Counter(text)
        for char in list(counts):
            if char not in self._missing:
                self._missing[char] = self._lacks(char)
            if not self._missing[char]:
                del counts[char]
        return counts

    def _lacks(self, char: str) -> bool:
        return self.unknown in self.encode(char)

    def _where_to_cut(self) -> regex.Pattern[str]:
        """Return the pattern of the places where the probes may be cut."""
        try:
            return self._outside_added(*filter(self._may_cut, CUTS))
        except UserError:  # the vocabulary lacks the probes' characters
            return NEVER

    def _outside_added(self, *cuts: regex.Pattern[str]) -> regex.Pattern[str]:
        """Return the first pattern that cuts no added token, nor the spaces that belong to one."""
        if self._may_strip:
            return NEVER
        return next((cut for cut in cuts if not any(map(cut.search, self.added))), NEVER)

    def _may_cut(self, cut: regex.Pattern[str]) -> bool:
        """Return whether the probes can be cut at every such place without changing an id."""
        for text, special in itertools.product(CUT_PROBES, (False, True)):
            whole = self.encode(text, special)
            for match in cut.finditer(text):
                parts = text[: match.start()], text[match.start() :]
                if [i for part in parts for i in self.encode(part, special)] != whole:
                    return False
        return True

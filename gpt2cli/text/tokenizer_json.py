"""Any tokenizer.json, through the tokenizers library."""

from __future__ import annotations

import collections
import copy
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from gpt2cli.errors import UserError
from gpt2cli.text.description import Description, after_document, bytes_by_id, without_surrogates
from gpt2cli.text.streams import ByteStream, Stream, TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NEVER = regex.compile(r"(?!)")  # a text is not cut
# Places where a text may be cut if the tokenizer turns out to allow it; see `encoder`.
CUTS = tuple(map(regex.compile, (r"(?r)(?<=\S)[ \n]", r"(?r)(?<=\S)\n")))
CUT_PROBES = (
    "one two\n three\n\nfour  five，六。 Seven\t8\n9",
    "it's a 'test', isn't it?\nwe'll see\n  indented {\n}\n\n\n1 234 5678\nÀé ﬁ ｆｕｌｌ\n",
    "中文 你好\n한국어 텍스트\nहिन्दी पाठ\nעברית\n😀 👍🏽\nе\u0301 a\u0301 \u00a0x\n",
)


class TokenizerJson:
    """A tokenizer that does what its tokenizer.json says; see `encoder` for the attributes.

    Args:
        described: the tokenizer.

    Raises:
        UserError: the library rejects it.
    """

    def __init__(self, described: Description) -> None:
        self.described = described
        self._tokenizer = _built(described, described.values)
        self._plain: Tokenizer | None = None
        tokens = described.tokens
        self.n_vocab = max(tokens.values(), default=-1) + 1
        self.start = None if described.start is None else tokens[described.start]
        self.end = None if described.end is None else tokens[described.end]
        self.ends = described.ends
        self.prefix, suffix = described.around()
        self.after = after_document(suffix, self.end)
        self.added = described.added
        self.banned: list[int] = []
        self.unknown = _unknown(described)
        self._vocab = tokens
        self._tokens = {index: token for token, index in tokens.items()}
        self._bytes = bytes_by_id(described) if described.is_byte_level else None
        self._missing: dict[str, bool] = {}  # character -> whether the vocabulary lacks it
        self.CUT = self._where_to_cut()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text; with `special`, the texts in `added` are those tokens."""
        return self.arrays([text], special)[0].tolist()

    def arrays(self, texts: Iterable[str], special: bool = False) -> list[np.ndarray]:
        """Return `encode` of each text as an int32 array; releases the interpreter lock.

        Raises:
            UserError: a text has characters without a token, and unknown ones have none either.
        """
        texts = [without_surrogates(text) for text in texts]
        tokenizer = self._tokenizer if special else self._without_added()
        try:
            found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library has no narrower one
            raise UserError(
                f"{self.described.path} cannot encode this text ({error}). Remove the characters "
                "that its vocabulary lacks, or use a model with another tokenizer"
            ) from None
        return [np.array(one.ids, np.int32) for one in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; unknown ids are dropped."""
        if self._bytes is not None:
            return self.bytes_of(ids).decode("utf-8", "replace")
        known = [int(index) for index in ids if int(index) in self._tokens]
        return self._tokenizer.decode(known, skip_special_tokens=False)

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; those of a byte-level tokenizer may end inside a character."""
        if self._bytes is not None:
            return b"".join(self._bytes.get(int(index), b"") for index in ids)
        return "".join(self._tokens.get(int(index), "") for index in ids).encode("utf-8", "replace")

    def stream(self) -> Stream:
        """Return a decoder for ids that arrive one by one."""
        return TextStream(self, self._tokenizer) if self._bytes is None else ByteStream(self)

    def knows(self, index: int) -> bool:
        """Return whether the vocabulary has an id."""
        return index in self._tokens

    def id_of(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None."""
        return self._vocab.get(token)

    def missing(self, text: str) -> collections.Counter[str]:
        """Count the characters that have no token of their own."""
        counts = collections.Counter(text)
        for char in list(counts):
            if char not in self._missing:
                self._missing[char] = self._lacks(char)
            if not self._missing[char]:
                del counts[char]
        return counts

    def _lacks(self, char: str) -> bool:
        return self.unknown is not None and self.unknown in self.encode(char)

    def _without_added(self) -> Tokenizer:
        """Return the tokenizer for plain text: no text in it is an added token.

        Models may contain their special tokens as well, so these get a name that no text has.
        """
        if self._plain is None:
            values = copy.copy(self.described.values)
            model = values["model"] = copy.copy(values["model"])
            hidden = {text: f"\uffff{index}" for text, index in self.added.items()}
            for token in (model.get("unk_token"), *self.described.merged):
                hidden.pop(token, None)
            if isinstance(model["vocab"], list):
                unknown = model.get("unk_id")
                model["vocab"] = [
                    [piece if n == unknown else hidden.get(piece, piece), score]
                    for n, (piece, score) in enumerate(model["vocab"])
                ]
            else:
                model["vocab"] = {hidden.get(t, t): n for t, n in model["vocab"].items()}
            self._plain = _built(self.described, {**values, "added_tokens": []})
        return self._plain

    def _where_to_cut(self) -> regex.Pattern[str]:
        """Return the pattern of the places where a text may be cut."""
        try:
            return next((cut for cut in CUTS if self._may_cut(cut)), NEVER)
        except UserError:  # the vocabulary lacks the probes' characters
            return NEVER

    def _may_cut(self, cut: regex.Pattern[str]) -> bool:
        """Return whether the probes can be cut at every such place without changing an id."""
        for text in CUT_PROBES:
            for special in (False, True):
                whole = self.encode(text, special)
                for match in cut.finditer(text):
                    at = match.start()
                    if self.encode(text[:at], special) + self.encode(text[at:], special) != whole:
                        return False
        return True


def _unknown(described: Description) -> int | None:
    """Return the id of the token for text that the vocabulary lacks."""
    model = described.model
    if described.kind == "Unigram":
        return model.get("unk_id")
    return described.tokens.get(model.get("unk_token") or "")


def _built(described: Description, values: dict[str, Any]) -> Tokenizer:
    """Return the library's tokenizer; UserError if it rejects the values."""
    import tokenizers

    # truncation and padding are settings of a call, and would cut documents
    values = {**values, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(values))
    except BaseException as error:  # a panic of the library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(
            f"{described.path} does not have the tokenizers format ({str(error)[:200]})"
        ) from None

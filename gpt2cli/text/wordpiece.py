"""BERT's WordPiece, through tokenizers, and the spacing of its decoded text."""

from collections.abc import Iterable, Mapping

import regex

from gpt2cli.errors import UserError
from gpt2cli.text.description import Description, without_surrogates
from gpt2cli.text.streams import Stream
from gpt2cli.text.tokenizer import CUTS
from gpt2cli.text.tokenizer_json import TokenizerJson


class WordPiece(TokenizerJson):
    """WordPiece with BERT's normalizer; see `encoder` for the attributes.

    Args:
        described: its model is WordPiece, with BERT's normalizer, words and special tokens.

    Raises:
        UserError: the vocabulary lacks a special token.
    """

    # BERT splits words before a space and between Chinese characters whatever stands around them
    # (GPT2_ML tokenization.py), and no letter is normalised differently for its neighbours.
    CUT = regex.compile(r"(?r)(?<=\S)[ \n]|(?<=[一-龥])[一-龥。，、！？；：]")

    def __init__(self, described: Description) -> None:
        lacking = [t for t in ("[UNK]", "[CLS]", "[SEP]") if t not in described.vocab]
        if lacking:
            raise UserError(
                f"{described.path} lacks {', '.join(lacking)} ({len(described.vocab)} tokens "
                "read): it is not a BERT vocabulary, or is incomplete. Copy it again, with one "
                "token per line"
            )
        super().__init__(described)
        self._tokens = {index: token for token, index in self._vocab.items()}
        banned = ("[PAD]", "[UNK]", "[CLS]", "[MASK]")
        self.banned = [self._vocab[token] for token in banned if token in self._vocab]
        self.lower_case = described.values["normalizer"]["lowercase"]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids: Chinese without spaces, English with them."""
        stream = self.stream()
        return stream.feed(ids) + stream.finish()

    def stream(self) -> Stream:
        """Return a decoder for ids that arrive one by one."""
        return WordPieceStream(self._tokens)

    def _where_to_cut(self) -> regex.Pattern[str]:
        splits_chinese = self.described.values["normalizer"]["handle_chinese_chars"]
        cuts = (WordPiece.CUT, *CUTS) if splits_chinese else CUTS
        return self._outside_added(*cuts)

    def _lacks(self, char: str) -> bool:
        """Return whether a character becomes [UNK] alone and has no ## form either."""
        plain = self._tokenizer.normalizer.normalize_str(without_surrogates(char)).strip()
        return not all(c in self._vocab or f"##{c}" in self._vocab for c in plain)


class WordPieceStream:
    """A decoder that joins word pieces one by one and never takes anything back.

    The spacing is that of bert4keras' Tokenizer.decode (tokenizers.py:206-235), but no space comes
    before a Chinese character or between two punctuation marks.

    Args:
        tokens: id -> token.
    """

    # The blocks that BERT takes for Chinese characters (GPT2_ML tokenization.py:264-284).
    HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f"
    SPECIAL = regex.compile(r"\[.+\]|<[ST]>")
    NONE_BEFORE = regex.compile(rf"[{HAN}]|[\p{{P}}!-/:-@\[-`{{-~～￥]+\Z")  # a token
    NONE_AFTER = regex.compile(rf"(?V1)(?:[{HAN}～￥+\-/=\{{(<\[]|[\p{{P}}--[!-~]])\Z")  # the text
    SHORT_FORMS = frozenset(("re", "m", "s", "t", "ve", "d", "ll"))

    def __init__(self, tokens: Mapping[int, str]) -> None:
        self._tokens = tokens
        self._tail = ""  # the last two characters of the text so far
        self._held = ""  # a short form after ', until it is known to be a whole word

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids add."""
        return "".join(self._add(self._tokens.get(int(index), "")) for index in ids)

    def finish(self) -> str:
        """Return the text that was held back."""
        held, self._held = self._held, ""
        return self._give(held)

    def _add(self, token: str) -> str:
        if not token or self.SPECIAL.fullmatch(token):
            return ""
        joined = token.startswith("##") and len(token) > 2
        before = ""
        if self._held:
            before = self._give(f" {self._held}" if joined else self._held)
            self._held = ""
        if joined:
            return before + self._give(token[2:])
        if self._tail.endswith("'") and token in self.SHORT_FORMS:
            self._held = token
            return before
        return before + self._give(f" {token}" if self._spaced(token) else token)

    def _spaced(self, token: str) -> bool:
        """Return whether a space comes between the text so far and this token."""
        number = regex.fullmatch(r"\d\.", self._tail) and token[0].isdecimal()  # 3 . 5
        no = not self._tail or number
        return not (no or self.NONE_BEFORE.match(token) or self.NONE_AFTER.search(self._tail))

    def _give(self, text: str) -> str:
        self._tail = (self._tail + text)[-2:]
        return text

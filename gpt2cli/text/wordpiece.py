"""BERT's WordPiece, through tokenizers, and the spacing of its decoded text."""

import collections
from collections.abc import Iterable, Mapping

import numpy as np
import regex

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text.bpe import without_surrogates
from gpt2cli.text.special import reading_options


class WordPiece:
    """WordPiece with BERT's normalizer; see `encoder` for the attributes.

    vocab.txt has one token a line; line 0 is id 0.

    Args:
        folder: the vocabulary's folder.

    Raises:
        UserError: vocab.txt is damaged or lacks a special token.
    """

    # BERT splits words before a space and between Chinese characters whatever stands around them
    # (GPT2_ML tokenization.py), and no letter is normalised differently for its neighbours.
    CUT = regex.compile(r"(?r)(?<=\S)[ \n]|(?<=[一-龥])[一-龥。，、！？；：]")

    def __init__(self, folder: ModelFolder) -> None:
        import tokenizers

        path = folder.path / "vocab.txt"
        text = files.decode(folder.read(path.name), path)
        tokens = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
        self._vocab = {token: index for index, token in enumerate(tokens)}
        lacking = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in self._vocab]
        if lacking:
            raise UserError(
                f"{path} lacks {', '.join(lacking)} ({len(self._vocab)} tokens read): it is not a "
                "BERT vocabulary, or is incomplete. Copy it again, with one token per line"
            )
        self._tokens = dict(enumerate(tokens))
        self._missing: dict[str, bool] = {}  # character -> whether the vocabulary lacks it
        self.n_vocab = len(tokens)
        self.lower_case, start, end = reading_options(folder, self._vocab, "[CLS]", "[SEP]")
        self.unknown = self._vocab["[UNK]"]
        self.end = None if end is None else self._vocab[end]
        self.ends = () if self.end is None else (self.end,)
        self.added = {} if end is None else {end: self._vocab[end]}
        self.start = None if start is None else self._vocab[start]
        self.prefix = [] if self.start is None else [self.start]
        banned = ("[PAD]", "[UNK]", "[CLS]", "[MASK]")
        self.banned = [self._vocab[token] for token in banned if token in self._vocab]
        model = tokenizers.models.WordPiece(
            self._vocab, unk_token="[UNK]", max_input_chars_per_word=100
        )
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
            lowercase=self.lower_case
        )
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text; with `special`, the literal end token is that token."""
        return self.arrays([text], special)[0].tolist()

    def arrays(self, texts: Iterable[str], special: bool = False) -> list[np.ndarray]:
        """Return `encode` of each text as an int32 array; releases the interpreter lock."""
        texts = [without_surrogates(text) for text in texts]
        end = self._tokens[self.end] if special and self.end is not None else None
        parts = [text.split(end) if end else [text] for text in texts]
        encoded = iter(self._tokenizer.encode_batch_fast([p for part in parts for p in part]))
        arrays = []
        for part in parts:
            ids: list[int | None] = [*next(encoded).ids]
            for _ in part[1:]:
                ids += [self.end, *next(encoded).ids]
            arrays.append(np.array(ids, np.int32))
        return arrays

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids: Chinese without spaces, English with them."""
        stream = self.stream()
        return stream.feed(ids) + stream.finish()

    def stream(self) -> "WordPieceStream":
        """Return a decoder for ids that arrive one by one."""
        return WordPieceStream(self._tokens)

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Return the tokens of ids as the vocabulary spells them, in UTF-8."""
        return "".join(self._tokens.get(token, "") for token in ids).encode()

    def id_of(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None."""
        return self._vocab.get(token)

    def missing(self, text: str) -> collections.Counter[str]:
        """Count the characters that become [UNK] alone and have no ## form either."""
        counts = collections.Counter(text)
        for char in list(counts):
            if char not in self._missing:
                plain = self._tokenizer.normalizer.normalize_str(without_surrogates(char)).strip()
                known = all(c in self._vocab or f"##{c}" in self._vocab for c in plain)
                self._missing[char] = not known
            if not self._missing[char]:
                del counts[char]
        return counts


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

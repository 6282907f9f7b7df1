"""GPT-2's byte-level byte-pair encoding, through tiktoken."""

import collections
import itertools
from collections.abc import Iterable

import numpy as np
import regex

from gpt2cli.errors import UserError
from gpt2cli.text.description import (
    BYTE_OF,
    CHAR_OF,
    Description,
    after_document,
    bytes_by_id,
    token_bytes,
    without_surrogates,
)
from gpt2cli.text.streams import ByteStream

# openai/gpt-2 src/encoder.py, in the equal but faster spelling of tiktoken_ext/openai_public.py.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class BPE:
    """Byte-level byte-pair encoding; see `encoder` for the attributes.

    tiktoken joins two neighbours whenever their bytes together are a token, BPE only if that very
    pair is in the merges file. In a vocabulary made by training the two agree: neighbours p q that
    spell token t = l + r were made by merges of lower rank inside those bytes only; the training
    text was merged in that order too when it joined l and r to t, so p = l and q = r.

    Args:
        described: a byte-level tokenizer that splits text as GPT-2 does.

    Raises:
        UserError: it lacks bytes.
    """

    # Searched from the end of a text, hence (?r). What SPLIT matches on both sides of such a place
    # is the same if the text is cut there: a match that holds a non-space continues only with
    # non-spaces, and one that holds a letter only with letters, so all end there; nothing looks
    # back; and SPLIT looks ahead ($, (?!\S)) only from within spaces, and no match ends in them
    # here. Letters and digits are listed, as two libraries may know different Unicode versions.
    CUT = regex.compile(r"(?r)(?<=\S)[ \n]|(?<=[A-Za-z一-龥])[0-9。，、！？；：]")

    def __init__(self, described: Description) -> None:
        import tiktoken

        vocab, added = described.vocab, described.added
        merged = described.merged
        single = sorted((c for c in BYTE_OF if c in vocab), key=vocab.__getitem__)
        if len(single) < 256:
            lacking = ", ".join(f"0x{BYTE_OF[c]:02x}" for c in BYTE_OF if c not in vocab)
            raise UserError(
                f"{described.path} lacks tokens for the bytes {lacking:.60}; a byte-level BPE has "
                "all 256. Train it with initial_alphabet, or fetch it again"
            )
        ranked = list(dict.fromkeys(single + merged))
        tokens = described.tokens
        self.n_vocab = max(tokens.values()) + 1
        self.end = None if described.end is None else tokens[described.end]
        self.ends = described.ends
        self.start = None if described.start is None else tokens[described.start]
        self.prefix, suffix = described.around()
        self.after = after_document(suffix, self.end)
        self.banned: list[int] = []
        self.unknown: int | None = None
        self.added = added
        self._vocab = vocab
        self._bytes = bytes_by_id(described)
        # tiktoken's ids are ranks; ours are the file's, and in GPT-2's own files they are the same.
        ids = [*(vocab[token] for token in ranked), *added.values()]
        self._ids = None if ids == list(range(len(ids))) else np.array(ids, np.int32)
        self._tiktoken = tiktoken.Encoding(
            str(described.path),
            pat_str=SPLIT,
            mergeable_ranks={token_bytes(token): rank for rank, token in enumerate(ranked)},
            special_tokens={text: len(ranked) + n for n, text in enumerate(added)},
        )

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text; with `special`, the texts in `added` are those tokens."""
        return self._encode(text, special).tolist()

    def arrays(self, texts: Iterable[str], special: bool = False) -> list[np.ndarray]:
        """Return `encode` of each text as an int32 array; releases the interpreter lock."""
        return [self._encode(text, special) for text in texts]

    def _encode(self, text: str, special: bool) -> np.ndarray:
        allowed = set(self.added) if special else set()
        try:
            ranks = self._tiktoken.encode_to_numpy(
                text, allowed_special=allowed, disallowed_special=()
            )
        except UnicodeEncodeError:
            return self._encode(without_surrogates(text), special)
        except ValueError:  # tiktoken: no stack left to backtrack through a million spaces
            parts = _between_spaces(text)
            if len(parts) == 1:
                raise
            return np.concatenate([self._encode(part, special) for part in parts])
        return ranks.view(np.int32) if self._ids is None else self._ids[ranks]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; unknown ids are dropped, bytes outside UTF-8 become U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids, which may end inside a character."""
        return b"".join(self._bytes.get(int(index), b"") for index in ids)

    def stream(self) -> ByteStream:
        """Return a decoder for ids that arrive one by one."""
        return ByteStream(self)

    def missing(self, text: str) -> collections.Counter[str]:
        """Count the characters that the vocabulary lacks: none, as it has all bytes."""
        return collections.Counter()

    def id_of(self, token: str) -> int | None:
        """Return the id of a token given as text (`<|endoftext|>`, ` the`), or None."""
        if token in self.added:
            return self.added[token]
        return self._vocab.get("".join(CHAR_OF[b] for b in without_surrogates(token).encode()))


def _between_spaces(text: str) -> list[str]:
    """Cut out each very long run of spaces, except its last space.

    SPLIT joins that one to the word that follows. A run at the end of the text is one match, so it
    stays whole.
    """
    runs = [run.span() for run in regex.finditer(r"\s{9999,}+", text) if run.end() < len(text)]
    cuts = [0, *(cut for start, end in runs for cut in (start, end - 1)), len(text)]
    return [text[i:j] for i, j in itertools.pairwise(cuts) if i < j]

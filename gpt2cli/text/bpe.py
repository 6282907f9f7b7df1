"""GPT-2's byte-level byte-pair encoding, through tiktoken."""

import itertools
from collections.abc import Iterable

import numpy as np
import regex

from gpt2cli.errors import UserError
from gpt2cli.text.description import (
    BYTE_OF,
    CHAR_OF,
    Description,
    token_bytes,
    without_surrogates,
)
from gpt2cli.text.tokenizer import CUTS, Tokenizer

# openai/gpt-2 src/encoder.py, in the equal but faster spelling of tiktoken_ext/openai_public.py.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class BPE(Tokenizer):
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

        super().__init__(described)
        self.CUT = self._outside_added(BPE.CUT, *CUTS)
        vocab, added = described.vocab, self.added
        single = sorted((c for c in BYTE_OF if c in vocab), key=vocab.__getitem__)
        if len(single) < 256:
            lacking = ", ".join(f"0x{BYTE_OF[c]:02x}" for c in BYTE_OF if c not in vocab)
            raise UserError(
                f"{described.path} lacks tokens for the bytes {lacking:.60}; a byte-level BPE has "
                "all 256. Train it with initial_alphabet, or download it again"
            )
        ranked = list(dict.fromkeys(single + described.merged))
        self.unknown = None  # whatever the files name: no text needs it
        # tiktoken's ids are ranks; ours are the file's, and in GPT-2's own files they are the same.
        ids = [*(vocab[token] for token in ranked), *added.values()]
        self._ids = None if ids == list(range(len(ids))) else np.array(ids, np.int32)
        self._tiktoken = tiktoken.Encoding(
            str(described.path),
            pat_str=SPLIT,
            mergeable_ranks={token_bytes(token): rank for rank, token in enumerate(ranked)},
            special_tokens={text: len(ranked) + n for n, text in enumerate(added)},
        )

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

    def id_of(self, token: str) -> int | None:
        """Return the id of a token given as text, as `<|endoftext|>` or ` the`, or None."""
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

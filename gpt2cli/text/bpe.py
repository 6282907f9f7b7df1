"""GPT-2's byte-level byte-pair encoding, through tiktoken."""

import codecs
import collections
import itertools
from collections.abc import Iterable, Mapping

import numpy as np
import regex

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text.special import reading_options

# openai/gpt-2 src/encoder.py, in the equal but faster spelling of tiktoken_ext/openai_public.py.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END = "<|endoftext|>"


def without_surrogates(text: str) -> str:
    """Join pairs of surrogates to their character; replace lone ones by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class BPE:
    """Byte-level byte-pair encoding; see `encoder` for the attributes.

    tiktoken joins two neighbours whenever their bytes together are a token, BPE only if that very
    pair is in the merges file. In a vocabulary made by training the two agree: neighbours p q that
    spell token t = l + r were made by merges of lower rank inside those bytes only; the training
    text was merged in that order too when it joined l and r to t, so p = l and q = r.

    Args:
        folder: the vocabulary's folder.
        vocab_name: file of token -> id, as encoder.json.
        merges_name: file of merges, as vocab.bpe.

    Raises:
        UserError: a file is damaged, or the two do not belong together.
    """

    # Searched from the end of a text, hence (?r). What SPLIT matches on both sides of such a place
    # is the same if the text is cut there: a match that holds a non-space continues only with
    # non-spaces, and one that holds a letter only with letters, so all end there; nothing looks
    # back; and SPLIT looks ahead ($, (?!\S)) only from within spaces, and no match ends in them
    # here. Letters and digits are listed, as two libraries may know different Unicode versions.
    CUT = regex.compile(r"(?r)(?<=\S)[ \n]|(?<=[A-Za-z一-龥])[0-9。，、！？；：]")

    def __init__(self, folder: ModelFolder, vocab_name: str, merges_name: str) -> None:
        import tiktoken

        vocab = _read_vocab(folder, vocab_name)
        merged = _read_merges(folder, merges_name, vocab, vocab_name)
        single = sorted((c for c in BYTE_OF if c in vocab), key=vocab.__getitem__)
        if len(single) < 256:
            lacking = ", ".join(f"0x{BYTE_OF[c]:02x}" for c in BYTE_OF if c not in vocab)
            raise UserError(
                f"{folder.path / vocab_name} lacks tokens for the bytes {lacking:.60}; a "
                "byte-level BPE has all 256. Train it with initial_alphabet, or fetch it again"
            )
        ranked = list(dict.fromkeys(single + merged))
        self.n_vocab = max(vocab.values()) + 1
        _, start, end = reading_options(folder, vocab, END, END)
        self.end = None if end is None else vocab.get(end)
        self.start = None if start is None else vocab.get(start)
        self.prefix: list[int] = []
        self.banned: list[int] = []
        self.unknown: int | None = None
        self._vocab = vocab
        self._bytes = {index: _token_bytes(token) for token, index in vocab.items()}
        self._special: dict[str, int] = {}  # text -> rank
        ids = [vocab[token] for token in ranked]
        if end is not None and self.end is not None:
            self._bytes[self.end] = end.encode()
            self._special[end] = len(ranked)
            ids.append(self.end)
        self.ends = () if self.end is None else (self.end,)
        self.added = {text: ids[rank] for text, rank in self._special.items()}
        # tiktoken's ids are ranks; ours are the file's, and in GPT-2's own files they are the same.
        self._ids = None if ids == list(range(len(ids))) else np.array(ids, np.int32)
        self._tiktoken = tiktoken.Encoding(
            str(folder.path),
            pat_str=SPLIT,
            mergeable_ranks={_token_bytes(token): rank for rank, token in enumerate(ranked)},
            special_tokens=self._special,
        )

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text; with `special`, a literal <|endoftext|> is the end token."""
        return self._encode(text, special).tolist()

    def arrays(self, texts: Iterable[str], special: bool = False) -> list[np.ndarray]:
        """Return `encode` of each text as an int32 array; releases the interpreter lock."""
        return [self._encode(text, special) for text in texts]

    def _encode(self, text: str, special: bool) -> np.ndarray:
        allowed = set(self._special) if special else set()
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

    def stream(self) -> "BPEStream":
        """Return a decoder for ids that arrive one by one."""
        return BPEStream(self)

    def missing(self, text: str) -> collections.Counter[str]:
        """Count the characters that the vocabulary lacks: none, as it has all bytes."""
        return collections.Counter()

    def id_of(self, token: str) -> int | None:
        """Return the id of a token given as text (`<|endoftext|>`, ` the`), or None."""
        if token in self._special:
            return self.end
        return self._vocab.get("".join(CHAR_OF[b] for b in without_surrogates(token).encode()))


def _between_spaces(text: str) -> list[str]:
    """Cut out each very long run of spaces, except its last space.

    SPLIT joins that one to the word that follows. A run at the end of the text is one match, so it
    stays whole.
    """
    runs = [run.span() for run in regex.finditer(r"\s{9999,}+", text) if run.end() < len(text)]
    cuts = [0, *(cut for start, end in runs for cut in (start, end - 1)), len(text)]
    return [text[i:j] for i, j in itertools.pairwise(cuts) if i < j]


class BPEStream:
    """A decoder whose `feed` and `finish` give `decode` of all ids, and never half a character."""

    def __init__(self, encoder: BPE) -> None:
        self._encoder = encoder
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __copy__(self) -> "BPEStream":
        twin = BPEStream(self._encoder)
        twin._decoder.setstate(self._decoder.getstate())
        return twin

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""
        return self._decoder.decode(self._encoder.bytes_of(ids))

    def finish(self) -> str:
        """Return the rest: U+FFFD for a character whose last bytes never came."""
        return self._decoder.decode(b"", final=True)


# openai/gpt-2 src/encoder.py bytes_to_unicode: printable bytes are written as themselves, the
# others as the characters from U+0100 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
CHAR_OF = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
BYTE_OF = {char: byte for byte, char in CHAR_OF.items()}


def _token_bytes(token: str) -> bytes:
    """Return the bytes of a token as the file spells it; added tokens may be plain text."""
    try:
        return bytes([BYTE_OF[char] for char in token])
    except KeyError:
        return without_surrogates(token).encode()


def _read_vocab(folder: ModelFolder, name: str) -> dict[str, int]:
    """Read token -> id from encoder.json or vocab.json."""
    path = folder.path / name
    vocab = files.parse_object(folder.read(name), path)
    token_of: dict[int, str] = {}
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise UserError(f"{path}: the id of {token!r} is {index!r}, not a whole number from 0")
        if token_of.setdefault(index, token) is not token:
            raise UserError(f"{path}: {token_of[index]!r} and {token!r} have the same id {index}")
    return vocab


def _read_merges(
    folder: ModelFolder, name: str, vocab: Mapping[str, int], vocab_name: str
) -> list[str]:
    """Read the tokens that the merges make, in order of rank."""
    path, merged = folder.path / name, []
    for number, line in enumerate(files.decode(folder.read(name), path).split("\n"), 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(char in BYTE_OF for char in "".join(parts)):
            raise UserError(f"{path} line {number} is not two tokens: {line!r:.60}. Fetch it again")
        for token in (*parts, "".join(parts)):
            if token not in vocab:
                raise UserError(
                    f"{path} line {number} names {token!r}, which {vocab_name} lacks: the two "
                    "files do not belong to one model. Copy both from the same place"
                )
        merged.append("".join(parts))
    return merged

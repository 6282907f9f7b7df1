"""What a tokenizer is: the values of one tokenizer.json, its added tokens and its ends."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# openai/gpt-2 src/encoder.py bytes_to_unicode: printable bytes are written as themselves, the
# others as the characters from U+0100 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
CHAR_OF = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
BYTE_OF = {char: byte for byte, char in CHAR_OF.items()}
# Each such character -> the character with the byte's number; any other -> one outside Latin-1.
_TO_LATIN_1 = str.maketrans(
    dict.fromkeys(map(chr, range(256)), "\uffff") | {c: chr(b) for c, b in BYTE_OF.items()}
)
SYMBOLS = frozenset(BYTE_OF)  # of which the tokens of a byte-level vocabulary are spelled


def without_surrogates(text: str) -> str:
    """Join pairs of surrogates to their character; replace lone ones by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def token_bytes(token: str) -> bytes:
    """Return the bytes of a token as a byte-level vocabulary spells it, or those of its text."""
    try:
        return token.translate(_TO_LATIN_1).encode("latin-1")  # twice as fast as byte by byte
    except UnicodeEncodeError:
        return without_surrogates(token).encode()


@dataclass(frozen=True)
class Description:
    """A tokenizer, whichever files it came from.

    Attributes:
        path: the file with the vocabulary, for messages.
        values: the values of a tokenizer.json.
        is_plain: nothing in the files differs from GPT-2's or BERT's own tokenizer.
        start: the token that a sample from nothing begins with, as the vocabulary spells it.
        end: the token that follows a document, likewise.
        ends: ids that end a sample.
        notes: a sentence for each thing in the files that is ignored.
    """

    path: Path
    values: dict[str, Any]
    is_plain: bool = False
    start: str | None = None
    end: str | None = None
    ends: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> dict[str, Any]:
        """The model of the tokenizer.json: its type, vocabulary and merges."""
        return self.values["model"]

    @property
    def kind(self) -> str:
        """The type of the model: BPE, WordPiece, Unigram, WordLevel."""
        return str(self.model.get("type") or ("BPE" if "merges" in self.model else "WordPiece"))

    @property
    def vocab(self) -> dict[str, int]:
        """Token -> id of the model, without added tokens."""
        vocab = self.model["vocab"]
        if isinstance(vocab, list):  # Unigram: pairs of a piece and its score
            return {piece: index for index, (piece, _) in enumerate(vocab)}
        return vocab

    @functools.cached_property
    def merged(self) -> list[str]:
        """The tokens that the merges of a BPE make, in order of rank."""
        merges = self.model.get("merges") or []
        prefix = self.model.get("continuing_subword_prefix")
        if not prefix:
            return [m.replace(" ", "", 1) if isinstance(m, str) else m[0] + m[1] for m in merges]
        pairs = (m.split(" ") if isinstance(m, str) else m for m in merges)
        return [left + right.removeprefix(prefix) for left, right in pairs]

    @property
    def added(self) -> dict[str, int]:
        """Text -> id of the added and special tokens."""
        return {entry["content"]: entry["id"] for entry in self.values["added_tokens"]}

    @property
    def tokens(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return {**self.vocab, **self.added}

    @property
    def unknown(self) -> int | None:
        """The id of the token for text that the vocabulary lacks; None if it has all bytes."""
        if "unk_id" in self.model:
            return self.model["unk_id"]
        return self.tokens.get(self.model.get("unk_token") or "")

    @functools.cached_property
    def is_byte_level(self) -> bool:
        """Whether tokens are decoded as GPT-2's are: each is a sequence of bytes."""
        decoder = self.values.get("decoder") or {}
        return {part.get("type") for part in leaves(decoder, "decoders")} == {"ByteLevel"}

    def around(self) -> tuple[list[int], list[int]]:
        """Return the ids that the post-processor puts before and after a text.

        Raises:
            ValueError: it repeats or leaves out the text, or several parts of it add ids.
        """
        before: list[int] = []
        after: list[int] = []
        for part in leaves(self.values.get("post_processor") or {}, "processors"):
            if not part or part.get("type") == "ByteLevel":
                continue
            if before or after:
                raise ValueError("several parts of its post-processor add tokens")
            if part.get("type") in ("BertProcessing", "RobertaProcessing"):
                before, after = [part["cls"][1]], [part["sep"][1]]
            elif part.get("type") == "TemplateProcessing":
                names = [next(iter(piece.items())) for piece in part["single"]]
                places = [n for n, (kind, _) in enumerate(names) if kind == "Sequence"]
                if len(places) != 1:
                    raise ValueError("its post-processor does not contain the text once")
                place = places[0]
                ids = [
                    part["special_tokens"][value["id"]]["ids"] if kind == "SpecialToken" else []
                    for kind, value in names
                ]
                before = [*itertools.chain(*ids[:place])]
                after = [*itertools.chain(*ids[place:])]
            else:
                raise ValueError(f"its post-processor {part.get('type')!r:.40} is unknown")
        return before, after


def leaves(part: Mapping[str, Any], list_name: str) -> list[dict[str, Any]]:
    """Return the parts of a component of a tokenizer.json: of a Sequence its members."""
    if part.get("type") == "Sequence":
        return [leaf for member in part.get(list_name) or [] for leaf in leaves(member, list_name)]
    return [dict(part)] if not isinstance(part, dict) else [part]


PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
FIELDS: dict[str, type] = {
    **dict.fromkeys(("type", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"), str),
    "unk_id": int,
    "merges": list,
}


def misshapen(values: Mapping[str, Any]) -> str | None:
    """Return the name of a field of a tokenizer.json that has the wrong type, or None.

    Only fields that gpt2cli reads itself are looked at; the library checks the others.
    """
    for name, list_name in PARTS.items():
        if not _is_part(values.get(name), list_name):
            return name
    model = values["model"]
    for name, kind in FIELDS.items():
        if model.get(name) is not None and type(model[name]) is not kind:
            return f"model.{name}"
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or [])
    if not all(map(_are_texts, pairs)):
        return "model.merges"
    vocab = model["vocab"]
    scored = all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in vocab)
    return "model.vocab" if isinstance(vocab, list) and not scored else None


def _is_part(part: object, list_name: str) -> bool:
    """Return whether a component is an object, and a Sequence has a list of them."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return part is None
    members = part.get(list_name) or []
    return isinstance(members, list) and all(m and _is_part(m, list_name) for m in members)


def _are_texts(value: object) -> bool:
    """Return whether a value is a pair of texts."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def bytes_by_id(described: Description) -> dict[int, bytes]:
    """Return id -> bytes; of a token that is not made of bytes, its spelling in UTF-8.

    Added tokens are always spelled as their text.
    """
    spelled = token_bytes if described.is_byte_level else _utf8
    found = {index: spelled(token) for token, index in described.vocab.items()}
    found.update((index, _utf8(token)) for token, index in described.added.items())
    return found


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")

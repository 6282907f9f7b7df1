"""encoder.json with vocab.bpe, and vocab.txt -> the values of a tokenizer.json.

They get the parts that transformers' classes put around a vocabulary (tokenization_gpt2.py,
tokenization_bert.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2cli import counts, files
from gpt2cli.errors import UserError
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text.description import SYMBOLS

BYTE_LEVEL = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
PIECES = {"type": "WordPiece", "prefix": "##", "cleanup": True}  # BERT's decoder


def read_bpe(folder: ModelFolder, name: str) -> dict[str, int]:
    """Return token -> id of encoder.json or vocab.json; UserError if it is damaged."""
    path = folder.place(name)
    vocab = files.parse_object(folder.read(name), path)
    check_ids(vocab, path)
    return vocab


def read_merges(
    folder: ModelFolder, name: str, vocab: Mapping[str, int], vocab_name: str
) -> Iterator[str]:
    """Yield the pairs of a file of merges, in order of rank; a space is between the two.

    Raises:
        UserError: a line is not a pair of tokens of the vocabulary.
    """
    path = folder.place(name)
    for number, line in enumerate(_lines(folder, name), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not SYMBOLS.issuperset(parts[0] + parts[1]):
            raise UserError(
                f"{path} line {number} is not two tokens: {line!r:.60}. Download it again"
            )
        for token in (*parts, parts[0] + parts[1]):
            if token not in vocab:
                raise UserError(
                    f"{path} line {number} names {token!r}, which {vocab_name} lacks: the two "
                    "files do not belong to one model. Copy both from the same place"
                )
        yield line


def read_wordpiece(folder: ModelFolder, name: str) -> dict[str, int]:
    """Return token -> id of vocab.txt: line 0 is id 0; UserError if it is damaged."""
    lines = _lines(folder, name)
    return {line.rstrip(): index for index, line in enumerate(lines)}  # as tokenizers does


def gpt2(vocab: Mapping[str, int], merges: Sequence[str], has_prefix: bool) -> dict[str, Any]:
    """Return GPT2Tokenizer; with `has_prefix`, a space comes before every text."""
    splitter = {"type": "ByteLevel", **BYTE_LEVEL, "add_prefix_space": has_prefix}
    return {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": splitter,
        "decoder": {"type": "ByteLevel", **BYTE_LEVEL},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def bert(vocab: Mapping[str, int], unknown: object, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return BertTokenizer.

    Args:
        vocab: token -> id.
        unknown: the token for text that the vocabulary lacks.
        options: fields of BertNormalizer.
    """
    model = {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##"}
    return {
        "version": "1.0",
        "normalizer": {"type": "BertNormalizer", "clean_text": True, **options},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": dict(PIECES),
        "model": {**model, "max_input_chars_per_word": 100, "vocab": vocab},
    }


def decoder_of(model: Mapping[str, Any], splitters: Sequence[Any]) -> dict[str, Any] | None:
    """Return the decoder for a tokenizer.json without one; `splitters` are types."""
    if "ByteLevel" in splitters:
        return {"type": "ByteLevel", **BYTE_LEVEL}
    return dict(PIECES) if model.get("type") == "WordPiece" else None


def template(
    before: list[str], after: list[str], vocab: Mapping[str, int]
) -> dict[str, Any] | None:
    """Return a post-processor that puts tokens around a text; None if there are none."""
    if not before and not after:
        return None
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    pieces += [{"Sequence": {"id": "A", "type_id": 0}}]
    pieces += [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
    special = {t: {"id": t, "ids": [vocab[t]], "tokens": [t]} for t in (*before, *after)}
    pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pair,
        "special_tokens": special,
    }


def check_ids(vocab: Mapping[str, int], path: Path) -> None:
    """Reject (UserError) ids that are not whole numbers, or that two tokens have."""
    token_of: dict[int, str] = {}
    for token, index in vocab.items():
        if not counts.is_whole(index):
            raise UserError(
                f"{path}: the id of {token!r:.80} is {index!r:.80}, not a whole number from 0 to "
                f"{counts.MAX_COUNT}"
            )
        if token_of.setdefault(index, token) is not token:
            raise UserError(
                f"{path}: {token_of[index]!r:.80} and {token!r:.80} have the same id {index}"
            )


def _lines(folder: ModelFolder, name: str) -> list[str]:
    """Return the lines of a file, whichever system's line ends it has."""
    text = files.decode(folder.read(name), folder.place(name))
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{folder.place(name)} line {line} contains a NUL byte: it is damaged, or UTF-16 "
            "without a byte order mark. Save it as UTF-8, or download it again"
        )
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]

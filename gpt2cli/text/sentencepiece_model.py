"""SentencePiece models, read by the sentencepiece package as transformers' T5Tokenizer does."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2cli.errors import UserError
from gpt2cli.text.description import Description, without_surrogates
from gpt2cli.text.tokenizer import Tokenizer


def values_of(content: bytes, path: Path) -> dict[str, Any]:
    """Return the pieces of a SentencePiece model in the form of a tokenizer.json.

    Its model has the type SentencePiece, and the file itself as `proto`.

    Raises:
        UserError: the package is missing, or the file is damaged.
    """
    loaded = _load(content, path)
    pieces = [[loaded.id_to_piece(n), loaded.get_score(n)] for n in range(loaded.get_piece_size())]
    special = [n for n in range(len(pieces)) if loaded.is_control(n) or loaded.is_unknown(n)]
    model = {"type": "SentencePiece", "vocab": pieces, "unk_id": loaded.unk_id(), "proto": content}
    added = [{"id": n, "content": pieces[n][0], "special": True} for n in special]
    return {"added_tokens": added, "decoder": None, "post_processor": None, "model": model}


def _load(content: bytes, path: Path) -> Any:
    """Return the package's processor of a model."""
    try:
        package = importlib.import_module("sentencepiece")
    except ImportError:
        raise UserError(
            f"the sentencepiece package reads {path}, and it is not installed. Install it with: "
            'bin/install sentencepiece (or pip install ".[sentencepiece]")'
        ) from None
    try:
        return package.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise UserError(
            f"{path} is damaged or not a SentencePiece model. Download it again"
        ) from None


class SentencePiece(Tokenizer):
    """A SentencePiece model and added tokens; see `encoder` for the attributes.

    Text between added tokens is encoded by itself, as transformers' slow tokenizers do.

    Args:
        described: its values are from `values_of`; a normalizer Lowercase is obeyed.
    """

    def __init__(self, described: Description) -> None:
        super().__init__(described)
        self._model = _load(described.model["proto"], described.path)
        self._lowers = described.values.get("normalizer") is not None
        longest_first = sorted(self.added, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.CUT = self._where_to_cut()

    def arrays(self, texts: Iterable[str], special: bool = False) -> list[np.ndarray]:
        """See `Tokenizer.arrays`."""
        return [np.array([*self._ids_of(text, special)], np.int32) for text in texts]

    def _ids_of(self, text: str, special: bool) -> Iterator[int]:
        text = without_surrogates(text)
        begin = 0
        for mark in self._marks.finditer(text) if special else ():
            yield from self._pieces(text[begin : mark.start()])
            yield self.added[mark[0]]
            begin = mark.end()
        yield from self._pieces(text[begin:])

    def _pieces(self, text: str) -> list[int]:
        return self._model.encode(text.lower() if self._lowers else text)

    def _text(self, ids: list[int]) -> str:
        size = self._model.get_piece_size()
        parts: list[str] = []
        run: list[int] = []
        for index in ids:
            if index < size:
                run.append(index)
                continue
            parts += [self._model.decode(run), self._bytes[index].decode()]  # an added token
            run = []
        return "".join([*parts, self._model.decode(run)])

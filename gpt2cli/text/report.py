"""Counts for the summary of `encode`."""

import collections
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gpt2cli.console import counted
from gpt2cli.errors import UserError
from gpt2cli.text.encoder import Encoder
from gpt2cli.text.wordpiece import WordPiece


class Report:
    """Counts tokens, chunks, documents and unknown characters while the ids go by.

    Args:
        vocabulary: the vocabulary that encodes.
        count_documents: whether to count documents.
    """

    def __init__(self, vocabulary: Encoder, count_documents: bool) -> None:
        self._vocabulary = vocabulary
        self._count_documents = count_documents
        self._tokens = self._ends = self._chunks = self._unknown = self._documents = 0
        self._missing: collections.Counter[str] = collections.Counter()  # character -> times
        self._lock = threading.Lock()

    def watch(
        self, parts: Iterable[tuple[np.ndarray, bool]], in_text: str
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """Pass on the output of `encoded.encode` and count it; UserError if there was nothing."""
        between = True  # no id of the present chunk was seen yet
        for ids, ends in parts:
            self._tokens += len(ids)
            if self._vocabulary.end is not None:
                self._ends += int(np.count_nonzero(ids == self._vocabulary.end))
            if len(ids):
                self._chunks += between
                between = False
            between = between or ends
            yield ids, ends
        if not self._tokens:
            raise UserError(f"{in_text} contains no text. Is it the right file?")

    def see(self, text: str, ids: np.ndarray, closes: bool) -> None:
        """Count documents and characters that became [UNK]; called from several threads."""
        if self._count_documents:
            with self._lock:
                self._documents += closes
        if not isinstance(self._vocabulary, WordPiece):
            return
        unknown = int(np.count_nonzero(ids == self._vocabulary.unknown))
        if unknown:
            missing = self._vocabulary.missing(text)
            with self._lock:
                self._unknown += unknown
                self._missing.update(missing)

    def summary(self, out: Path, size: int, seconds: float) -> str:
        """Return the lines to print at the end.

        Args:
            out: the file that was written.
            size: bytes of text that were read.
            seconds: time it took.
        """
        within = [counted(self._documents, "document")] if self._count_documents else []
        if self._vocabulary.end is not None:
            within.append(counted(self._ends, "end token"))
        inside = f" ({', '.join(within)})" if within else ""
        lines = [
            f"{out}: {counted(self._tokens, 'token')}{inside} in {counted(self._chunks, 'chunk')}, "
            f"{size / self._tokens:.2f} bytes of text per token; {out.stat().st_size:,} bytes "
            f"written in {seconds:.1f} s"
        ]
        if self._unknown:
            common = " ".join(char for char, _ in self._missing.most_common(10))
            lines.append(
                f"{self._unknown / self._tokens:.2%} of the tokens are [UNK]: the vocabulary "
                f"lacks {common or 'words this long'}"
            )
        return "\n".join(lines)

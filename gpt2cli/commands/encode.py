"""gpt2cli encode: text files -> token ids in one .npz or .npy."""

import collections
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import SourceOptions, TextOptions
from gpt2cli.storage import folders
from gpt2cli.text import corpus as dataset
from gpt2cli.text import encoder


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(TextOptions, SourceOptions):
    """Convert text to token ids once, so that training starts at once.

    Files:
        in_text: text, .csv (one column) or .jsonl ("text") file, a folder of them, or a glob.
        out_npz: file to write: .npz (as nshepperd/gpt-2's encode.py), or .npy for a corpus larger
            than memory.

    Examples:
        gpt2cli encode data/books/ data/books.npz
        gpt2cli encode corpus.txt corpus.npy --model_name tiny --lines
    """

    in_text: str
    out_npz: str

    def __post_init__(self) -> None:
        check(self)
        self._check_text()
        self._check_source()
        if not self.out_npz.endswith((".npz", ".npy")):
            raise UsageError(f"--out_npz must end in .npz or .npy, got {self.out_npz!r}")


def run(config):
    """Encode `config.in_text` with a model's vocabulary into `config.out_npz`; report on stderr.

    Raises:
        UserError: no vocabulary, unreadable input, nothing in it, or an output that is the input.
    """
    started = time.monotonic()
    source = folders.source_dir(config)
    folders.check_sums(source)
    vocabulary = encoder.load(source)
    out = Path(config.out_npz)
    paths = _inputs(config.in_text, out)
    report = Report(vocabulary, config.lines)
    size = sum(path.stat().st_size for path in paths)
    # disable=None: a bar on a terminal, nothing in a log file.
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        parts = dataset.encode(paths, vocabulary, config, progress=bar.update, seen=report.see)
        parts = report.watch(parts, config.in_text)
        if out.suffix == ".npy":
            dataset.save_npy(out, parts, dataset.dtype_of(vocabulary.n_vocab))
        else:
            dataset.save_npz(out, parts)
    print(report.summary(out, size, time.monotonic() - started), file=sys.stderr)


def _inputs(in_text, out):
    """The files to encode: never the one that is about to be replaced."""
    paths = dataset.find(in_text)
    others = [path for path in paths if not (out.exists() and path.samefile(out))]
    if not others:
        raise UserError(f"{out} would be written over its own input. Name another file as OUT")
    if len(others) < len(paths):
        print(f"{out} lies among the input and is not read: it is written anew", file=sys.stderr)
    return others


class Report:
    """What the summary says, gathered while the ids go by."""

    def __init__(self, vocabulary, count_documents):
        self._vocabulary = vocabulary
        self._count_documents = count_documents
        self._tokens = self._ends = self._chunks = self._unknown = self._documents = 0
        self._missing = collections.Counter()  # character -> times
        self._lock = threading.Lock()

    def watch(self, parts, in_text):
        """Pass on what dataset.encode yields and count it; UserError if there was nothing."""
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
            raise UserError(f"{in_text} holds no text. Is it the right file?")

    def see(self, text, ids, closes):
        """Count documents and what characters made a text [UNK]; called from several threads."""
        if self._count_documents:
            with self._lock:
                self._documents += closes
        if not isinstance(self._vocabulary, encoder.WordPiece):
            return
        unknown = int(np.count_nonzero(ids == self._vocabulary.unknown))
        if unknown:
            missing = self._vocabulary.missing(text)
            with self._lock:
                self._unknown += unknown
                self._missing.update(missing)

    def summary(self, out, size, seconds):
        """The lines that are printed at the end."""
        within = [_counted(self._documents, "document")] if self._count_documents else []
        if self._vocabulary.end is not None:
            within.append(_counted(self._ends, "end token"))
        within = f" ({', '.join(within)})" if within else ""
        chunks = _counted(self._chunks, "chunk")
        lines = [
            f"{out}: {_counted(self._tokens, 'token')}{within} in {chunks}, "
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


def _counted(number, noun):
    """`1,234 tokens`, `1 token`."""
    return f"{number:,} {noun}" + "s" * (number != 1)

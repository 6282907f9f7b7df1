"""gpt2cli encode: text files to token ids in one .npz or .npy."""

import collections
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2cli import paths, signals
from gpt2cli.console import announce, counted, progress, say
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import SourceOptions, TextOptions

if TYPE_CHECKING:
    import numpy as np

    from gpt2cli.text.encoder import Encoder
    from gpt2cli.text.inputs import Found
    from gpt2cli.text.stored import Ids


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(TextOptions, SourceOptions):
    """Convert text to token ids, so that training starts immediately.

    Files:
        in_text: text, .csv, .tsv, .jsonl, .json or .parquet file, which may be compressed (.gz,
            .bz2, .xz, .zst); a folder of such files, or a glob.
        out_npz: file to write: .npz (the format of nshepperd/gpt-2), or .npy for a corpus larger
            than memory.

    Examples:
        gpt2cli encode data/books/ data/books.npz
        gpt2cli encode corpus.txt corpus.npy --model_name tiny --lines
        gpt2cli encode chats.jsonl chats.npz --template "{role}:\\n{content}\\n" --loss completion
        gpt2cli encode reviews.csv reviews.npz --csv_column body
    """

    in_text: str
    out_npz: str

    def __post_init__(self) -> None:
        check(self)
        self._check_text()
        self._check_source()
        if not self.out_npz.endswith((".npz", ".npy")):
            raise UsageError(f"--out_npz must end in .npz or .npy, got {self.out_npz!r}")


def run(options: EncodeOptions) -> None:
    """Encode `options.in_text` with a model's vocabulary into `options.out_npz`.

    Raises:
        UserError: no vocabulary, unreadable or empty input, or an output that is the input.
    """
    announce(f"reading {options.in_text}")

    from gpt2cli.storage import folders  # after the first line on a terminal
    from gpt2cli.text import documents, encoded, encoder, packed, stored
    from gpt2cli.text.inputs import Tally

    started = time.monotonic()
    folder = folders.open_folder(folders.source_dir(options))
    vocabulary = encoder.load(folder)
    paths.check_file(options.out_npz, "out_npz")
    out = Path(options.out_npz)
    found = _inputs(options.in_text, out)
    report = Report(vocabulary, options.reads_lines, options.loss)
    tally = Tally(found)
    size = sum(path.stat().st_size for path in found.paths)
    n_vocab = vocabulary.n_vocab
    unwritten = f"{out} was not written: {signals.AGAIN} to start from scratch"
    with signals.leaving(lambda: unwritten), progress(size, "B") as bar:
        parts = encoded.encode(
            found.paths,
            vocabulary,
            options,
            n_vocab,
            bar.update,
            report.see,
            tally,
            documents.chat_template_of(folder),
        )
        parts = report.watch(parts, options.in_text)
        if out.suffix == ".npy":
            stored.save_npy(out, parts, stored.dtype_of(n_vocab))
        else:
            stored.save_npz(out, parts)
    is_packed = any(packed.is_packed(path) for path in found.paths)
    say(report.summary(out, 0 if is_packed else size, time.monotonic() - started))
    for line in tally.lines():
        say(line)


def _inputs(in_text: str, out: Path) -> "Found":
    """Return the files to encode: never the output file."""
    from gpt2cli.text import inputs

    found = inputs.find(in_text)
    others = [path for path in found.paths if not (out.exists() and path.samefile(out))]
    if not others:
        raise UserError(f"{out} would replace its own input. Name another output file")
    if len(others) < len(found.paths):
        say(f"{out} is in the input folder; it is not read, and will be replaced")
    return found._replace(paths=others)


class Report:
    """Counts for the summary: tokens, chunks, documents and unknown characters.

    Args:
        vocabulary: the vocabulary that encodes.
        count_documents: whether to count documents.
        loss: --loss.
    """

    def __init__(self, vocabulary: "Encoder", count_documents: bool, loss: str) -> None:
        self._vocabulary = vocabulary
        self._count_documents = count_documents
        self._loss, self._learnt = loss, 0
        self._tokens = self._ends = self._chunks = self._unknown = self._documents = 0
        self._missing: collections.Counter[str] = collections.Counter()  # character -> times
        self._lock = threading.Lock()

    def watch(self, parts: "Iterable[Ids]", in_text: str) -> "Iterator[Ids]":
        """Count and pass on the output of `encoded.encode`.

        Raises:
            UserError: there is no text, or --loss completion selects no token or every token.
        """
        from gpt2cli.text import encoded, marks

        in_chunk = False  # whether the current chunk already has an id
        for ids, ends in parts:
            self._tokens += len(ids)
            if self._vocabulary.end is not None:
                self._ends += int((marks.ids_of(ids) == self._vocabulary.end).sum())
            self._learnt += marks.learnt_count(ids)
            if len(ids) and not in_chunk:
                self._chunks += 1
                in_chunk = True
            if ends:
                in_chunk = False
            yield ids, ends
        if not self._tokens:
            raise UserError(f"{in_text} contains no text. Is it the right file?")
        encoded.check_learnt(in_text, self._learnt, self._tokens, self._loss)

    def see(self, text: str, ids: "np.ndarray", closes: bool) -> None:
        """Count documents and characters that became [UNK]; called from several threads."""
        if closes and self._count_documents:
            with self._lock:
                self._documents += 1
        if self._vocabulary.unknown is None:
            return
        unknown = int((ids == self._vocabulary.unknown).sum())
        if unknown:
            missing = self._vocabulary.missing(text)
            with self._lock:
                self._unknown += unknown
                self._missing.update(missing)

    def summary(self, out: Path, size: int, seconds: float) -> str:
        """Return the lines to print at the end.

        Args:
            out: the file that was written.
            size: bytes of text that were read; 0 if the files are compressed.
            seconds: time it took.
        """
        parts = [counted(self._documents, "document")] if self._count_documents else []
        if self._vocabulary.end is not None:
            parts.append(counted(self._ends, "end token"))
        including = f" ({', '.join(parts)})" if parts else ""
        chunks = counted(self._chunks, "chunk")
        per_token = f", {size / self._tokens:.2f} bytes of text per token" if size else ""
        written = "written" if paths.is_stream(out) else f"{out.stat().st_size:,} bytes written"
        lines = [
            f"{out}: {counted(self._tokens, 'token')}{including} in {chunks}{per_token}; "
            f"{written} in {seconds:.1f} s"
        ]
        if self._unknown:
            common = " ".join(char for char, _ in self._missing.most_common(10))
            lines.append(
                f"{self._unknown / self._tokens:.2%} of the tokens are [UNK]: the vocabulary "
                f"lacks {common or 'words this long'}"
            )
        return "\n".join(lines)

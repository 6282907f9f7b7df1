"""gpt2cli encode: text files to token ids in one .npz or .npy."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2cli.console import progress, say
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import SourceOptions, TextOptions


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


def run(options: EncodeOptions) -> None:
    """Encode `options.in_text` with a model's vocabulary into `options.out_npz`.

    Raises:
        UserError: no vocabulary, unreadable or empty input, or an output that is the input.
    """
    from gpt2cli.storage import folders
    from gpt2cli.text import encoded, encoder
    from gpt2cli.text.report import Report

    started = time.monotonic()
    vocabulary = encoder.load(folders.source_dir(options))
    out = Path(options.out_npz)
    paths = _inputs(options.in_text, out)
    report = Report(vocabulary, options.reads_lines)
    size = sum(path.stat().st_size for path in paths)
    with progress(size, "B") as bar:
        parts = encoded.encode(paths, vocabulary, options, progress=bar.update, seen=report.see)
        parts = report.watch(parts, options.in_text)
        if out.suffix == ".npy":
            encoded.save_npy(out, parts, encoded.dtype_of(vocabulary.n_vocab))
        else:
            encoded.save_npz(out, parts)
    say(report.summary(out, size, time.monotonic() - started))


def _inputs(in_text: str, out: Path) -> Sequence[Path]:
    """Return the files to encode: never the one that is about to be replaced."""
    from gpt2cli.text import corpus

    paths = corpus.find(in_text)
    others = [path for path in paths if not (out.exists() and path.samefile(out))]
    if not others:
        raise UserError(f"{out} would replace its own input. Name another output file")
    if len(others) < len(paths):
        say(f"{out} is in the input folder; it is not read, and will be replaced")
    return others

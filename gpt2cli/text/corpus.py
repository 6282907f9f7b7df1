"""Text files -> documents, without holding a whole corpus in memory."""

import codecs
import csv
import glob
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.options import TextOptions

if TYPE_CHECKING:
    from regex import Pattern

BLOCK = 2**18  # bytes read at a time, and about as many characters encoded by a thread at a time
ENCODED = (".npz", ".npy")

Progress = Callable[[int], Any]  # is called with the number of bytes just read


def find(path: str | Path) -> list[Path]:
    """Return the files that a file name, a folder or a glob stands for; hidden ones are left out.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return [path]

    def unreadable(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    found: list[Path] = []
    if path.is_dir():
        for folder, folders, names in os.walk(path, onerror=unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    elif "**" in path.parts:
        found = list(_below(path))
    else:
        found = [Path(name) for name in glob.glob(str(path))]
    found = sorted(name for name in found if name.is_file())
    if not found:
        problem = "the folder contains no files" if path.is_dir() else "no file matches"
        raise UserError(
            f"{problem}: {path.absolute()}. Name a text file, a folder of them or a glob"
        )
    return found


def _below(pattern: Path) -> Iterator[Path]:
    """Yield the matches of a glob with **; unlike the glob module, follow no link to a folder."""
    magic = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    top, rest = Path(*pattern.parts[:magic]), pattern.parts[magic:]
    if rest[-1] == "**":  # pathlib's ** matches folders only
        rest += ("*",)
    for path in top.glob(str(Path(*rest))):
        hidden = any(part.startswith(".") for part in path.relative_to(top).parts)
        if not hidden or any(part.startswith(".") for part in rest):
            yield path


def _text(path: Path, options: TextOptions, progress: Progress) -> Iterator[str]:
    r"""Yield a file's text in blocks; line ends become \n, as in nshepperd/gpt-2, without a BOM."""
    decoder = codecs.getincrementaldecoder(options.encoding)(options.errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    binary = (
        f"{path} is not a text file: it contains NUL bytes. Leave it out of the input, or set "
        "--encoding if it is UTF-16 or similar"
    )
    try:
        with open(path, "rb") as file:
            while True:
                block = file.read(BLOCK)
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeError as error:
                    if b"\0" in block:
                        raise UserError(binary) from None
                    at = offset - pending + getattr(error, "start", 0)
                    raise UserError(
                        f"{path}: byte {at} is not {options.encoding} text "
                        f"({getattr(error, 'reason', error)}). Name the right encoding with "
                        "--encoding NAME, or replace such bytes by U+FFFD with --errors replace"
                    ) from None
                if "\0" in text:
                    raise UserError(binary)
                text = newlines.decode(text, final=not block)
                yield text.removeprefix("\ufeff") if offset == 0 else text
                offset += len(block)
                progress(len(block))
                if not block:
                    return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    r"""Yield the lines of a text with their \n (str.splitlines also splits at U+2028 and such)."""
    rest: list[str] = []
    for block in blocks:
        *lines, last = block.split("\n")
        for line in lines:
            yield "".join((*rest, line, "\n"))
            rest.clear()
        rest.append(last)
    if any(rest):
        yield "".join(rest)


def _csv_records(path: Path, options: TextOptions, blocks: Iterable[str]) -> Iterator[str]:
    """Yield the fields of a CSV file that has one column."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(_lines(blocks), strict=True)
    try:
        for number, row in enumerate(row for row in rows if row):
            if len(row) > 1:
                raise UserError(
                    f"{path} line {rows.line_num} has {len(row)} columns, not one. Put the text "
                    'in "quotes" (and double any quotes inside it), or use a .jsonl file'
                )
            if number or not options.csv_header:
                yield row[0]
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num} is not CSV: {error}") from None


def _jsonl_records(path: Path, options: TextOptions, blocks: Iterable[str]) -> Iterator[str]:
    """Yield the text of each line: a JSON string, or an object with "text"."""
    for number, line in enumerate(_lines(blocks), 1):
        if not line.strip():
            continue
        value = files.parse_json(line, f"{path} line {number}")
        value = value.get("text") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise UserError(
                f'{path} line {number} must be a JSON string or an object with a "text" string'
            )
        yield value


class Part(NamedTuple):
    """A part of a document, cut where the encoder allows it."""

    text: str
    opens: bool  # whether the document starts with this part
    closes: bool  # whether the document ends with this part


def parts_of(
    path: Path, cut: "Pattern[str]", options: TextOptions, progress: Progress
) -> Iterator[Part]:
    """Yield the parts of the documents in a text file; documents without a character are left out.

    `cut` is an encoder's CUT.

    Raises:
        UserError: the file cannot be read, or is not text in that encoding.
    """
    blocks = _text(path, options, progress)
    records = {".csv": _csv_records, ".jsonl": _jsonl_records}.get(path.suffix.lower())
    if records:
        yield from (Part(t, True, True) for t in records(path, options, blocks) if t)
    elif options.uer_compat:
        yield from _uer_lines(blocks, cut)
    else:
        for part, _ in _split(blocks, cut, by_line=options.lines):
            # a line that was cut is not blank: CUT never cuts within leading spaces
            is_blank = part.opens and part.closes and not part.text.strip()
            if not (options.lines and is_blank):
                yield part


def _split(
    blocks: Iterable[str], cut: "Pattern[str]", by_line: bool
) -> Iterator[tuple[Part, bool]]:
    r"""Yield (part, whether a \n ends it) of a document, or of one document per line.

    A document is cut only where a block ends, so that it can be of any length.
    """
    waiting: list[str] = []
    opens = True
    for block in blocks:
        *lines, last = block.split("\n") if by_line else [block]
        for line in lines:
            yield Part("".join((*waiting, line)) if waiting else line, opens, True), True
            waiting, opens = [], True
        match = cut.search(last)
        if match:
            yield Part("".join((*waiting, last[: match.start()])), opens, False), False
            waiting, opens = [], False
            last = last[match.start() :]
        if last:
            waiting.append(last)
    if waiting or not opens:
        yield Part("".join(waiting), opens, True), False


def _uer_lines(blocks: Iterable[str], cut: "Pattern[str]") -> Iterator[Part]:
    r"""Yield lines as UER-py reads them: with blank ones, but without a last one that lacks a \n.

    UER-py counts the \n and reads that many lines, but at least one (uer/utils/misc.py:5-13,
    dataset.py:438-472). Parts wait in memory until the \n of their line is read.
    """
    waiting: list[Part] = []
    any_ended = False
    for part, ended in _split(blocks, cut, by_line=True):
        waiting.append(part)
        if ended:
            yield from waiting
            waiting, any_ended = [], True
    if not any_ended:
        yield from waiting


def texts(
    paths: Iterable[Path],
    cut: "Pattern[str]",
    options: TextOptions,
    progress: Progress = lambda size: None,
) -> Iterator[str]:
    """Yield the text of files in parts of bounded size; the ends of documents do not show.

    Raises:
        UserError: see `parts_of`; or a file contains token ids.
    """
    for path in paths:
        if path.suffix.lower() in ENCODED:
            raise UserError(f"{path} contains token ids, not text. Leave it out of the input")
        yield from (part.text for part in parts_of(path, cut, options, progress))

"""Text files -> documents; a corpus need not fit in memory."""

import codecs
import csv
import glob
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpt2cli import files
from gpt2cli.errors import UserError

BLOCK = 2**18  # bytes read at a time, and about the characters given to one thread at a time
ENCODED = (".npz", ".npy")

Progress = Callable[[int], Any]  # is called with the number of bytes just read


def find(path):
    """The files that a path means: itself, all of a folder (hidden ones apart), or of a glob.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = []

    def unreadable(error):
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    if path.is_dir():
        for folder, folders, names in os.walk(path, onerror=unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    elif "**" in path.parts:
        found = _below(path)
    else:
        found = [Path(name) for name in glob.glob(str(path))]
    found = sorted(name for name in found if name.is_file())
    if not found:
        what = "the folder holds no file" if path.is_dir() else "no file matches"
        raise UserError(f"{what}: {path.absolute()}. Name a text file, a folder of them or a glob")
    return found


def _below(pattern):
    """What a glob with ** means; unlike the module of that name it follows no link to a folder."""
    magic = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    top, rest = Path(*pattern.parts[:magic]), pattern.parts[magic:]
    rest += ("*",) if rest[-1] == "**" else ()  # pathlib's ** means folders
    for path in top.glob(str(Path(*rest))):
        hidden = any(part.startswith(".") for part in path.relative_to(top).parts)
        if not hidden or any(part.startswith(".") for part in rest):
            yield path


def _text(path, settings, progress):
    """Blocks of a file's text; line ends become \\n (as in nshepperd/gpt-2), a BOM is dropped."""
    decoder = codecs.getincrementaldecoder(settings.encoding)(settings.errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    binary = (
        f"{path} is not a text file: it holds NUL bytes. Take it out of the input, or name its "
        "encoding with --encoding if it is UTF-16 text or the like"
    )
    try:
        with open(path, "rb") as file:
            while True:
                block = file.read(BLOCK)
                held = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeError as error:
                    if b"\0" in block:
                        raise UserError(binary) from None
                    at = offset - held + getattr(error, "start", 0)
                    raise UserError(
                        f"{path}: byte {at} is not {settings.encoding} text "
                        f"({getattr(error, 'reason', error)}). Name the right encoding with "
                        "--encoding NAME, or write U+FFFD for such bytes with --errors replace"
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


def _lines(blocks):
    """Blocks of text as lines with their \\n (str.splitlines also splits at U+2028 and such)."""
    rest = []
    for block in blocks:
        *lines, last = block.split("\n")
        for line in lines:
            yield "".join((*rest, line, "\n"))
            rest.clear()
        rest.append(last)
    if any(rest):
        yield "".join(rest)


def _csv_records(path, settings, blocks):
    """The fields of a CSV file of one column."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(_lines(blocks), strict=True)
    try:
        for number, row in enumerate(row for row in rows if row):
            if len(row) > 1:
                raise UserError(
                    f"{path} line {rows.line_num} has {len(row)} columns, not one. Put the text "
                    'in "quotes" (and double those inside), or make a .jsonl of it'
                )
            if number or not settings.csv_header:
                yield row[0]
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num} is not CSV: {error}") from None


def _jsonl_records(path, settings, blocks):
    """The texts of a file with one JSON string, or object with "text", a line."""
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
    opens: bool  # the document begins with it
    closes: bool  # ... ends with it


def parts_of(path, cut, settings, progress):
    """The documents of one text file in parts; documents without a character are left out."""
    blocks = _text(path, settings, progress)
    records = {".csv": _csv_records, ".jsonl": _jsonl_records}.get(path.suffix.lower())
    if records:
        yield from (Part(t, True, True) for t in records(path, settings, blocks) if t)
    elif settings.uer_compat:
        yield from _uer_lines(blocks, cut)
    elif settings.lines:
        for part, _ in _line_parts(blocks, cut):
            # a line that was cut is not blank: CUT never cuts within leading spaces
            if not part.opens or not part.closes or part.text.strip():
                yield part
    else:
        yield from _document_parts(blocks, cut)


def _document_parts(blocks, cut):
    """Blocks of text -> the Parts of the one document that they are; none where it is empty."""
    waiting, opens = [], True
    for block in blocks:
        match = cut.search(block)
        if match:
            yield Part("".join((*waiting, block[: match.start()])), opens, False)
            waiting, opens = [], False
        waiting.append(block[match.start() :] if match else block)
    text = "".join(waiting)
    if text or not opens:
        yield Part(text, opens, True)


def _line_parts(blocks, cut):
    """Blocks of text -> (_Part, whether its line has its \\n): each line is a document.

    Lines are whole but where a block ends, so that a line of any length can be passed on.
    """
    waiting, opens = [], True
    for block in blocks:
        *lines, last = block.split("\n")
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


def _uer_lines(blocks, cut):
    """`_line_parts` as UER-py reads lines: blank ones count, a last one without \\n does not.

    UER-py counts the \\n and reads that many lines, but at least one (uer/utils/misc.py:5-13,
    dataset.py:438-472). The parts of a line are held until its \\n is there: memory for one line.
    """
    held, any_ended = [], False
    for part, ended in _line_parts(blocks, cut):
        held.append(part)
        if ended:
            yield from held
            held, any_ended = [], True
    if not any_ended:
        yield from held


def texts(paths, cut, settings, progress=lambda size: None):
    """The texts of files, in parts of bounded size, for what counts words and not documents.

    Args:
        paths: from `find`.
        cut: regex as an encoder's CUT.
        settings: a TextOptions.
        progress: is told the bytes that were read.

    Raises:
        UserError: a file cannot be read, is not text in that encoding, or is encoded already.
    """
    for path in paths:
        if path.suffix.lower() in ENCODED:
            raise UserError(f"{path} holds token ids, not text. Take it out of the input")
        yield from (part.text for part in parts_of(path, cut, settings, progress))

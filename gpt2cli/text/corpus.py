"""Text files -> documents, without holding a whole corpus in memory."""

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2cli.errors import UserError
from gpt2cli.options import FileOptions, TextOptions
from gpt2cli.text import documents, jsontext, packed, parquet, records
from gpt2cli.text.documents import Part, Record
from gpt2cli.text.inputs import Tally

if TYPE_CHECKING:
    from regex import Pattern

BLOCK = 2**18  # bytes read at a time, and about as many characters encoded by a thread at a time
ENCODED = (".npz", ".npy")
MARKS = {  # of UTF-32 first, because one of them begins as one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}

Progress = Callable[[int], Any]  # is called with the number of bytes just read
Note = Callable[[str, Path], Any]  # is called with a note about a file


def blocks_of(
    path: Path,
    options: FileOptions,
    progress: Progress = lambda size: None,
    note: Note = lambda note, path: None,
) -> Iterator[str]:
    r"""Yield a file's text in blocks; line ends become \n, as in nshepperd/gpt-2, without a BOM.

    Raises:
        UserError: the file cannot be read, is not text, or is not text in that encoding.
    """
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = done = 0  # bytes of the content, bytes of the file
    with packed.opened(path) as (content, file):
        block = content.read(BLOCK)
        packed.check_text(path, block)
        _note_disguise(path, block, note)
        mark, encoding = _encoding(block, options, lambda text: note(text, path))
        decoder = codecs.getincrementaldecoder(encoding)(options.errors)
        while True:
            at = offset + mark - len(decoder.getstate()[0])  # of the first byte to decode
            try:
                text = decoder.decode(block[mark:] if mark else block, final=not block)
            except UnicodeError as error:
                if _is_wide(encoding) or b"\0" not in block:
                    raise _not_text(path, at, encoding, error) from None
                text = "\0"
            if "\0" in text:
                text = _without_nul(path, options, encoding, text, at, block)
            text = newlines.decode(text, final=not block)
            yield text if offset else text.removeprefix("\ufeff")
            offset, mark = offset + len(block), 0
            read = file.tell() if file.seekable() else offset  # a pipe has no position
            progress(read - done)
            done = read
            if not block:
                return
            block = content.read(BLOCK)


def _encoding(start: bytes, options: FileOptions, note: Callable[[str], None]) -> tuple[int, str]:
    """Return (bytes of the byte order mark at the start of a text, the encoding to read it in).

    The mark decides between the forms of UTF-16 and UTF-32, and where --encoding is the default.
    """
    given = codecs.lookup(options.encoding).name
    for sign, encoding in MARKS.items():
        if start.startswith(sign):
            family = encoding[:6].rstrip("-")
            if given == "utf-8" and family != "utf-8":
                note(f"read as {family.upper()} because of the byte order mark")
            if given in ("utf-8", "utf-8-sig", family, encoding):
                return len(sign), encoding
    return 0, options.encoding


def _note_disguise(path: Path, start: bytes, note: Note) -> None:
    """Note that the content of a plain text file looks like another kind of file."""
    ending, _ = packed.names_of(path)
    if records.is_records(ending):
        return
    if _is_json(start):
        note(
            "looks like JSON but is read as text; to read records, rename it to .json or .jsonl",
            path,
        )
    elif packed.looks_like_html(start):
        note("looks like a web page; its markup is read as text", path)


def _is_json(start: bytes) -> bool:
    """Return whether a text begins with a JSON object, or a list of texts or objects."""
    if not start[:100].lstrip().startswith((b"{", b"[")):
        return False
    text = start[:4096].decode("utf-8", "ignore").lstrip()
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:  # a long one is cut within a value
        is_cut = len(start) > 4096 and ("Unterminated" in error.msg or error.pos > len(text) - 12)
        return is_cut and "".join(text[:20].split()).startswith(('{"', '["', '[{"'))
    except RecursionError:
        return False
    first = value[0] if isinstance(value, list) and value else value
    return bool(value) and isinstance(first, (str, dict))


def _is_wide(encoding: str) -> bool:
    """Return whether ASCII characters have NUL bytes in an encoding."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def _without_nul(
    path: Path, options: FileOptions, encoding: str, text: str, at: int, block: bytes
) -> str:
    """Return a text with its NUL characters replaced by U+FFFD.

    Args:
        path: the file.
        options: the flags.
        encoding: the encoding of the text.
        text: a block.
        at: the place of its first byte.
        block: the bytes of the text; the first may be missing.

    Raises:
        UserError: --errors is strict, or the file is binary.
    """
    is_wide = _is_wide(encoding)
    is_binary = not is_wide and block.count(b"\0") * 10 > len(block)
    if options.errors == "replace" and not is_binary:
        return text.replace("\0", "\ufffd")
    before = text[: text.index("\0")]
    if is_wide:
        at += len(before.encode(encoding, "replace")) - len("".encode(encoding))
    else:
        at += len(before.encode(encoding, "replace")) if before else block.find(b"\0")
    line = _line_of(path, at, encoding)
    where = f"byte {at} ({line})" if line else f"byte {at}"
    if is_binary:
        raise UserError(
            f"{path} is not a text file: it has many NUL bytes, the first at {where}. If it is "
            "UTF-16, read it with --encoding utf-16-le or utf-16-be; otherwise leave it out of the "
            "input"
        )
    raise UserError(
        f"{path} has a NUL character at {where}. Replace such characters by U+FFFD with --errors "
        "replace, or remove them"
    )


def _not_text(path: Path, start: int, encoding: str, error: UnicodeError) -> UserError:
    """Return the error for an invalid byte in a block that begins at byte `start`."""
    at = start + getattr(error, "start", 0)
    line = _line_of(path, at, encoding)
    return UserError(
        f"{path}: byte {at} is not {encoding} text{f', at {line}' if line else ''} "
        f"({getattr(error, 'reason', error)}). Name the right encoding with --encoding NAME, or "
        "replace such bytes by U+FFFD with --errors replace"
    )


def _line_of(path: Path, at: int, encoding: str) -> str:
    """Return "line 3" for a byte in a file's content, which is read again; "" for a pipe."""
    if not path.is_file():
        return ""
    left, line = at, 1
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder(encoding)("replace"), translate=True
    )
    with packed.opened(path) as (content, _):
        while left and (block := content.read(min(left, BLOCK))):
            left -= len(block)
            line += decoder.decode(block).count("\n")
    return f"line {line}"


def parts_of(
    path: Path,
    cut: "Pattern[str]",
    options: TextOptions,
    progress: Progress,
    tally: Tally | None = None,
) -> Iterator[Part]:
    """Yield the parts of the documents in a text file; empty documents are left out.

    `cut` is an encoder's CUT.

    Raises:
        UserError: the file cannot be read, or is not text in that encoding.
    """
    ending, _ = packed.names_of(path)
    note = tally.note if tally else lambda note, path: None
    if records.is_records(ending):
        for record in records_of(path, options, progress, note):
            parts = documents.parts_of(record, options)
            yield from parts
            if tally and not parts:
                tally.skip_record()
        return
    if options.template is not None:
        raise UserError(
            f"{path} is plain text. --template needs records, such as in a .jsonl or .csv file"
        )
    blocks = blocks_of(path, options, progress, note)
    if options.uer_compat:
        yield from _uer_lines(path, blocks, cut)
        return
    by_line = options.lines
    for part, _ in _split(path, blocks, cut, by_line):
        # a part of a line is not blank: CUT never cuts within leading spaces
        if not by_line or part.text.strip() or not (part.opens and part.closes):
            yield part


def records_of(
    path: Path,
    options: FileOptions,
    progress: Progress = lambda size: None,
    note: Note = lambda note, path: None,
    default: str = "text",
) -> Iterator[Record]:
    """Yield the records of a file whose name ends as one of `records`.

    Args:
        path: the file.
        options: how to read it.
        progress: called with the number of bytes just read.
        note: called with a note about the way in which a file was read, and the file.
        default: the column that is read if there are several and none is named.

    Raises:
        UserError: the file cannot be read, or is not of the kind that its name says.
    """
    if packed.names_of(path)[0] in (".parquet", ".pq"):
        return parquet.rows_of(path, options, default, progress)
    return records.of_text(path, blocks_of(path, options, progress, note), options, default)


def check_flags(paths: Iterable[Path], options: FileOptions) -> None:
    """Reject (UserError) --csv_column or --json_field if no file has such records."""
    endings = {packed.names_of(path)[0] for path in paths}
    for flag, kinds in (("csv_column", records.TABLES), ("json_field", records.OBJECTS)):
        if getattr(options, flag) is not None and not endings.intersection(kinds):
            raise UserError(f"--{flag} is for {', '.join(kinds)} files, and the input has none")


def _split(
    path: Path, blocks: Iterable[str], cut: "Pattern[str]", by_line: bool
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
            if sum(map(len, waiting)) > jsontext.LONGEST:
                raise records.too_long(f"{path}: a single word")
    if waiting or not opens:
        yield Part("".join(waiting), opens, True), False


def _uer_lines(path: Path, blocks: Iterable[str], cut: "Pattern[str]") -> Iterator[Part]:
    r"""Yield lines as UER-py reads them: with blank ones, but without a last one that lacks a \n.

    UER-py counts the \n and reads that many lines, but at least one (uer/utils/misc.py:5-13,
    dataset.py:438-472). Parts wait in memory until the \n of their line is read.
    """
    waiting: list[Part] = []
    any_ended = False
    for part, ended in _split(path, blocks, cut, by_line=True):
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

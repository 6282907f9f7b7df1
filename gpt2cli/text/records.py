"""Text of .csv, .tsv, .jsonl, .ndjson and .json files -> records."""

import contextlib
import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.options import FileOptions, TextOptions, split_template
from gpt2cli.text import packed
from gpt2cli.text.documents import MESSAGE, PAIR, Record, forms_in
from gpt2cli.text.jsontext import LONGEST, JsonText, items_of

TABLES = (".csv", ".tsv", ".parquet", ".pq")
OBJECTS = (".jsonl", ".ndjson", ".json")

Blocks = Iterable[str]


def is_records(ending: str) -> bool:
    """Return whether files with this ending contain records."""
    return ending in TABLES or ending in OBJECTS


def of_text(path: Path, blocks: Blocks, options: FileOptions, default: str) -> Iterator[Record]:
    """Yield the records of a file whose content is text.

    Args:
        path: the file.
        blocks: its decoded content.
        options: which column to read.
        default: the column that is read if there are several and none is named.

    Raises:
        UserError: the content is not of the kind that the name says.
    """
    ending, _ = packed.names_of(path)
    if ending in (".csv", ".tsv"):
        return _csv(path, blocks, options, default)
    return _json(path, blocks) if ending == ".json" else _jsonl(path, lines_of(path, blocks))


def lines_of(path: Path, blocks: Blocks) -> Iterator[str]:
    r"""Yield the lines of a text with their \n (str.splitlines also splits at U+2028 and such).

    Raises:
        UserError: a line has more than LONGEST characters: it would fill the memory.
    """
    rest: list[str] = []
    number, size = 1, 0
    for block in blocks:
        *lines, last = block.split("\n")
        for line in lines:
            yield "".join((*rest, line, "\n"))
            rest.clear()
            number, size = number + 1, 0
        rest.append(last)
        size += len(last)
        if size > LONGEST:
            raise too_long(f"{path} line {number}")
    if any(rest):
        yield "".join(rest)


def too_long(where: str) -> UserError:
    """Return the error for a value that would fill the memory."""
    return UserError(f"{where} has more than {LONGEST:,} characters. Split it, or leave it out")


class _Quotes:
    """Lines of a CSV file, with the number of the line at which an open quote began.

    Args:
        path: the file, for messages.
        lines: its lines.

    Attributes:
        opened: that line, if a quote is open.
    """

    def __init__(self, path: Path, lines: Iterable[str]) -> None:
        self._lines, self._number, self._is_open, self.opened = iter(lines), 0, False, 0
        self._path, self._size = path, 0

    def __iter__(self) -> "_Quotes":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        self._size += len(line)
        if self._size > LONGEST:
            raise too_long(f"{self._path} line {self._number}: the row")
        if line.count('"') % 2:
            self._is_open = not self._is_open
            if self._is_open:
                self.opened = self._number
        return line

    def end_record(self) -> None:
        """Note that a record has ended, and with it every quote."""
        self._is_open, self.opened, self._size = False, 0, 0


def _csv(path: Path, blocks: Blocks, options: FileOptions, default: str) -> Iterator[Record]:
    """Yield the rows of a CSV file: the text of the column, or an object of the columns needed."""
    csv.field_size_limit(2**31 - 1)
    is_tsv = packed.names_of(path)[0] == ".tsv"
    lines = _Quotes(path, lines_of(path, blocks))
    rows = csv.reader(lines, strict=True, delimiter="\t" if is_tsv else ",")
    header: list[str] | None = None
    wanted: dict[str, int] = {}
    try:
        for row in rows:
            lines.end_record()
            if not row:
                continue
            where = f"{path} line {rows.line_num}"
            if header is None:
                header = row
                wanted = _columns(where, header, options, default, is_tsv)
                if options.csv_header:
                    continue
            if len(row) != len(header):
                number = "one" if len(header) == 1 else str(len(header))
                raise UserError(
                    f"{where} has {len(row)} columns, not {number}. Put the text in "
                    '"quotes" (and double any quotes inside it), or use a .jsonl file'
                )
            yield Record(
                value_of({name: row[place] for name, place in wanted.items()}, options), where
            )
    except csv.Error as error:
        opened = f". A quote opens at line {lines.opened} and is not closed" if lines.opened else ""
        raise UserError(f"{path} line {rows.line_num} is not CSV: {error}{opened}") from None


def value_of(row: dict[str, Any], options: FileOptions) -> Any:
    """Return the value of a row with one column of text, or the row."""
    named = row.get(options.csv_column) if options.csv_column else None
    is_text = len(row) == 1 and _template(options) is None
    is_text &= "messages" not in row or isinstance(named, str)
    return next(iter(row.values())) if is_text else row


def _template(options: FileOptions) -> str | None:
    """Return --template; the prompts of `sample` have none."""
    return options.template if isinstance(options, TextOptions) else None


def _columns(
    where: str, header: Sequence[str], options: FileOptions, default: str, is_tsv: bool
) -> dict[str, int]:
    """Return the columns of a CSV file to read, as name -> place."""
    if not options.csv_header:
        if len(header) > 1:
            raise UserError(
                f"{where} has {len(header)} columns, not one. Add a header line, and choose a "
                "column with --csv_column NAME (without --csv_header=false)"
            )
        return {"": 0}
    names = wanted(where, list(header), list(header), options, default)
    usual, others = ("tabs", ";,") if is_tsv else ("commas", ";\t")
    if len(header) == 1 and options.csv_column is None and any(c in header[0] for c in others):
        raise UserError(
            f"{where} has one column, {header[0]!r}, but its columns may be separated by other "
            f"characters than {usual}. Use commas in a .csv, and tabs in a .tsv. If it really is "
            "one column, name it with --csv_column"
        )
    return {name: header.index(name) for name in names}


def wanted(
    where: str, names: list[str], texts: list[str], options: FileOptions, default: str
) -> list[str]:
    """Return the names of the columns to read: of --csv_column, of --template, or the only text.

    Args:
        where: the file and place, for messages.
        names: all columns.
        texts: those that contain text.
        options: the flags.
        default: the column that is read if there are several and none is named.

    Raises:
        UserError: there is no such column, or several contain text.
    """
    shown = ", ".join(name or "(no name)" for name in names)
    if options.csv_column is not None:
        if names.count(options.csv_column) != 1:
            many = names.count(options.csv_column) or "no"
            raise UserError(
                f"{where} has {many} columns {options.csv_column!r}. Its columns are: {shown}"
            )
        return [options.csv_column]
    template = _template(options)
    if template is not None:
        fields = {field for _, field in split_template(template) if field}
        if fields <= MESSAGE and "messages" in names:
            return ["messages"]
        for field in fields:
            if names.count(field) != 1:
                raise UserError(
                    f"{where} has {names.count(field) or 'no'} columns {field!r}, which --template "
                    f"names. Its columns are: {shown}"
                )
        return sorted(fields)
    if default != "text" and default in names:
        return [default]
    forms = forms_in(names)
    if forms == ["messages"]:
        return ["messages"]
    if forms == ["prompt and completion"]:
        return list(PAIR)
    if len(texts) == 1 and len(forms) < 2:
        return texts
    raise UserError(
        f"{where} has {len(texts) or 'no'} columns with text"
        + (f": {shown}. Name one with --csv_column" if texts else f". Its columns are: {shown}")
    )


def _jsonl(path: Path, lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path} line {number}"
            yield Record(files.parse_json(line, where), where)


def _json(path: Path, blocks: Blocks) -> Iterator[Record]:
    """Yield the items of a JSON list; read JSON lines in a .json file as such."""
    text = JsonText(blocks)
    first = text.skip_space()
    if first in ("{", '"'):
        yield from _json_lines(path, lines_of(path, text.rest()))
    elif first == "[":
        yield from items_of(path, text)
    else:
        raise _no_list(path)


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[Record]:
    """Yield the records of JSON lines; reject (UserError) a single object that is not a record."""
    records = _jsonl(path, lines)
    first = None
    with contextlib.suppress(UserError):
        first = next(records)
    if first is None or not (forms_in(first.value) or _has_text(first.value)):
        raise _no_list(path)
    yield first
    yield from records


def _has_text(value: Any) -> bool:
    """Return whether a value of JSON is a text, or an object with one."""
    fields = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(field, str) for field in fields)


def _no_list(path: Path) -> UserError:
    return UserError(
        f"{path} is neither a JSON list of texts or objects nor JSON lines. If it is an object "
        "with a list, extract the list, for example with: jq .data OLD.json > NEW.json"
    )

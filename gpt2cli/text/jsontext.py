"""A list in a JSON text -> its items, one at a time."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt2cli.errors import UserError
from gpt2cli.text.documents import Record

LONGEST = 2**28  # characters of the longest value that is read


def items_of(path: Path, text: "JsonText") -> Iterator[Record]:
    """Yield the items of a list whose [ is the next character.

    Raises:
        UserError: an item is not a text, object or list, or the text is not JSON.
    """
    text.skip(1)
    number = 0
    while text.skip_space() != "]":
        number += 1
        where = f"{path} item {number} (line {text.line})"
        yield Record(text.value(where), where)
        after = text.skip_space()
        if after == ",":
            text.skip(1)
            after = text.skip_space()
            after = "no value" if after == "]" else ","
        if after not in (",", "]"):
            raise UserError(f"{path} line {text.line} is not JSON: a comma or ] is missing")
    text.skip(1)
    if text.skip_space():
        raise UserError(f"{path} line {text.line} is not JSON: text follows the list")


class JsonText:
    """A JSON text that is read as far as needed.

    Attributes:
        line: number of the line of the next character.
    """

    def __init__(self, blocks: Iterable[str]) -> None:
        self.line = 1
        self._blocks = iter(blocks)
        self._text, self._at = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def _more(self) -> bool:
        """Read at least as much as is waiting, so that a long value is parsed only a few times."""
        parts, size = [self._text[self._at :]], 0
        least = len(parts[0])
        for block in self._blocks:
            parts.append(block)
            size += len(block)
            if size and size >= least:
                break
        if size:
            self._text, self._at = "".join(parts), 0
        return size > 0

    def skip(self, count: int) -> None:
        """Move on by some characters."""
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def skip_space(self) -> str:
        """Move on to the next character that is not white space; return it, or "" at the end."""
        while True:
            text = self._text
            end = self._at
            while end < len(text) and text[end] in " \t\n\r":
                end += 1
            self.skip(end - self._at)
            if end < len(text):
                return text[end]
            if not self._more():
                return ""

    def value(self, where: str) -> Any:
        """Return the next value and move past it; UserError if it is not a text, object or list."""
        if self.skip_space() not in ('"', "{", "["):
            raise UserError(f"{where} must be a text or an object")
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                is_short = len(self._text) - self._at < LONGEST
                if is_short and _is_cut(error, len(self._text)) and self._more():
                    continue
                raise UserError(f"{where} is not JSON ({self._reason(error)})") from None
            self.skip(end - self._at)
            return value

    def _reason(self, error: Exception) -> str:
        """Return the decoder's message with the line of the file."""
        if isinstance(error, json.JSONDecodeError):
            return (
                f"{error.msg} at line {self.line + error.doc.count(chr(10), self._at, error.pos)}"
            )
        return str(error)

    def rest(self) -> Iterator[str]:
        """Yield the rest of the text, after as many line ends as were read."""
        yield "\n" * (self.line - 1) + self._text[self._at :]
        yield from self._blocks


def _is_cut(error: Exception, length: int) -> bool:
    """Return whether more text could remove an error: it is at the end, or a text has no end."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= length - 12

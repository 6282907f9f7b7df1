"""Read the prompts that `sample` answers: from a flag, standard input or a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2cli import files, machine
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.options import FileOptions
from gpt2cli.text import corpus, jsontext, packed, records
from gpt2cli.text.documents import Record, text_of

if TYPE_CHECKING:
    from gpt2cli.commands.sample import SampleOptions

# All prompts of a command may need this many bytes of memory, or a quarter of the free memory. Each
# process of a job reads them. A GiB has 3.7 million prompts of 200 letters, or 22,000 of 1,000 ids.
LEAST_ROOM = 2**30
ITEM = 40  # bytes of a list's item and of its number

Prompt = str | list[int] | None  # a text, token ids, or nothing to continue


def read(
    prompt: str | None, prompt_file: str | None, prompts: str | None, options: FileOptions
) -> list[Prompt]:
    """Return the prompts that the flags of these names give; [None] if all three are None.

    Args:
        prompt: --prompt.
        prompt_file: --prompt_file.
        prompts: --prompts.
        options: how to read files.

    Raises:
        UserError: a prompt cannot be read; the message names the file and the line.
    """
    if prompts is not None:
        return _all_in(Path(prompts), options)
    if prompt_file is not None:
        blocks = corpus.blocks_of(Path(prompt_file), options, note=_say)
        return [_without_newline(_joined(prompt_file, blocks))]
    if prompt == "-":
        try:
            content = sys.stdin.buffer.read(jsontext.LONGEST + 1)
            if len(content) > jsontext.LONGEST:
                raise records.too_long("standard input")
            text = content.decode(options.encoding, options.errors)
        except UnicodeError as error:
            name = "UTF-8" if options.encoding == "utf-8" else options.encoding
            at = getattr(error, "start", 0)
            raise UserError(f"standard input is not {name} text: byte {at}") from None
        return [_without_newline(text)]
    return [prompt]


@contextlib.contextmanager
def snapshot(options: SampleOptions, prompts: Sequence[Prompt]) -> Iterator[SampleOptions]:
    """Write the prompts to a temporary file, and yield the options of a job that reads it.

    The processes of a job read this file instead of --prompts, which may be a pipe, or be replaced
    while the job runs. No other user can read it. It is removed when the block ends.

    Raises:
        UserError: it cannot be written.
    """
    usual: dict[str, Any] = {
        f.name: f.default for f in dataclasses.fields(FileOptions) if f.name != "errors"
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        with files.replacing(path, "w", encoding="ascii") as file:
            file.writelines(json.dumps(prompt) + "\n" for prompt in prompts)
        yield dataclasses.replace(options, prompts=str(path), **usual)


def _all_in(path: Path, options: FileOptions) -> list[Prompt]:
    """Return the prompts of a file; UserError if there are none, or they need too much memory."""
    found: list[Prompt] = []
    most = room = max(LEAST_ROOM, (machine.free_memory() or 0) // 4)
    for prompt in _prompts_in(path, options):
        found.append(prompt)
        room -= sys.getsizeof(prompt) + ITEM * (len(prompt) if isinstance(prompt, list) else 1)
        if room < 0:
            raise UserError(
                f"{path} has too many prompts: the first {len(found):,} need {most:,} bytes of "
                "memory, the limit. Split the file"
            )
    if not found:
        raise UserError(f"{path} contains no prompt; write one per line")
    return found


def _joined(name: str, blocks: Iterable[str]) -> str:
    """Return the text of some blocks; UserError if it has more than LONGEST characters."""
    parts, size = [], 0
    for block in blocks:
        parts.append(block)
        size += len(block)
        if size > jsontext.LONGEST:
            raise records.too_long(name)
    return "".join(parts)


def _say(note: str, path: Path) -> None:
    say(f"{path}: {note}")


def _without_newline(text: str) -> str:
    """Remove the final newline, which the file or `echo` added to the prompt."""
    return text.removesuffix("\n").removesuffix("\r")


def _prompts_in(path: Path, options: FileOptions) -> Iterator[Prompt]:
    """Yield the prompt in each record, or in each line that is not blank."""
    corpus.check_flags([path], options)
    if records.is_records(packed.names_of(path)[0]):
        for record in corpus.records_of(path, options, note=_say, default="prompt"):
            yield _prompt_of(record, options)
        return
    for line in records.lines_of(path, corpus.blocks_of(path, options, note=_say)):
        if line.strip():
            yield line.removesuffix("\n")


def _prompt_of(record: Record, options: FileOptions) -> Prompt:
    value, where = record
    if isinstance(value, Mapping) and options.json_field is None:
        value = value.get("prompt", value.get("tokens"))
    is_ids = isinstance(value, list) and value and all(type(item) is int for item in value)
    if is_ids:
        return value
    if not isinstance(value, str) and options.json_field is None:
        raise UserError(
            f'{where} must be a text, a list of token ids, or an object with "prompt" or "tokens". '
            "Name another field with --json_field"
        )
    return text_of(value, where, options, default="prompt")

"""Read the prompts that `sample` answers: from a flag, standard input or a file."""

import sys
from collections.abc import Iterator
from pathlib import Path

from gpt2cli import files
from gpt2cli.errors import UserError

Prompt = str | list[int] | None  # a text, token ids, or nothing to continue


def read(prompt: str | None, prompt_file: str | None, prompts: str | None) -> list[Prompt]:
    """Return the prompts that the flags of these names give; [None] if all three are None.

    Raises:
        UserError: a prompt cannot be read; the message names the file and the line.
    """
    if prompts is not None:
        return list(_prompts_in(Path(prompts)))
    if prompt_file is not None:
        return [_without_newline(files.read_text(prompt_file))]
    if prompt == "-":
        try:
            return [_without_newline(sys.stdin.buffer.read().decode("utf-8"))]
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text: byte {error.start}") from None
    return [prompt]


def _without_newline(text: str) -> str:
    """Remove the final newline, which the file or `echo` added to the prompt."""
    return text.removesuffix("\n").removesuffix("\r")


def _prompts_in(path: Path) -> Iterator[Prompt]:
    """Yield the prompt in each line that is not blank."""
    lines = files.read_text(path).removeprefix("\ufeff").split("\n")
    numbered = [(n, line.removesuffix("\r")) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} contains no prompt; write one per line")
    for number, line in numbered:
        is_json = path.suffix.lower() == ".jsonl"
        yield _parse_line(f"{path} line {number}", line) if is_json else line


def _parse_line(where: str, line: str) -> Prompt:
    value = files.parse_json(line, where)
    if isinstance(value, dict):
        value = value.get("prompt", value.get("tokens"))
    is_ids = isinstance(value, list) and value and all(type(item) is int for item in value)
    if isinstance(value, str) or is_ids:
        return value
    raise UserError(
        f'{where} must be a text, a list of token ids, or an object with "prompt" or "tokens"'
    )

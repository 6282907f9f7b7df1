"""Notes about prompts: tokens that the model does not see, and text that it reads as another."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence

from gpt2cli.console import counted
from gpt2cli.inference import rows
from gpt2cli.inference.text import Prompt, encode_prompt, prefix_text
from gpt2cli.options import GenerateOptions
from gpt2cli.text.encoder import Encoder

NAMED = 5  # characters or tokens that a note names; the others are counted


def about(
    prompts: Iterable[tuple[Prompt, list[int] | None]],
    vocabulary: Encoder | None,
    n_ctx: int,
    options: GenerateOptions,
    typed: bool = False,
) -> dict[str, str]:
    """Return notes about prompts for standard error, at most one of each kind.

    Args:
        prompts: each prompt and its ids, or None to encode it here.
        vocabulary: the encoder; without it, only prompts that are too long are found.
        n_ctx: the model's window.
        options: how the prompts are continued; special and window count.
        typed: whether a person typed the prompt: then a space at its end is mentioned too.

    Returns:
        kind -> note. The kinds are cut (a prompt is longer than the window), unknown (the
        vocabulary lacks a character), special (the text of an added token is read as plain text)
        and space (a prompt ends in one).
    """
    found, special = _Found(), options.special == "token"
    seen = rows.most_seen(n_ctx, options.window)
    added = sorted(vocabulary.added, key=len, reverse=True) if vocabulary else []
    pattern = re.compile("|".join(map(re.escape, added)) or "(?!)")
    for prompt, ids in prompts:
        found.count += 1
        if vocabulary is not None and (prompt is None or isinstance(prompt, str)):
            ids = encode_prompt(vocabulary, prompt or "", special) if ids is None else ids
            text = (prompt or "").removeprefix(prefix_text(vocabulary))
            if special:
                text = pattern.sub("", text)
            found.added |= dict.fromkeys(pattern.findall(text))
            found.add_text(text, ids, vocabulary)
        elif ids is None and isinstance(prompt, list):
            ids = prompt
        found.add_length(len(ids or ()), seen)
    return found.lines(vocabulary, seen, typed)


class _Found:
    """The findings in prompts, and the notes about them."""

    def __init__(self) -> None:
        self.count = 0  # prompts
        self.cut: list[tuple[int, int]] = []  # number of a prompt, and of its tokens
        self.unknown: list[int] = []  # numbers of prompts
        self.missing: collections.Counter[str] = collections.Counter()
        self.added: dict[str, None] = {}  # texts of tokens, in the order of their first places
        self.ends_in_space = False

    def add_text(self, text: str, ids: Sequence[int], vocabulary: Encoder) -> None:
        """Look at a prompt's text, without what is read as tokens."""
        if vocabulary.unknown is not None and vocabulary.unknown in ids:
            self.unknown.append(self.count)
            self.missing.update(vocabulary.missing(text))
        self.ends_in_space |= text.endswith(" ")

    def add_length(self, length: int, seen: int) -> None:
        """Look at a prompt's number of tokens."""
        if length > seen:
            self.cut.append((self.count, length))

    def lines(self, vocabulary: Encoder | None, seen: int, typed: bool) -> dict[str, str]:
        """Return the notes; see `about`."""
        found: dict[str, str] = {}
        if self.cut:
            found["cut"] = self._cut(seen)
        if vocabulary and self.unknown:
            found["unknown"] = self._unknown(vocabulary)
        # a newline may end a sample, but as plain text it is the same token
        texts = [
            t for t in self.added if vocabulary and vocabulary.encode(t) != [vocabulary.added[t]]
        ]
        if texts:
            are, tokens = ("is", "it as a token") if len(texts) == 1 else ("are", "them as tokens")
            found["special"] = (
                f"{_named(texts)} in a prompt {are} read as plain text; add --special token to "
                f"read {tokens}"
            )
        if vocabulary and typed and self.ends_in_space and _joins_spaces(vocabulary):
            found["space"] = (
                "the prompt ends in a space. In this vocabulary a word begins with its space, so "
                "remove it for a better continuation"
            )
        return found

    def _cut(self, seen: int) -> str:
        number, length = self.cut[0]
        if len(self.cut) == 1:
            return f"prompt {number} has {length} tokens; the model sees only the last {seen}"
        return (
            f"{len(self.cut):,} of {counted(self.count, 'prompt')} are longer than the model's "
            f"window, such as prompt {number} ({length} tokens); the model sees only the last "
            f"{seen}"
        )

    def _unknown(self, vocabulary: Encoder) -> str:
        assert vocabulary.unknown is not None
        token = vocabulary.bytes_of([vocabulary.unknown]).decode("utf-8", "replace")
        where = f"prompt {self.unknown[0]} has"
        if len(self.unknown) > 1:
            where = f"{len(self.unknown):,} of {counted(self.count, 'prompt')} have"
        chars = [repr(char) for char, _ in self.missing.most_common()]
        lacking = f"characters that the vocabulary lacks ({_named(chars)})"
        lacking = lacking if chars else "words that the vocabulary cannot spell"
        return f"{where} {lacking}; the model reads {token} in their place"


def _joins_spaces(vocabulary: Encoder) -> bool:
    """Return whether a word begins with its space: in GPT-2's vocabulary, not in WordPiece."""
    first = vocabulary.bytes_of(vocabulary.encode(" the")[:1]).decode("utf-8", "replace")
    return len(first) > 1 and first[0] in " ▁"  # U+2581 is Metaspace's space


def _named(texts: list[str]) -> str:
    """Return the first texts, separated by commas, and the number of the others."""
    more = [f"{len(texts) - NAMED:,} more"] if len(texts) > NAMED else []
    return ", ".join([*(text[:40] for text in texts[:NAMED]), *more])

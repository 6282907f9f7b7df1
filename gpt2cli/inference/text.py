"""The text of a row while it grows: ids become text, and stop texts end it; and its final form."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gpt2cli.options import GenerateOptions
from gpt2cli.text.encoder import Encoder

BANNER = "=" * 40  # openai/gpt-2 src/generate_unconditional_samples.py

Prompt = str | list[int] | None  # a text, token ids, or None for text from nothing


@dataclass(frozen=True)
class Sample:
    """A generated text.

    Args:
        index: its number among all samples of the call.
        prompt: the prompt that it continues.
        text: the generated text, after the prompt with include_prefix; None without a vocabulary.
        tokens: the generated ids, without the token that ended it; up to the token that completed a
            stop text.
        finish_reason: length, stop (a stop text) or end (one of the model's end tokens).
        seed: the same seed and index give the same text again.
        logprobs: with the option of that name, the log-probability of each of `tokens`, in nats,
            before temperature, penalty and bans.
        score: of a beam: the sum of its log-probabilities, after penalty and bans, divided by its
            number of tokens (with the end token) ** length_penalty.
        prompt_cut: number of tokens at the prompt's start that the model did not see, because the
            prompt is longer than the model's window; 0 if it saw the whole prompt.
    """

    index: int
    prompt: Prompt
    text: str | None
    tokens: list[int]
    finish_reason: str
    seed: int
    logprobs: list[float] | None = None
    score: float | None = None
    prompt_cut: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, without optional fields that have no value."""
        fields = asdict(self)
        optional = {"logprobs": None, "score": None, "prompt_cut": 0}
        return {n: v for n, v in fields.items() if n not in optional or v != optional[n]}

    def show(self, format: str, delimiter: str | None = None) -> str:
        """Return the sample as it is printed.

        Args:
            format: "text" for OpenAI's banner and the text, or "jsonl" for a line of JSON.
            delimiter: with it, "text" is the text and a line with the delimiter, without a banner.
        """
        if format == "jsonl":
            return json.dumps(self.as_json(), ensure_ascii=False)
        text = " ".join(map(str, self.tokens)) if self.text is None else self.text
        if delimiter is not None:
            return f"{text}\n{delimiter}"
        return f"{BANNER} SAMPLE {self.index + 1} {BANNER}\n{text}"


def prefix_text(vocabulary: Encoder) -> str:
    """Return the text of the tokens that come before every prompt, such as [CLS], or nothing."""
    return vocabulary.bytes_of(vocabulary.prefix).decode("utf-8", "replace")


def encode_prompt(vocabulary: Encoder, text: str, special: bool = False) -> list[int]:
    """Return the ids of a prompt's text, after those that come before every prompt.

    A text that begins with these, as UER-py's prompts do with [CLS], does not get them twice.

    Args:
        vocabulary: the encoder.
        text: the prompt.
        special: read texts of `vocabulary.added` in it, such as <|endoftext|>, as these tokens.
    """
    text = text.removeprefix(prefix_text(vocabulary))
    return [*vocabulary.prefix, *vocabulary.encode(text, special)]


class RowText:
    """The text of a Row: decodes its ids, and finds where a stop text ends it.

    Args:
        prompt: the prompt that it continues.
        vocabulary: the encoder; without it no text appears, and no stop text is found.
        options: min_length, stop, keep_stop, truncate.

    Attributes:
        so_far: the generated text so far, up to a stop text.
        stopped: whether a stop text ended it.
    """

    def __init__(
        self, prompt: Prompt, vocabulary: Encoder | None, options: GenerateOptions
    ) -> None:
        self.prompt = prompt
        self.options = options
        self.so_far = ""
        self.stopped = False
        self._count = 0  # ids
        self._given = 0  # characters that `fresh` has returned
        self._stream = vocabulary.stream() if vocabulary else None

    def feed(self, tokens: Sequence[int]) -> int:
        """Add generated ids; return the number of them up to the end of a stop text, or of all."""
        for number, token in enumerate(tokens):
            if self.stopped:
                return number
            self._count += 1
            if self._stream:
                self._add(self._stream.feed([token]))
        return len(tokens)

    def branch(self, token: int) -> RowText:
        """Return a copy with one more id."""
        twin = copy.copy(self)
        twin._stream = copy.copy(self._stream)
        twin.feed([token])
        return twin

    def finish(self) -> None:
        """Add the rest of an incomplete character: no more ids will come."""
        if self._stream and not self.stopped:
            self._add(self._stream.finish())
        self._stream = None

    def fresh(self, finished: bool) -> str:
        """Return the text that was not returned before.

        Text that may be the start of a stop text is held back, unless the row has finished.
        """
        ends = () if finished or self.stopped else self._ends(always=True)
        held = max((_overlap(self.so_far, end) for end in ends), default=0)
        piece = self.so_far[self._given : len(self.so_far) - held]
        self._given += len(piece)
        return piece

    def _ends(self, always: bool = False) -> tuple[str, ...]:
        """Return the texts that end it now; --stop waits for --min_length, --truncate does not."""
        stop = self.options.stop if always or self._count >= self.options.min_length else ()
        return (*stop, self.options.truncate) if self.options.truncate else stop

    def _add(self, piece: str) -> None:
        before, self.so_far = len(self.so_far), self.so_far + piece
        found = []
        for end in self._ends():
            # it may have begun in earlier text, but ends in this piece
            at = self.so_far.find(end, max(0, before - len(end) + 1))
            if at >= 0:
                is_kept = self.options.keep_stop and end != self.options.truncate
                found.append((at, at + len(end) if is_kept else at))
        if found:
            self.so_far = self.so_far[: min(found)[1]]
            self.stopped = True


def _overlap(text: str, end: str) -> int:
    """Return the length of the longest end of `text` that may be the start of `end`."""
    lengths = range(1, min(len(end), len(text) + 1))
    return max((n for n in lengths if text.endswith(end[:n])), default=0)

"""A text while it is generated: ids become text, stop texts are found; and its final form."""

import copy
import json
from dataclasses import asdict, dataclass

BANNER = "=" * 40  # openai/gpt-2 src/generate_unconditional_samples.py


@dataclass(frozen=True)
class Sample:
    """One generated text.

    Args:
        index: its number among all samples of the call.
        prompt: what it goes on from: a text, a list of ids, or None.
        text: what was generated (after the prompt, with include_prefix); None without a vocabulary.
        tokens: the generated ids, without the end token; with a stop text, up to the token that
            completed it.
        finish_reason: length, stop (a stop text) or end (the end token).
        seed: with the same seed and index the same text comes again.
        logprobs: with the setting of that name, the log-probability (nats) of each of `tokens`,
            before temperature, penalty and bans.
        score: of a beam: the sum of its log-probabilities, after penalty and bans, / its number of
            tokens (with the end token) ** length_penalty.
    """

    index: int
    prompt: str | list[int] | None
    text: str | None
    tokens: list[int]
    finish_reason: str
    seed: int
    logprobs: list[float] | None = None
    score: float | None = None

    def as_json(self):
        """A JSON object: the fields, without those of settings that are off."""
        values = asdict(self)
        off = [name for name in ("logprobs", "score") if values[name] is None]
        return {name: value for name, value in values.items() if name not in off}

    def show(self, format, delimiter=None):
        """The sample as it is printed: "text", OpenAI's banner and the text, or "jsonl".

        With a delimiter, the text and then the delimiter, on a line of its own, and no banner.
        """
        if format == "jsonl":
            return json.dumps(self.as_json(), ensure_ascii=False)
        text = " ".join(map(str, self.tokens)) if self.text is None else self.text
        if delimiter is not None:
            return f"{text}\n{delimiter}"
        return f"{BANNER} SAMPLE {self.index + 1} {BANNER}\n{text}"


class Continuation:
    """The text of one row while it is generated: decodes, and finds where it stops.

    Args:
        index: its number among all samples of the call.
        prompt: what it goes on from, as in `Sample`.
        vocabulary: the encoder, or None.
        settings: GenerateOptions.
        row: the generation.Row that it is the text of, or None for beams.

    Attributes:
        text: what was generated, up to a stop text.
        tokens: the ids, without the end token; with a stop text up to that which completed it.
        stopped: a stop text has come.
    """

    def __init__(self, index, prompt, vocabulary, settings, row=None):
        self.index, self.prompt, self.settings, self.row = index, prompt, settings, row
        self.tokens, self.logprobs = [], []
        self.text = ""
        self.stopped = False
        self._given = 0
        self._stream = vocabulary.stream() if vocabulary else None

    def _ends(self, always=False):
        """The texts that end it now; --stop waits for --min_length, --truncate does not."""
        enough = always or len(self.tokens) >= self.settings.min_length
        truncate = (self.settings.truncate,) if self.settings.truncate else ()
        return (*(self.settings.stop if enough else ()), *truncate)

    def feed(self, tokens):
        """Add generated ids; sets `stopped` where a stop text is complete."""
        for token in tokens:
            if self.stopped:
                return
            self.tokens.append(token)
            if self._stream:
                self._add(self._stream.feed([token]))

    def grow(self, tokens):
        """Add what the row has got; a stop text ends the row."""
        self.feed(tokens)
        self.logprobs = self.row.logprobs[: len(self.tokens)]
        self.row.finished |= self.stopped
        if self.row.finished:
            self.finish()

    def branch(self, token, logprob):
        """Another Continuation: this one with a token more, and that token's log-probability."""
        twin = copy.copy(self)
        twin.tokens, twin.logprobs = self.tokens.copy(), [*self.logprobs, logprob]
        twin._stream = copy.copy(self._stream)
        twin.feed([token])
        return twin

    def finish(self):
        """No more ids will come: give out what a half character held back."""
        if self._stream and not self.stopped:
            self._add(self._stream.finish())
        self._stream = None

    def _add(self, piece):
        before, self.text = len(self.text), self.text + piece
        found = []
        for end in self._ends():
            # It may have begun in the text before, but ends in this piece.
            at = self.text.find(end, max(0, before - len(end) + 1))
            keep = self.settings.keep_stop and end != self.settings.truncate
            if at >= 0:
                found.append((at, at + len(end) * keep))
        if found:
            self.text = self.text[: min(found)[1]]
            self.stopped = True

    def fresh(self, finished):
        """Text that was not given out before; what may be the start of a stop text waits."""
        ends = () if finished or self.stopped else self._ends(always=True)
        held = max(
            (
                n
                for end in ends
                for n in range(1, min(len(end), len(self.text) + 1))
                if self.text.endswith(end[:n])
            ),
            default=0,
        )
        piece = self.text[self._given : len(self.text) - held]
        self._given += len(piece)
        return piece

"""Beam search: find the likeliest continuations of one prompt, as transformers does.

Every step ranks all ways to continue the running beams by one token, and takes the likeliest two
per beam, or more if several tokens can end a row, so that enough of them continue. Of those that
end, the ones among the first `beams` are kept; of the others, the first `beams` continue. The score
of a kept beam is log-probability / tokens ** length_penalty, where the end token counts as one.
"""

from __future__ import annotations

from typing import NamedTuple

from gpt2cli.inference.rows import Generation, Row
from gpt2cli.options import GenerateOptions


class Beam(NamedTuple):
    """A row that is running, or kept.

    Args:
        score: the sum of its log-probabilities, in nats; of a kept beam, the score that ranks it.
        row: the prompt and its tokens.
    """

    score: float
    row: Row


class Search:
    """The search for one prompt. Call `step` until `finished`; then `kept` is the result.

    Args:
        generation: a Generation of one row, the prompt; it is used up.
        options: beams, length_penalty.

    Attributes:
        kept: up to `beams` beams that have ended, best first.
    """

    def __init__(self, generation: Generation, options: GenerateOptions) -> None:
        (row,) = generation.live()
        self.generation = generation
        self.beams = options.beams
        self.penalty = options.length_penalty
        self.running, self.kept = [Beam(0.0, row)], list[Beam]()
        self.count = 0  # tokens of each running beam
        self.finished = False
        self._length, self._ends = row.length, row.rules.ends

    def step(self) -> None:
        """Make each beam one token longer."""
        scores = [beam.score for beam in self.running]
        ranked = self.generation.candidates(scores, max(2, 1 + len(self._ends)) * self.beams)
        self.count += 1
        full = self.count == self._length
        running: list[Beam] = []
        parents: list[int] = []
        ended: list[Beam] = []
        for place, (score, parent, token, logprob) in enumerate(ranked):
            if place >= self.beams and (full or len(running) == self.beams):
                break
            at_end = token in self._ends
            row = self.running[parent].row
            row = row if at_end else row.branch(token, logprob)
            if full or at_end or row.text.stopped:
                if place < self.beams:
                    ended.append(Beam(score / self.count**self.penalty, row))
            elif len(running) < self.beams:
                running.append(Beam(score, row))
                parents.append(parent)
        both = sorted(self.kept + ended, key=lambda beam: -beam.score)
        self.kept = both[: self.beams]
        self.finished = full or not running or self._cannot_improve(running[0].score)
        if not self.finished:
            self._continue(running, parents)

    def _cannot_improve(self, best: float) -> bool:
        """Return whether the best running beam, ended here, would not beat the worst kept one.

        This is transformers' rule for early_stopping=False. With a penalty above 0 a longer beam
        might still be better.
        """
        kept_all = len(self.kept) == self.beams
        return kept_all and best / self.count**self.penalty <= self.kept[-1].score

    def _continue(self, running: list[Beam], parents: list[int]) -> None:
        """Continue with these beams, and with impossible ones so that their number stays."""
        spare = self.beams - len(running)
        self.running = running + [Beam(float("-inf"), running[0].row)] * spare
        self.generation.take([b.row for b in self.running], parents + parents[:1] * spare)

"""Beam search: the likeliest continuations of one prompt, as transformers finds them.

Every step ranks all continuations of the running beams by one token, and takes the likeliest two a
beam. Those of them that end, and are among the first `beams`, are kept; of those that do not, the
first `beams` run on. The score of what is kept is log-probability / tokens ** length_penalty, where
the end token counts as one.
"""

from typing import Any, NamedTuple


class Beam(NamedTuple):
    """A row on its way, or kept.

    score: the sum of its log-probabilities, in nats; of a kept one, the score by which it ranks.
    row: what `Search` was given, with its tokens.
    """

    score: float
    row: Any


class Search:
    """The search for one prompt. Call `step` until `finished`; then `kept` is the result.

    Args:
        generation: a generation.Generation of one row, the prompt; it is used up.
        row: an inference.Continuation, empty: what follows the prompt. Its `branch` gives another
            with one token more, and its `stopped` says that a stop text has come.
        settings: GenerateOptions: beams, length_penalty, and what Generation takes.

    Attributes:
        kept: Beams that have ended, best first, up to `beams`.
    """

    def __init__(self, generation, row, settings):
        self.generation, self.beams = generation, settings.beams
        self._length, self._end = generation.rows[0].length, generation.rows[0].rules.end
        self.penalty = settings.length_penalty
        self.running, self.kept = [Beam(0.0, row)], []
        self.count = 0  # tokens of each running beam
        self.finished = False

    def step(self):
        """One token more."""
        scores = [beam.score for beam in self.running]
        ranked = self.generation.candidates(scores, 2 * self.beams)
        self.count += 1
        full = self.count == self._length
        running, parents, ended = [], [], []
        for place, (score, parent, token, logprob) in enumerate(ranked):
            if place >= self.beams and (full or len(running) == self.beams):
                break
            at_end = token == self._end
            row = self.running[parent].row
            row = row if at_end else row.branch(token, logprob)
            if full or at_end or row.stopped:
                if place < self.beams:
                    ended.append(Beam(score / self.count**self.penalty, row))
            elif len(running) < self.beams:
                running.append(Beam(score, row))
                parents.append(parent)
        both = sorted(self.kept + ended, key=lambda beam: -beam.score)
        self.kept = both[: self.beams]
        self.finished = full or not running or self._cannot_improve(running[0].score)
        if not self.finished:
            self._go_on(running, parents)

    def _cannot_improve(self, best):
        """Whether the best running beam, ended here, would be no better than the worst kept one.

        transformers' rule for early_stopping=False; a longer one might be, with a penalty above 0.
        """
        kept_all = len(self.kept) == self.beams
        return kept_all and best / self.count**self.penalty <= self.kept[-1].score

    def _go_on(self, running, parents):
        # The step is made for so many rows; what fills them up has no continuation.
        spare = self.beams - len(running)
        self.running = running + [Beam(float("-inf"), running[0].row)] * spare
        parents = parents + parents[:1] * spare
        self.generation.take(parents, [beam.row.tokens[-1] for beam in self.running])

"""Rows of token ids that grow side by side; a row may join or leave between two steps.

Past n_ctx tokens a row's window slides: when it is full, its older half is dropped and the newer
half is read again. With `--window last` its last n_ctx - 1 tokens are read again for every token.
A row's tokens depend on that row alone, not on those beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gpt2cli.inference import sampling
from gpt2cli.inference.engines.engine import Cache, Engine
from gpt2cli.inference.lookup import Lookup
from gpt2cli.inference.sampling import Candidate, Chosen, Rules
from gpt2cli.inference.text import RowText
from gpt2cli.options import GenerateOptions

# Log-probabilities of M new tokens: their own [M], the likeliest tokens in their places [M, K], and
# those tokens' [M, K].
Logprobs = tuple[np.ndarray, np.ndarray, np.ndarray]


class Row:
    """A prompt and the tokens that continue it.

    Args:
        prompt: its token ids, at least one.
        rules: how the row chooses its next token.
        length: number of tokens to generate.
        seed: the same seed and index draw the same random numbers.
        index: its number among the rows of the same seed.
        window: "half" or "last", the part that the model sees after n_ctx tokens.
        logprobs: whether to keep log-probabilities.
        text: its text, which grows with it: a stop text ends the row. By default ids alone.
        lookup: proposes its next tokens, for an engine that can check several at once.

    Attributes:
        tokens: ids, prompt included, without the end token.
        finished: set it to end the row now.
        sees: `--window` of this row, half or last.
        logprobs: of each generated token, if kept, before all rules; nats.
        likeliest: {id: log-probability} of the likeliest tokens in each token's place, if kept.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        rules: Rules,
        length: int,
        seed: int = 0,
        index: int = 0,
        window: str = "half",
        logprobs: bool = False,
        text: RowText | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.rules = rules
        self.length = length
        self.index = index
        self.text = text or RowText(None, None, GenerateOptions())
        self.lookup = lookup
        self.finished = False
        self.wants_logprobs = logprobs
        self.logprobs: list[float] = []
        self.likeliest: list[dict[int, float]] = []
        self._noise = np.random.Generator(np.random.Philox(key=[seed, index]))
        self._begin = 0  # of the part that the model sees
        self.sees = window
        self._is_read = False

    @property
    def generated(self) -> int:
        """The number of tokens after the prompt."""
        return len(self.tokens) - self.prompt_length

    @property
    def continuation(self) -> list[int]:
        """The ids after the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def seen(self) -> int:
        """The number of tokens in the window."""
        return len(self.tokens) - self._begin

    def must_be_read(self, n_ctx: int) -> bool:
        """Return whether its next token takes a pass over the window."""
        return not self._is_read or self.seen > most_seen(n_ctx, self.sees)

    def window(self, n_ctx: int) -> np.ndarray:
        """Return the ids that the model must read now, int32 [T]; a full window slides."""
        full = most_seen(n_ctx, self.sees)
        if self.seen > full:
            whole = not self._is_read or self.sees == "last"
            self._begin = len(self.tokens) - (full if whole else max(1, n_ctx // 2))
        self._is_read = True
        return np.array(self.tokens[self._begin :], np.int32)

    def uniform(self, count: int) -> np.ndarray:
        """Return the next `count` random numbers in [0, 1), float32 [count]."""
        return self._noise.random(count, np.float32)

    def grow(self, tokens: np.ndarray, logprobs: Logprobs | None = None) -> None:
        """Add new tokens [M], up to an end token, a stop text or the row's length."""
        added = tokens[: self.length - self.generated].tolist()
        at_end = next((n for n, token in enumerate(added) if token in self.rules.ends), None)
        if at_end is not None:
            added = added[:at_end]
            self.finished = True
        added = added[: self.text.feed(added)]
        self.tokens += added
        if logprobs is not None and self.wants_logprobs:
            own, others, beside = (array[: len(added)].tolist() for array in logprobs)
            self.logprobs += own
            pairs = zip(others, beside, strict=True)
            self.likeliest += [dict(zip(*pair, strict=True)) for pair in pairs]
        self.finished |= self.text.stopped or self.generated >= self.length
        if self.finished:
            self.text.finish()

    def branch(self, token: int, logprob: float) -> Row:
        """Return a copy with one more token, and that token's log-probability."""
        twin = copy.copy(self)
        twin.tokens = [*self.tokens, token]
        twin.logprobs = [*self.logprobs, logprob]
        twin.text = self.text.branch(token)
        return twin


def most_seen(n_ctx: int, window: str) -> int:
    """Return the number of tokens that the model sees at once, with `--window` half or last."""
    return n_ctx - 1 if window == "last" and n_ctx > 1 else n_ctx


class Generation:
    """Rows that grow side by side: `add` some, and call `step` until `is_empty`.

    For beams: `candidates`, then `take` the rows that continue.

    Args:
        engine: it reads and continues the rows.
        rows: the first rows.
        width: least number of rows to compute, for an engine that compiles for each number.

    Attributes:
        rows: the Row at each place of the cache; None where the place is empty.
    """

    def __init__(self, engine: Engine, rows: Iterable[Row] = (), width: int = 0) -> None:
        self.engine, self._n_ctx = engine, engine.config.n_ctx
        self.rows: list[Row | None] = [None] * (width if engine.needs_full_batches else 0)
        self._cache: Cache | None = None
        self._held: list[Row | None] = []  # the rows in the cache
        self.add(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Let rows join."""
        self._forget_finished()
        for row in rows:
            if None in self.rows:
                self.rows[self.rows.index(None)] = row
            else:
                self.rows.append(row)

    def live(self) -> list[Row]:
        """Return the rows that have not finished."""
        return [row for row in self.rows if row is not None and not row.finished]

    def is_empty(self) -> bool:
        """Return whether all rows have finished."""
        return not self.live()

    def step(self, limit: int = sampling.CHUNK) -> list[Row]:
        """Generate, and return the rows that grew.

        If rows must be read, these get one token; otherwise all get up to `limit`.
        """
        self._forget_finished()
        live = self.live()
        if 2 * len(live) <= len(self.rows) and not self.engine.needs_full_batches:
            self.rows = list(live)  # seldom, because rows have to move in the cache
        unread = [row for row in live if row.must_be_read(self._n_ctx)]
        if unread:
            for one, found in zip(unread, self._choose_first(unread), strict=True):
                one.grow(*found)
            return unread
        if live:
            chosen = self._decode(live, min(limit, sampling.CHUNK))
            of_rows = zip(self.rows, *chosen[:4], strict=True)  # all fields but the cache
            for row, tokens, own, others, beside in of_rows:
                if row is not None:
                    row.grow(tokens, (own, others, beside))
        return live

    def candidates(self, scores: Sequence[float], count: int) -> list[Candidate]:
        """Return the `count` likeliest ways to continue any row by a token; see `sampling.rank`.

        Args:
            scores: the log-probability of each row so far.
            count: number of candidates.
        """
        rows = [row for row in self.rows if row is not None]  # equally long
        if any(row.must_be_read(self._n_ctx) for row in rows):
            logits = self._read(rows)
        else:
            tokens = np.array([row.tokens[-1] for row in rows], np.int32)
            position = np.array([row.seen - 1 for row in rows], np.int32)
            logits, self._cache = self.engine.feed(self._cache, tokens, position)
            logits = np.asarray(logits)
        return sampling.rank(
            logits,
            scores,
            rows=[row.tokens for row in rows],
            generated=[row.generated for row in rows],
            rules=[row.rules for row in rows],
            count=count,
        )

    def take(self, rows: Sequence[Row], parents: Sequence[int]) -> None:
        """Continue with other rows.

        Args:
            rows: each is a present row and one more token.
            parents: the number of that present row.
        """
        self.rows = list(rows)
        if list(parents) != list(range(len(self._held))):
            self._cache = self.engine.arrange(self._cache, None, parents)
        self._held = list(self.rows)

    def _forget_finished(self) -> None:
        self.rows = [None if row is None or row.finished else row for row in self.rows]

    def _read(self, rows: Sequence[Row]) -> np.ndarray:
        """Read the windows of rows and put them into the cache; return logits [N, V]."""
        windows = [row.window(self._n_ctx) for row in rows]
        slots = max(row.seen + row.length - row.generated for row in rows)
        if len(rows) == sum(row is not None for row in self.rows):
            self._cache, self._held = None, []  # frees its memory for the new one
        logits, new = self.engine.read(windows, min(self._n_ctx, slots))
        self._arrange(new, rows)
        return np.asarray(logits)

    def _arrange(self, new: Cache | None = None, rows: Sequence[Row] = ()) -> None:
        """Give the cache the order of self.rows; some of them are in a new cache."""
        number = {row: n for n, row in enumerate([*self._held, *rows]) if row is not None}
        sources = [-1 if row is None else number.get(row, -1) for row in self.rows]
        self._cache = self.engine.arrange(self._cache, new, sources)
        self._held = list(self.rows)

    def _choose_first(self, rows: Sequence[Row]) -> Iterator[tuple[np.ndarray, Logprobs | None]]:
        """Yield one token for each row, after reading its window, as `Row.grow` takes it."""
        for row, logits in zip(rows, self._read(rows), strict=True):
            uniform = row.uniform(1)[0]
            token = sampling.choose(logits, uniform, row.tokens, row.generated, row.rules)
            logprobs = None
            if row.wants_logprobs:
                own = sampling.log_softmax(logits)
                others = sampling.likeliest(own, sampling.LIKELIEST)
                logprobs = own[[token]], others[None], own[others][None]
            yield np.array([token]), logprobs

    def _decode(self, live: Sequence[Row], limit: int) -> Chosen:
        """Generate up to `limit` tokens per row, no further than the fullest window."""
        if len(self.rows) != len(self._held):
            self._arrange()
        steps = min(limit, max(row.length - row.generated for row in live))
        steps = min(steps, *(most_seen(self._n_ctx, row.sees) - row.seen + 1 for row in live))
        nothing = np.zeros(steps, np.float32)
        # empty places compute tokens that nobody reads
        chosen = self.engine.run(
            self._cache,
            rows=[row.tokens if row else [0] for row in self.rows],
            position=np.array([row.seen - 1 if row else 0 for row in self.rows], np.int32),
            finished=np.array([row is None for row in self.rows]),
            generated=np.array([row.generated if row else 0 for row in self.rows], np.int32),
            noise=np.stack([row.uniform(steps) if row else nothing for row in self.rows]),
            rules=[row.rules if row else live[0].rules for row in self.rows],
            logprobs=np.array([row is not None and row.wants_logprobs for row in self.rows]),
            lookup=live[0].lookup if len(self.rows) == 1 else None,
        )
        self._cache = chosen.cache
        return chosen

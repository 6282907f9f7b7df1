"""Texts of token ids that grow side by side; one may join, and one leave, between two steps.

Past n_ctx tokens a row's window slides: when it is full, its older half is dropped and the newer
half read again; or, with `--window last`, its last n_ctx - 1 tokens are read again for every token.
What a row becomes depends on that row alone, not on those beside it.
"""

import copy

import numpy as np

from gpt2cli.inference import sampling


class Row:
    """A text that grows.

    Args:
        prompt: its token ids, at least one.
        rules: sampling.Rules.
        length: tokens to generate.
        seed, index: with the same two it draws the same random numbers.
        window: "half" or "last", what the model sees when n_ctx tokens are full.
        logprobs: whether anybody asks for log-probabilities.

    Attributes:
        tokens: ids, prompt included, without the end token.
        finished: set it to end the row now.
        logprobs: with `logprobs` that of each generated token, before all rules, in nats.
        likeliest: as well, of each generated token's place {id: log-probability} of the likeliest.
    """

    def __init__(self, prompt, rules, length, seed=0, index=0, window="half", logprobs=False):
        self.tokens, self.prompt_length, self.length = list(prompt), len(prompt), length
        self.rules, self.finished, self.wants_logprobs = rules, False, logprobs
        self.logprobs, self.likeliest = [], []
        self._noise = np.random.Generator(np.random.Philox(key=[seed, index]))
        self._begin = 0  # of the part that the model sees
        self._sees_last = window == "last"
        self._is_read = False

    @property
    def generated(self):
        """Tokens that came after the prompt."""
        return len(self.tokens) - self.prompt_length

    @property
    def seen(self):
        """Tokens in the window."""
        return len(self.tokens) - self._begin

    def full(self, n_ctx):
        """Tokens that the window may hold."""
        return n_ctx - (self._sees_last and n_ctx > 1)

    def must_be_read(self, n_ctx):
        """Whether its next token takes a pass over the window."""
        return not self._is_read or self.seen > self.full(n_ctx)

    def window(self, n_ctx):
        """The ids that the model is to read now, int32 [T]; a window that is full moves on."""
        if self.seen > self.full(n_ctx):
            whole = not self._is_read or self._sees_last
            self._begin = len(self.tokens) - (self.full(n_ctx) if whole else max(1, n_ctx // 2))
        self._is_read = True
        return np.array(self.tokens[self._begin :], np.int32)

    def uniform(self, count):
        """[count] random numbers in [0, 1), float32; each is given out once."""
        return self._noise.random(count, np.float32)

    def grow(self, tokens, logprobs, others, other_logprobs):
        """Add what one row of a sampling.Chosen has, up to its end; returns the new tokens."""
        added = tokens[: self.length - self.generated].tolist()
        if self.rules.end in added:
            added = added[: added.index(self.rules.end)]
            self.finished = True
        self.tokens += added
        if self.wants_logprobs:
            self.logprobs += logprobs[: len(added)].tolist()
            pairs = zip(others[: len(added)].tolist(), other_logprobs.tolist(), strict=False)
            self.likeliest += [dict(zip(*pair, strict=True)) for pair in pairs]
        self.finished |= self.generated >= self.length
        return added

    def branch(self, token):
        """Another row: this one and a token more."""
        twin = copy.copy(self)
        twin.tokens = [*self.tokens, token]
        return twin


class Generation:
    """Rows that grow side by side: `add` some, call `step` while there are any.

    Or, for beams: `candidates`, then `take` those that are to go on.

    Args:
        network: what reads and continues rows: a graph.Graph or a lite.Lite.
        rows: the first Rows.
        width: of rows so many are computed at the least, where another number takes compiling.

    Attributes:
        rows: the Row at each place of the cache; None where there is none.
    """

    def __init__(self, network, rows=(), width=0):
        self.network, self._n_ctx = network, network.config.n_ctx
        self.rows = [None] * (width if network.needs_full_batches else 0)
        self._cache, self._held = None, []  # and whose rows it holds
        self.add(rows)

    def add(self, rows):
        """Let Rows join."""
        self._forget_finished()
        for row in rows:
            if None in self.rows:
                self.rows[self.rows.index(None)] = row
            else:
                self.rows.append(row)

    def live(self):
        """The Rows that are not finished."""
        return [row for row in self.rows if row is not None and not row.finished]

    def step(self, limit=sampling.CHUNK):
        """Generate: pairs of each Row that was worked on and its new tokens.

        Where some must be read those get one token, else all get up to `limit`. The end token is
        not among them; `finished` says which are done.
        """
        self._forget_finished()
        live = self.live()
        if 2 * len(live) <= len(self.rows) and not self.network.needs_full_batches:
            self.rows = live  # seldom, because what is in the cache has to move
        unread = [row for row in live if row.must_be_read(self._n_ctx)]
        if unread:
            chosen = self._choose_first(unread)
            return [(row, row.grow(*of)) for row, of in zip(unread, chosen, strict=True)]
        if not live:
            return []
        chosen = self._decode(live, min(limit, sampling.CHUNK))
        pairs = zip(self.rows, zip(*chosen[:4], strict=True), strict=True)
        return [(row, row.grow(*of)) for row, of in pairs if row is not None]

    def candidates(self, scores, count):
        """The likeliest rows of one token more: tuples of score, row, token, its log-probability.

        Args:
            scores: the log-probability of each row so far.
            count: how many.

        Returns:
            Best first; fewer where the rules leave fewer.
        """
        if any(row.must_be_read(self._n_ctx) for row in self.rows):  # they are equally long
            logits = self._read(self.rows)
        else:
            tokens = np.array([row.tokens[-1] for row in self.rows], np.int32)
            position = np.array([row.seen - 1 for row in self.rows], np.int32)
            logits, self._cache = self.network.feed(self._cache, tokens, position)
            logits = np.asarray(logits)
        parts = zip(*((row.tokens, row.generated, row.rules) for row in self.rows), strict=True)
        return sampling.rank(logits, scores, *parts, count)

    def take(self, parents, tokens):
        """Go on with new rows: each one of the present ones, by its number, and a token more."""
        self.rows = [self.rows[p].branch(token) for p, token in zip(parents, tokens, strict=True)]
        if parents != list(range(len(self._held))):
            self._cache = self.network.arrange(self._cache, None, parents)
        self._held = list(self.rows)

    def _forget_finished(self):
        self.rows = [None if row is None or row.finished else row for row in self.rows]

    def _read(self, rows):
        """Read the windows of these rows, which get their places in the cache; logits [N, V]."""
        windows = [row.window(self._n_ctx) for row in rows]
        slots = max(row.seen + row.length - row.generated for row in rows)
        if len(rows) == sum(row is not None for row in self.rows):
            self._cache, self._held = None, []  # its memory is free for the new one
        logits, new = self.network.read(windows, min(self._n_ctx, slots))
        self._arrange(new, rows)
        return np.asarray(logits)

    def _arrange(self, new=None, rows=()):
        """Give the cache the rows of self.rows, some of which are in a new one."""
        number = {row: n for n, row in enumerate([*self._held, *rows]) if row is not None}
        sources = [number.get(row, -1) for row in self.rows]
        self._cache = self.network.arrange(self._cache, new, sources)
        self._held = list(self.rows)

    def _choose_first(self, rows):
        """One token a row, after its window; of each row what `Row.grow` takes."""
        for row, logits in zip(rows, self._read(rows), strict=True):
            uniform = row.uniform(1)[0]
            token = sampling.choose(logits, uniform, row.tokens, row.generated, row.rules)
            if row.wants_logprobs:
                own = sampling.log_softmax(logits)
                others = sampling.likeliest(own, sampling.LIKELIEST)
                yield np.array([token]), own[[token]], others[None], own[others][None]
            else:
                yield np.array([token]), None, None, None

    def _decode(self, live, limit):
        """The sampling.Chosen of up to `limit` tokens, no further than the fullest window."""
        if len(self.rows) != len(self._held):
            self._arrange()
        steps = min(limit, max(row.length - row.generated for row in live))
        steps = min(steps, *(row.full(self._n_ctx) - row.seen + 1 for row in live))
        nothing = np.zeros(steps, np.float32)
        # idle places compute something that nobody reads
        chosen = self.network.run(
            self._cache,
            [row.tokens if row else [0] for row in self.rows],
            np.array([row.seen - 1 if row else 0 for row in self.rows], np.int32),
            np.array([row is None for row in self.rows]),
            np.array([row.generated if row else 0 for row in self.rows], np.int32),
            np.stack([row.uniform(steps) if row else nothing for row in self.rows]),
            [row.rules if row else live[0].rules for row in self.rows],
            np.array([row is not None and row.wants_logprobs for row in self.rows]),
        )
        self._cache = chosen.cache
        return chosen

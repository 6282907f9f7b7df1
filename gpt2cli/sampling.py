"""Logits -> next token, and a batch of rows that grow by tokens.

Past n_ctx tokens the window slides: when a row's window is full, its older half is dropped and the
newer half processed again; or, with `--window last`, its last n_ctx - 1 tokens are read again for
every token. A row's window depends on that row alone, not on its batch.
"""

from typing import NamedTuple

import numpy as np

CHUNK = 32  # tokens a call of the loop may generate; more would delay --stop
BLOCK = 256  # about sqrt(50257): the two cumulative sums of `draw` are equally long


class Rules(NamedTuple):
    """How a row chooses its next token.

    Args:
        temperature: by which logits are divided; 0 takes the likeliest.
        top_k: choose among so many likeliest; 0 is all.
        top_p: choose among the fewest likeliest that together reach it; 0 and 1 are all.
        repetition_penalty: by which tokens that the row holds are made less likely.
        min_length: tokens before `end` may come.
        no_repeat_ngram: how many tokens in a row must not come twice; 0 allows it.
        end: the token that ends a row, or -1.
        banned: tokens that are never chosen.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    min_length: int = 0
    no_repeat_ngram: int = 0
    end: int = -1
    banned: tuple = ()


def apply_rules(logits, row, generated, rules):
    """Logits or log-probabilities [V] -> [V], before any temperature and cut.

    In this order: repetition penalty (arXiv 1909.05858), banned tokens, minimal length, repeated
    n-grams.

    Args:
        row: ids so far.
        generated: how many of them came after the prompt.
    """
    logits = logits.copy()  # a few microseconds
    if rules.repetition_penalty != 1:
        seen = np.unique(row)
        old, penalty = logits[seen], np.float32(rules.repetition_penalty)
        logits[seen] = np.where(old > 0, old / penalty, old * penalty)
    logits[list(rules.banned)] = -np.inf
    if generated < rules.min_length and rules.end >= 0:
        logits[rules.end] = -np.inf
    if rules.no_repeat_ngram:
        left = logits.copy()
        left[repeats(row, rules.no_repeat_ngram)] = -np.inf
        if left.max() > -np.inf:  # a row in which no token is left stays as it is
            logits = left
    return logits


def repeats(row, size):
    """The ids that would write `size` tokens in a row that are in `row` already."""
    row = np.asarray(row)
    found = np.arange(size - 1, len(row))  # where what would come again ends
    for back in range(1, size):
        if not len(found):
            break
        found = found[row[found - back] == row[len(row) - back]]
    return row[found]


def keep_top_k(logits, k):
    """[V] -> the indices of the k likeliest, in order; with those that tie with the last."""
    k = min(k, len(logits))
    return np.flatnonzero(logits >= np.partition(logits, -k)[-k])


def keep_top_p(mass, p):
    """[V], a multiple of the probabilities -> the indices of the fewest that reach p, in order.

    The token that crosses p is kept (openai/gpt-2 drops it), so at least one is, and those that tie
    with it. Nucleus sampling, arXiv 1904.09751.
    """
    falling = np.sort(mass)[::-1]
    return np.flatnonzero(mass >= falling[_crossing(falling, p, "left")])


def draw(mass, uniform):
    """The first index of mass [V] whose cumulative share exceeds a number in [0, 1)."""
    return _crossing(mass, uniform, "right")


def _crossing(mass, share, side):
    """The index of mass [V] at which its sum reaches ("left") or exceeds ("right") a share of all.

    In two levels: one cumulative sum over [V] would take longer than all else that is done with a
    row. Never an index without mass, whatever the rounding.
    """
    sums = np.add.reduceat(mass, np.arange(0, len(mass), BLOCK))
    total = np.cumsum(sums, dtype=np.float64)
    block = _first(total, share * total[-1], side, sums)
    inside = mass[block * BLOCK : (block + 1) * BLOCK]
    before = total[block - 1] if block else 0
    left = share * total[-1] - before
    return block * BLOCK + _first(np.cumsum(inside, dtype=np.float64), left, side, inside)


def _first(cumulative, target, side, mass):
    """The first index at which the sum is enough and that has mass; if none has, the last one."""
    index, with_mass = np.searchsorted(cumulative, target, side), np.flatnonzero(mass)
    return int(with_mass[min(np.searchsorted(with_mass, index), len(with_mass) - 1)])


def choose(logits, uniform, row, generated, rules):
    """The next token of a row, from logits [V] and a random number in [0, 1).

    After apply_rules: temperature, top-k, top-p.
    """
    logits = apply_rules(logits, row, generated, rules)
    if rules.temperature <= 0:
        return int(logits.argmax())
    tokens = None
    if 0 < rules.top_k < len(logits):
        tokens = keep_top_k(logits, rules.top_k)
        logits = logits[tokens]
    # shifted first, so that a small temperature cannot overflow
    mass = logits - logits.max()
    if rules.temperature != 1:
        mass /= np.float32(max(rules.temperature, 1e-6))
    np.exp(mass, out=mass)
    if 0 < rules.top_p < 1:
        kept = keep_top_p(mass, rules.top_p)
        tokens, mass = kept if tokens is None else tokens[kept], mass[kept]
    index = draw(mass, uniform)
    return index if tokens is None else int(tokens[index])


def log_softmax(logits):
    """[..., V] -> the log-probabilities, in nats."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def rank(logits, scores, rows, generated, rules, count):
    """The likeliest `count` rows of one token more, best first.

    As in transformers, the rules apply to log-probabilities, and what they leave is not normalized.

    Args:
        logits: [N, V].
        scores: [N], the log-probability of each row so far.
        rows, generated, rules: of each row, as for `apply_rules`.

    Returns:
        Tuples of score, row, token, the token's own log-probability; none of probability 0.
    """
    found = []
    for number, row in enumerate(rows):
        own = log_softmax(logits[number])
        total = scores[number] + apply_rules(own, row, generated[number], rules[number])
        tokens = np.argpartition(total, -min(count, len(total)))[-count:]
        found += [(float(total[t]), number, int(t), float(own[t])) for t in tokens]
    best = sorted((f for f in found if f[0] > -np.inf), key=lambda f: (-f[0], f[1], f[2]))
    return best[:count]


def run(network, cache, rows, position, finished, generated, noise, rules, logprobs):
    """Generate up to M tokens a row, one after another.

    Args:
        network: what has `feed`: a lite.Lite.
        cache: what `network.read` returned, filled before `position`.
        rows: the ids of each row.
        position: [N], the slot of each row's last token, which is to be fed next.
        finished: bool [N], rows that have ended; they write nothing that counts.
        generated: [N], tokens of each row that came after the prompt.
        noise: [N, M], random numbers in [0, 1).
        rules: the Rules of each row.
        logprobs: whether anybody asks for the log-probabilities.

    Returns:
        Tokens [N, done] and their log-probabilities, before all rules and temperature, and the
        cache; done is below M if all rows have ended.
    """
    rows, finished = [list(row) for row in rows], finished.copy()
    tokens, found = np.zeros(noise.shape, np.int32), np.zeros(noise.shape, np.float32)
    for i in range(noise.shape[1]):
        fed = np.array([row[-1] for row in rows], np.int32)
        logits, cache = network.feed(cache, fed, position + i)
        for n in np.flatnonzero(~finished):
            token = choose(logits[n], noise[n, i], rows[n], generated[n] + i, rules[n])
            rows[n].append(token)
            tokens[n, i] = token
            found[n, i] = log_softmax(logits[n])[token] if logprobs else 0
            finished[n] = token == rules[n].end
        if finished.all():
            break
    return tokens[:, : i + 1], found[:, : i + 1], cache


class Generation:
    """One batch being generated. Call `step` until `finished` is all true.

    Or, for beams: `candidates`, then `take` those that are to go on.

    Args:
        network: what reads and continues rows: a graph.Graph or a lite.Lite.
        prompts: token ids of each row, at least one token each.
        settings: config.GenerateSettings.
        length: tokens to generate in a row.
        seed: with a row's index it fixes all its random numbers.
        indices: the index of each row among all samples; None for a row that only fills the batch.
        end: the token that ends a row, or None.
        banned: tokens never chosen.

    Attributes:
        rows: the ids of each row, prompt included, without the end token.
        logprobs: of each row, the log-probability of each generated token.
        finished: bool [B].
    """

    def __init__(self, network, prompts, settings, length, seed, indices, end, banned):
        self.network, self.length = network, length
        self.rows = [list(prompt) for prompt in prompts]
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self.finished = np.array([index is None for index in indices])
        self.end = -1 if end is None else end
        n_vocab, size = network.config.n_vocab, len(prompts)
        self.rules = [
            Rules(
                **{name: getattr(settings, name) for name in Rules._fields[:6]},
                end=-1 if end is None else end,
                banned=tuple(token for token in banned if token < n_vocab),
            )
        ] * size
        self.wants_logprobs = settings.logprobs
        self.noise = [np.random.Generator(np.random.Philox(key=[seed, i or 0])) for i in indices]
        self.logprobs = [[] for _ in prompts]
        self.window = [0] * size  # where the part of each row that the model sees begins
        self.sees_last = settings.window == "last"
        self.full = network.config.n_ctx - (self.sees_last and network.config.n_ctx > 1)
        self.cache = None

    def step(self, limit=CHUNK):
        """Generate up to `limit` tokens a row; returns the new ones of each row, [] if finished.

        The end token is not among them; `finished` says which rows are done.
        """
        if self._must_read():
            new, logprobs = self._choose_first()
        else:
            new, logprobs = self._decode(min(limit, CHUNK))
        fresh = []
        for row, tokens in enumerate(self.rows):
            if self.finished[row]:
                fresh.append([])
                continue
            added = new[row, : self.length - self._generated()[row]].tolist()
            if self.end in added:
                added = added[: added.index(self.end)]
                self.finished[row] = True
            tokens += added
            self.logprobs[row] += logprobs[row, : len(added)].tolist()
            self.finished[row] |= self._generated()[row] >= self.length
            fresh.append(added)
        return fresh

    def candidates(self, scores, count):
        """The likeliest rows of one token more: tuples of score, row, token, its log-probability.

        Args:
            scores: the log-probability of each row so far.
            count: how many.

        Returns:
            Best first; fewer where the rules leave fewer.
        """
        if self._must_read():
            logits = self._read_windows()
        else:
            token = np.array([tokens[-1] for tokens in self.rows], np.int32)
            logits, self.cache = self.network.feed(self.cache, token, self._seen_lengths() - 1)
        return rank(np.asarray(logits), scores, self.rows, self._generated(), self.rules, count)

    def take(self, parents, tokens):
        """Go on with new rows: each one of the present ones, by its number, and a token more."""
        self.rows = [[*self.rows[p], token] for p, token in zip(parents, tokens, strict=True)]
        parents = np.array(parents, np.int32)
        if not np.array_equal(parents, np.arange(len(self.finished))):
            self.window = [self.window[p] for p in parents]
            self.prompt_lengths = self.prompt_lengths[parents]
            self.rules = [self.rules[p] for p in parents]
            self.finished = self.finished[parents]
            self.cache = self.network.regroup(self.cache, parents)

    def finish(self, row):
        """End a row now, because of what its text says."""
        self.finished[row] = True

    def _generated(self):
        return np.array([len(tokens) for tokens in self.rows], np.int32) - self.prompt_lengths

    def _seen_lengths(self):
        """Tokens in each row's window; finished rows count as one, they need no room."""
        lengths = np.array([len(tokens) for tokens in self.rows]) - self.window
        return np.where(self.finished, 1, lengths).astype(np.int32)

    def _uniform(self, count):
        """[B, count] of each row's own random numbers."""
        return np.stack([noise.random(count, np.float32) for noise in self.noise])

    def _must_read(self):
        """Whether the next token takes a pass over the windows."""
        return self.cache is None or self._seen_lengths().max() > self.full

    def _read_windows(self):
        """Move the windows that are too long, read them all; logits [B, V] after them."""
        n_ctx = self.network.config.n_ctx
        for row, tokens in enumerate(self.rows):
            if len(tokens) - self.window[row] > self.full:
                all_of_it = self.cache is None or self.sees_last
                self.window[row] = len(tokens) - (self.full if all_of_it else max(1, n_ctx // 2))
        lengths = self._seen_lengths()
        slots = int(lengths.max() + self.length - self._generated().min())
        windows = [
            np.array(tokens[start : start + length], np.int32)
            for tokens, start, length in zip(self.rows, self.window, lengths, strict=True)
        ]
        self.cache = None  # its memory is free for the new one
        logits, self.cache = self.network.read(windows, min(n_ctx, slots))
        return logits

    def _choose_first(self):
        """One token a row, after its window."""
        logits, uniform = np.asarray(self._read_windows()), self._uniform(1)[:, 0]
        generated = self._generated()
        tokens = [
            choose(logits[n], uniform[n], row, generated[n], self.rules[n])
            for n, row in enumerate(self.rows)
        ]
        logprobs = log_softmax(logits) if self.wants_logprobs else np.zeros_like(logits)
        rows = np.arange(len(tokens))
        return np.array(tokens, np.int32)[:, None], logprobs[rows, tokens][:, None]

    def _decode(self, limit):
        """Generate up to `limit` tokens, no further than the fullest window."""
        lengths, generated = self._seen_lengths(), self._generated()
        most = int((self.length - generated[~self.finished]).max())
        steps = min(limit, most, self.full - int(lengths.max()) + 1)
        tokens, logprobs, self.cache = self.network.run(
            self.cache,
            self.rows,
            lengths - 1,
            self.finished,
            generated,
            self._uniform(steps),
            self.rules,
            self.wants_logprobs,
        )
        return tokens, logprobs

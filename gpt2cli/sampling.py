"""Logits -> next token, and a batch of rows that grow by tokens.

Past n_ctx tokens the window slides: when a row's window is full, its older half is dropped and the
newer half processed again; or, with `--window last`, its last n_ctx - 1 tokens are read again for
every token. A row's window depends on that row alone, not on its batch.
"""

from typing import NamedTuple

import numpy as np

from gpt2cli.engine import tf

CHUNK = 32  # tokens a call of the compiled loop may generate; more would delay --stop
SMALLEST_HISTORY = 64  # tokens; histories double from here, one compilation each
BLOCK = 256  # about sqrt(50257): the two cumulative sums of `draw` are equally long


class Rules(NamedTuple):
    """How each row chooses its next token; every field is a tensor or an array.

    temperature, top_p, repetition_penalty: float32 [B]; top_k, min_length: int32 [B].
    no_repeat_ngram: int32 [], how many tokens in a row must not come twice; 0 allows it.
    end: int32 [], the token that ends a row, or -1.
    logprobs: bool [], whether anybody asks for the log-probabilities of what is chosen.
    bias: float32 [V], added to the logits; -inf where a token must never be chosen.
    """

    temperature: tf.Tensor
    top_k: tf.Tensor
    top_p: tf.Tensor
    repetition_penalty: tf.Tensor
    min_length: tf.Tensor
    no_repeat_ngram: tf.Tensor
    end: tf.Tensor
    logprobs: tf.Tensor
    bias: tf.Tensor

    def of(self, rows):
        """The rules of these rows [N], which may be fewer, more, or in another order."""
        own, rest = self[:5], self[5:]
        return Rules(*(tf.gather(field, rows) for field in own), *rest)


RULES_SPEC = Rules(
    *(tf.TensorSpec([None], t) for t in (tf.float32, tf.int32, tf.float32, tf.float32, tf.int32)),
    no_repeat_ngram=tf.TensorSpec([], tf.int32),
    end=tf.TensorSpec([], tf.int32),
    logprobs=tf.TensorSpec([], tf.bool),
    bias=tf.TensorSpec([None], tf.float32),
)


class Past(NamedTuple):
    """What each row holds so far, of the whole row and not only of its window.

    seen: bool [B, V], the tokens that occur in it.
    history: int32 [B, M], its tokens in order, with M above `length`; M = 1 and no meaning without
        no_repeat_ngram, which alone reads it.
    length, generated: int32 [B], tokens in it, and those of them that came after the prompt.
    """

    seen: tf.Tensor
    history: tf.Tensor
    length: tf.Tensor
    generated: tf.Tensor

    def of(self, rows):
        """The Past of these rows [N], which may be fewer, more, or in another order."""
        return Past(*(tf.gather(field, rows) for field in self))

    def after(self, chosen):
        """The Past once each row has got one more token, `chosen` [B]."""
        rows = tf.range(tf.size(chosen))
        places = tf.stack([rows, chosen], axis=1)
        here = tf.range(tf.shape(self.history)[1]) == self.length[:, None]
        return Past(
            tf.tensor_scatter_nd_update(self.seen, places, tf.fill([tf.size(rows)], True)),
            tf.where(here, chosen[:, None], self.history),
            self.length + 1,
            self.generated + 1,
        )


PAST_SPEC = Past(
    tf.TensorSpec([None, None], tf.bool),
    *(tf.TensorSpec([None] * rank, tf.int32) for rank in (2, 1, 1)),
)


def largest_threshold(values, enough):
    """For each row of [B, V] the largest t for which enough(values >= t) [B] still holds.

    Floats in the order of their bits are integers, so t is found exactly, bit by bit, in 32 passes
    over the row instead of a sort. Returns keep, bool [B, V]: values >= t. -inf if none is enough.
    """
    bits = tf.bitcast(values, tf.int32)
    keys = tf.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # [B, V], ordered as the floats are
    least = tf.fill([tf.shape(keys)[0]], tf.int32.min)
    start = tf.where(enough(keys >= 0), 0, least)

    def try_bit(bit, t):
        candidate = t + tf.bitwise.left_shift(1, bit)
        return bit - 1, tf.where(enough(keys >= candidate[:, None]), candidate, t)

    _, t = tf.while_loop(lambda bit, _: bit >= 0, try_bit, [tf.constant(30), start])
    return keys >= t[:, None]


def keep_top_k(logits, k):
    """[B, V], k [B] -> [B, V]: all but the k likeliest at -inf; k = 0 keeps all. Ties are kept."""
    k = tf.where(k > 0, k, tf.shape(logits)[1])

    def enough(kept):
        return tf.reduce_sum(tf.cast(kept, tf.int32), -1) >= k

    return tf.where(largest_threshold(logits, enough), logits, -np.inf)


def keep_top_p(logits, p):
    """[B, V], p [B] -> [B, V]: the fewest likeliest that together reach p, all others at -inf.

    The token that crosses p is kept (openai/gpt-2 drops it), so at least one is; 0 and 1 keep all.
    Nucleus sampling, arXiv 1904.09751.
    """
    probs = tf.nn.softmax(logits)
    # A sum of probabilities may round to 1 before all are in it, but never reaches 2.
    p = tf.where((p > 0) & (p < 1), p, 2.0)

    def enough(kept):
        return tf.reduce_sum(tf.where(kept, probs, 0.0), -1) >= p

    return tf.where(largest_threshold(logits, enough), logits, -np.inf)


def penalize_repetition(logits, seen, penalty):
    """[B, V]: tokens in `seen` [B, V] made less likely by `penalty` [B] (arXiv 1909.05858)."""
    penalty = penalty[:, None]
    return tf.where(seen, tf.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits, uniform):
    """A token a row from softmax(logits [B, V]) and one random number in [0, 1) a row [B] -> [B].

    The first token whose cumulative probability exceeds the number; in two levels, so that no
    sum is longer than a few hundred terms and float32 stays exact enough.
    """
    rows, size = tf.shape(logits)[0], tf.shape(logits)[1]
    most = tf.reduce_max(logits, -1, keepdims=True)
    logits = tf.pad(logits, [[0, 0], [0, -size % BLOCK]], constant_values=-np.inf)
    mass = tf.reshape(tf.exp(logits - most), [rows, -1, BLOCK])  # [B, V / BLOCK, BLOCK]
    sums = tf.reduce_sum(mass, -1)
    cumulative = tf.cumsum(sums, axis=-1)  # [B, V / BLOCK]
    target = uniform * cumulative[:, -1]
    block = _first_above(cumulative, sums, target)
    before = tf.gather(tf.pad(cumulative, [[0, 0], [1, 0]]), block, batch_dims=1)
    inside = tf.gather(mass, block, batch_dims=1)  # [B, BLOCK]
    return block * BLOCK + _first_above(tf.cumsum(inside, axis=-1), inside, target - before)


def _first_above(cumulative, mass, target):
    """[B, N]: the first index whose cumulative sum exceeds target [B]; never one without mass."""
    index = tf.reduce_sum(tf.cast(cumulative <= target[:, None], tf.int32), -1)
    last = tf.reduce_max(tf.where(mass > 0, tf.range(tf.shape(mass)[1]), 0), -1)
    return tf.minimum(index, last)  # rounding may leave target just above the last sum


def forbid_repeats(logits, past, size):
    """[B, V]: tokens at -inf that would write `size` tokens in a row that are in the row already.

    A row in which that leaves no token stays as it is.
    """
    history, length = past.history, past.length
    places = tf.range(tf.shape(history)[1])
    # where the row holds what would come again: the last token of an earlier `size` in a row
    found = (places >= size - 1) & (places < length[:, None])  # [B, M]

    def compare(back, found):
        earlier = tf.gather(history, tf.maximum(places - back, 0), axis=1)  # [B, M]
        # a finished row's length may be past the end
        at = tf.clip_by_value(length - back, 0, tf.size(places) - 1)
        last = tf.gather(history, at, batch_dims=1)  # [B]
        return back + 1, found & (earlier == last[:, None])

    _, found = tf.while_loop(
        lambda back, found: (back < size) & tf.reduce_any(found), compare, [tf.constant(1), found]
    )
    rows = tf.broadcast_to(tf.range(tf.shape(history)[0])[:, None], tf.shape(history))
    banned = tf.tensor_scatter_nd_max(
        tf.zeros(tf.shape(logits), tf.int32),
        tf.stack([rows, history], axis=-1),  # [B, M, 2]
        tf.cast(found, tf.int32),
    )
    left = tf.where(banned > 0, -np.inf, logits)
    return tf.where(tf.reduce_max(left, -1, keepdims=True) > -np.inf, left, logits)


def _where(any_row, change, logits):
    """change(logits) if any row asks for it; a pass over [B, V] is a good part of a step."""
    return tf.cond(tf.reduce_any(any_row), lambda: change(logits), lambda: logits)


def apply_rules(logits, past, rules):
    """Logits or log-probabilities [B, V] -> [B, V], before any temperature and cut.

    In this order: repetition penalty, banned tokens, minimal length, repeated n-grams.
    """
    early = past.generated < rules.min_length  # [B]
    is_end = tf.range(tf.shape(logits)[1]) == rules.end

    def penalize(logits):
        return penalize_repetition(logits, past.seen, rules.repetition_penalty)

    def go_on(logits):
        return tf.where(early[:, None] & is_end, -np.inf, logits)

    def without_repeats(logits):
        return forbid_repeats(logits, past, rules.no_repeat_ngram)

    logits = _where(rules.repetition_penalty != 1, penalize, logits)
    logits = _where(rules.bias != 0, lambda logits: logits + rules.bias, logits)
    logits = _where(early, go_on, logits)
    return _where(rules.no_repeat_ngram > 0, without_repeats, logits)


def choose(logits, uniform, past, rules):
    """The next token of each row [B] from logits [B, V], its log-probability [B], the new Past.

    After apply_rules: temperature, top-k, top-p. The log-probability, in nats, is the model's own,
    before all of these; 0 where nobody asks for it.
    """
    raw, logits = logits, apply_rules(logits, past, rules)

    def cool(logits):
        cold = tf.maximum(rules.temperature, 1e-6)[:, None]
        # shifted first, so that a small temperature cannot overflow
        return (logits - tf.reduce_max(logits, -1, keepdims=True)) / cold

    def sample():
        kept = _where(rules.temperature != 1, cool, logits)
        kept = _where(rules.top_k > 0, lambda kept: keep_top_k(kept, rules.top_k), kept)
        kept = _where(rules.top_p > 0, lambda kept: keep_top_p(kept, rules.top_p), kept)
        return draw(kept, uniform)

    def greedy():
        return tf.argmax(logits, -1, output_type=tf.int32)

    cold = rules.temperature <= 0
    drawn = tf.cond(tf.reduce_all(cold), greedy, sample)
    chosen = tf.cond(tf.reduce_any(cold), lambda: tf.where(cold, greedy(), drawn), lambda: drawn)
    logprob = tf.cond(
        rules.logprobs,
        lambda: tf.gather(raw, chosen, batch_dims=1) - tf.reduce_logsumexp(raw, -1),
        lambda: tf.zeros(tf.shape(chosen)),
    )
    return chosen, logprob, past.after(chosen)


def rank(logits, scores, past, rules, count):
    """The likeliest `count` rows of one token more: beams [B], each with any token.

    As in transformers, the rules apply to log-probabilities, and what they leave is not normalized.

    Args:
        logits: [B, V].
        scores: [B], the log-probability of each row so far.

    Returns:
        Best first, each [N] with N up to `count`: score, row, token, the token's own
        log-probability.
    """
    log_probs = tf.nn.log_softmax(logits)
    total = scores[:, None] + apply_rules(log_probs, past, rules)
    # of each row first: one sort of a few instead of one of B * V
    each = tf.minimum(count, tf.shape(total)[1])
    best, tokens = tf.math.top_k(total, each)  # [B, each]
    best, places = tf.math.top_k(tf.reshape(best, [-1]), tf.minimum(count, tf.size(best)))
    rows, tokens = places // each, tf.gather(tf.reshape(tokens, [-1]), places)
    return best, rows, tokens, tf.gather_nd(log_probs, tf.stack([rows, tokens], axis=1))


def _compiled(function, *signature):
    return tf.function(function, input_signature=signature, autograph=False)


_ROWS, _MATRIX = tf.TensorSpec([None]), tf.TensorSpec([None, None])
_IDS = tf.TensorSpec([None], tf.int32)

pick = _compiled(choose, _MATRIX, _ROWS, PAST_SPEC, RULES_SPEC)
best = _compiled(rank, _MATRIX, _ROWS, PAST_SPEC, RULES_SPEC, tf.TensorSpec([], tf.int32))
after = _compiled(lambda past, chosen: past.after(chosen), PAST_SPEC, _IDS)
of_rows = _compiled(lambda past, rows: past.of(rows), PAST_SPEC, _IDS)


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
        self.ngram = settings.no_repeat_ngram
        n_vocab, size = network.config.n_vocab, len(prompts)
        bias = np.zeros(n_vocab, np.float32)
        bias[[token for token in banned if token < n_vocab]] = -np.inf
        self.rules = Rules(
            temperature=tf.fill([size], np.float32(settings.temperature)),
            top_k=tf.fill([size], np.int32(min(settings.top_k, n_vocab))),
            top_p=tf.fill([size], np.float32(settings.top_p)),
            repetition_penalty=tf.fill([size], np.float32(settings.repetition_penalty)),
            min_length=tf.fill([size], np.int32(min(settings.min_length, 2**31 - 1))),
            no_repeat_ngram=tf.constant(np.int32(self.ngram)),
            end=tf.constant(self.end),
            logprobs=tf.constant(settings.logprobs),
            bias=tf.constant(bias),
        )
        self.noise = [np.random.Generator(np.random.Philox(key=[seed, i or 0])) for i in indices]
        self.logprobs = [[] for _ in prompts]
        self.window = [0] * size  # where the part of each row that the model sees begins
        self.sees_last = settings.window == "last"
        self.full = network.config.n_ctx - (self.sees_last and network.config.n_ctx > 1)
        self.cache = None
        self.past = self._first_past(n_vocab)

    def step(self, limit=CHUNK):
        """Generate up to `limit` tokens a row; returns the new ones of each row, [] if finished.

        The end token is not among them; `finished` says which rows are done.
        """
        if self._must_read():
            new, logprobs, count = self._choose_first()
        else:
            new, logprobs, count = self._decode(min(limit, CHUNK))
        fresh = []
        for row, tokens in enumerate(self.rows):
            if self.finished[row]:
                fresh.append([])
                continue
            added = new[row, : min(count, self.length - self._generated()[row])].tolist()
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
        scores = np.array(scores, np.float32)
        self._grow_history(1)
        if self._must_read():
            logits = self._read_windows()
        else:
            token, lengths = self._last()
            logits, self.cache = self.network.feed(self.cache, token, lengths - 1)
        ranked = best(logits, scores, self.past, self.rules, np.int32(count))
        columns = (column.numpy().tolist() for column in ranked)
        return [found for found in zip(*columns, strict=True) if found[0] > -np.inf]

    def take(self, parents, tokens):
        """Go on with new rows: each one of the present ones, by its number, and a token more.

        All rows have the same settings, so only another number of rows needs other Rules.
        """
        self.rows = [[*self.rows[p], token] for p, token in zip(parents, tokens, strict=True)]
        parents = np.array(parents, np.int32)
        if not np.array_equal(parents, np.arange(len(self.finished))):
            self.window = [self.window[p] for p in parents]
            self.prompt_lengths = self.prompt_lengths[parents]
            if len(parents) != len(self.finished):
                self.rules = self.rules.of(parents)
            self.finished = self.finished[parents]
            self.cache, self.past = (
                self.network.regroup(self.cache, parents),
                of_rows(self.past, parents),
            )
        self.past = after(self.past, np.array(tokens, np.int32))

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

    def _first_past(self, n_vocab):
        """The Past of the prompts alone."""
        seen = np.zeros([len(self.rows), n_vocab], bool)
        for row, prompt in enumerate(self.rows):
            seen[row, prompt] = True
        needed = int(self.prompt_lengths.max()) if self.ngram else 1
        history = np.zeros([len(self.rows), needed], np.int32)
        if self.ngram:
            for row, prompt in enumerate(self.rows):
                history[row, : len(prompt)] = prompt
        zeros = np.zeros_like(self.prompt_lengths)
        return Past(*map(tf.constant, (seen, history, self.prompt_lengths, zeros)))

    def _must_read(self):
        """Whether the next token takes a pass over the windows."""
        return self.cache is None or self._seen_lengths().max() > self.full

    def _read_windows(self):
        """Move the windows that are too long, read all in one pass; logits [B, V] after them."""
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
        logits, self.cache = self.network.read(windows, min(n_ctx, slots))
        return logits

    def _choose_first(self):
        """One token a row, after its window."""
        logits, uniform = self._read_windows(), self._uniform(1)
        self._grow_history(1)
        chosen, logprobs, self.past = pick(logits, uniform[:, 0], self.past, self.rules)
        return chosen.numpy()[:, None], logprobs.numpy()[:, None], 1

    def _grow_history(self, steps):
        """Give the history room for `steps` more tokens: at once for all that will come, up to
        n_ctx, then twice as much whenever it is full. Each size is one compilation."""
        if not self.ngram:
            return
        longest = max(map(len, self.rows))
        all_of_it = int(self.prompt_lengths.max()) + self.length
        needed = max(longest + steps, min(all_of_it, self.network.config.n_ctx)) + 1
        size = max(SMALLEST_HISTORY, 1 << (needed - 1).bit_length())
        more = size - self.past.history.shape[1]
        if more > 0:
            history = tf.pad(self.past.history, [[0, 0], [0, more]])
            self.past = self.past._replace(history=history)

    def _last(self):
        """Each row's last token [B], which is not in the cache yet, and its window's length [B]."""
        return np.array([tokens[-1] for tokens in self.rows], np.int32), self._seen_lengths()

    def _decode(self, limit):
        """Run the compiled loop for up to `limit` tokens, no further than the fullest window."""
        token, lengths = self._last()
        most = int((self.length - self._generated()[~self.finished]).max())
        steps = min(limit, most, self.full - int(lengths.max()) + 1)
        noise = np.zeros([len(self.rows), CHUNK], np.float32)
        noise[:, :steps] = self._uniform(steps)
        self._grow_history(steps)
        tokens, logprobs, done, self.cache, self.past = self.network.run(
            self.cache,
            token,
            lengths - 1,
            self.finished,
            self.past,
            noise,
            steps,
            self.rules,
        )
        return np.array(tokens), np.array(logprobs), int(done)

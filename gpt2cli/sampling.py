"""Logits -> next token, and the loop that generates.

The loop is one compiled program (XLA): keys and values lie in buffers made once, each row writes
its next token at its own slot, and a finished mask ends the loop when all rows have ended. Prompts
are padded at the right, so a token's slot is its position, whatever else is in the batch.

Past n_ctx tokens the window slides: when a row's window is full, its older half is dropped and the
newer half processed again; or, with `--window last`, its last n_ctx - 1 tokens are read again for
every token. A row's window depends on that row alone, not on its batch.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from gpt2cli.engine import tf

CHUNK = 32  # tokens a call of the compiled loop may generate; more would delay --stop
SMALLEST_CACHE = 64  # slots; caches and histories double from here, one compilation each
BLOCK = 256  # about sqrt(50257): the two cumulative sums of `draw` are equally long


class Rules(NamedTuple):
    """How each row chooses its next token; every field is a tensor or an array.

    temperature, top_p, repetition_penalty: float32 [B]; top_k, min_length: int32 [B].
    no_repeat_ngram: int32 [], how many tokens in a row must not come twice; 0 allows it.
    end: int32 [], the token that ends a row, or -1.
    bias: float32 [V], added to the logits; -inf where a token must never be chosen.
    """

    temperature: tf.Tensor
    top_k: tf.Tensor
    top_p: tf.Tensor
    repetition_penalty: tf.Tensor
    min_length: tf.Tensor
    no_repeat_ngram: tf.Tensor
    end: tf.Tensor
    bias: tf.Tensor

    def of(self, rows):
        """The rules of these rows [N], which may be fewer, more, or in another order."""
        *own, ngram, end, bias = self
        return Rules(*(tf.gather(field, rows) for field in own), ngram, end, bias)


RULES_SPEC = Rules(
    *(tf.TensorSpec([None], t) for t in (tf.float32, tf.int32, tf.float32, tf.float32, tf.int32)),
    no_repeat_ngram=tf.TensorSpec([], tf.int32),
    end=tf.TensorSpec([], tf.int32),
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
    padding = -size % BLOCK
    probs = tf.pad(tf.nn.softmax(logits), [[0, 0], [0, padding]])
    probs = tf.reshape(probs, [rows, -1, BLOCK])  # [B, V / BLOCK, BLOCK]
    cumulative = tf.cumsum(tf.reduce_sum(probs, -1), axis=-1)  # [B, V / BLOCK]
    target = uniform * cumulative[:, -1]
    block = _first_above(cumulative, tf.reduce_max(probs, -1), target)
    before = tf.gather(tf.pad(cumulative, [[0, 0], [1, 0]]), block, batch_dims=1)
    inside = tf.gather(probs, block, batch_dims=1)  # [B, BLOCK]
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


def apply_rules(logits, past, rules):
    """Logits or log-probabilities [B, V] -> [B, V], before any temperature and cut.

    In this order: repetition penalty, banned tokens, minimal length, repeated n-grams.
    """
    logits = penalize_repetition(logits, past.seen, rules.repetition_penalty) + rules.bias
    is_end = tf.range(tf.shape(logits)[1]) == rules.end
    too_early = (past.generated < rules.min_length)[:, None] & is_end
    logits = tf.where(too_early, -np.inf, logits)
    return tf.cond(
        rules.no_repeat_ngram > 0,
        lambda: forbid_repeats(logits, past, rules.no_repeat_ngram),
        lambda: logits,
    )


def choose(logits, uniform, past, rules):
    """The next token of each row [B] from logits [B, V], its log-probability [B], the new Past.

    After apply_rules: temperature, top-k, top-p. The log-probability, in nats, is the model's own,
    before all of these.
    """
    raw, logits = logits, apply_rules(logits, past, rules)
    greedy = tf.argmax(logits, -1, output_type=tf.int32)

    def sample():
        cold = tf.maximum(rules.temperature, 1e-6)[:, None]
        # shifted first, so that a small temperature cannot overflow
        kept = (logits - tf.reduce_max(logits, -1, keepdims=True)) / cold
        kept = tf.cond(
            tf.reduce_any(rules.top_k > 0), lambda: keep_top_k(kept, rules.top_k), lambda: kept
        )
        narrow = tf.cond(
            tf.reduce_any(rules.top_p > 0), lambda: keep_top_p(kept, rules.top_p), lambda: kept
        )
        return tf.where(rules.temperature > 0, draw(narrow, uniform), greedy)

    chosen = tf.cond(tf.reduce_any(rules.temperature > 0), sample, lambda: greedy)
    logprob = tf.gather(raw, chosen, batch_dims=1) - tf.reduce_logsumexp(raw, -1)
    return chosen, logprob, past.after(chosen)


def logits_after(model, tokens, lengths):
    """Rows [B, T], padded at the right -> logits [B, V] after the `lengths` [B] tokens; cache."""
    x, cache = model.hidden(tokens)
    return model.head(tf.gather(x, lengths - 1, batch_dims=1)), cache


def run(model, cache, token, position, finished, past, noise, steps, rules):
    """Generate up to `steps` tokens a row.

    Args:
        model: a GPT2.
        cache: of each layer [B, S, H, D], filled before `position`.
        token, position: [B], the token to feed next and its slot.
        finished: [B], rows that have ended; they write nothing that counts.
        past: Past, `token` included.
        noise: [B, N], random numbers in [0, 1); steps <= N.
        rules: Rules.

    Returns:
        tokens [B, N] and their log-probabilities [B, N], of which the first `steps done` count,
        steps done, cache, past.
    """
    size = tf.shape(noise)[1]

    def step(i, cache, token, finished, past, tokens, logprobs):
        x, cache = model.hidden(token[:, None], cache, (position + i)[:, None])
        uniform = tf.gather(noise, i, axis=1)
        chosen, logprob, past = choose(model.head(x[:, 0]), uniform, past, rules)
        here = tf.range(size) == i
        tokens = tf.where(here, chosen[:, None], tokens)
        logprobs = tf.where(here, logprob[:, None], logprobs)
        return i + 1, cache, chosen, finished | (chosen == rules.end), past, tokens, logprobs

    def go_on(i, cache, token, finished, *rest):
        return (i < steps) & ~tf.reduce_all(finished)

    empty = tf.zeros(tf.shape(noise), tf.int32), tf.zeros(tf.shape(noise))
    start = [tf.constant(0), cache, token, finished, past, *empty]
    i, cache, _, _, past, tokens, logprobs = tf.while_loop(go_on, step, start)
    return tokens, logprobs, i, cache, past


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


def extend(model, cache, token, position, scores, past, rules):
    """Feed `token` [B] at its slot `position` [B]; `rank` of twice as many rows, and the cache."""
    x, cache = model.hidden(token[:, None], cache, position[:, None])
    # from the shape, because XLA must know it when it compiles
    return rank(model.head(x[:, 0]), scores, past, rules, 2 * tf.shape(token)[0]), cache


def regroup(cache, past, parents):
    """The cache and Past of new rows, each a copy of the present one of that number [N]."""
    return tf.nest.map_structure(lambda kept: tf.gather(kept, parents), (cache, past))


class Programs:
    """The compiled functions of one model. Each is traced once, whatever shapes follow."""

    def __init__(self, model):
        def compiled(function, *signature, xla=False):
            return tf.function(
                function, input_signature=signature, autograph=False, jit_compile=xla
            )

        def array(kind, rank):
            return tf.TensorSpec([None] * rank, kind)

        ints, head = array(tf.int32, 1), model.config.n_embd // model.config.n_head
        slots = tf.TensorSpec([None, None, model.config.n_head, head], model.dtype)
        cache, matrix = [(slots, slots)] * model.config.n_layer, array(tf.float32, 2)
        row, count = array(tf.float32, 1), array(tf.int32, 0)
        self.logits_after = compiled(partial(logits_after, model), array(tf.int32, 2), ints)
        self.first = compiled(choose, matrix, row, PAST_SPEC, RULES_SPEC)
        self.run = compiled(
            *(partial(run, model), cache, ints, ints, array(tf.bool, 1), PAST_SPEC, matrix, count),
            RULES_SPEC,
            xla=True,
        )
        self.regroup = compiled(regroup, cache, PAST_SPEC, ints)
        self.after = compiled(lambda past, chosen: past.after(chosen), PAST_SPEC, ints)
        self.rank = compiled(rank, matrix, row, PAST_SPEC, RULES_SPEC, count)
        self.extend = compiled(
            *(partial(extend, model), cache, ints, ints, row, PAST_SPEC, RULES_SPEC), xla=True
        )


class Generation:
    """One batch being generated. Call `step` until `finished` is all true.

    Or, for beams: `candidates`, then `take` those that are to go on.

    Args:
        model: a GPT2.
        programs: its Programs.
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

    def __init__(self, model, programs, prompts, settings, length, seed, indices, end, banned):
        self.model, self.programs, self.length = model, programs, length
        self.rows = [list(prompt) for prompt in prompts]
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self.finished = np.array([index is None for index in indices])
        self.end = -1 if end is None else end
        self.ngram = settings.no_repeat_ngram
        n_vocab, size = model.config.n_vocab, len(prompts)
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
            bias=tf.constant(bias),
        )
        self.noise = [np.random.Generator(np.random.Philox(key=[seed, i or 0])) for i in indices]
        self.logprobs = [[] for _ in prompts]
        self.window = [0] * size  # where the part of each row that the model sees begins
        self.sees_last = settings.window == "last"
        self.full = model.config.n_ctx - (self.sees_last and model.config.n_ctx > 1)
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
            count: how many; must be 2 for each row, but for the first token, when all is one row.

        Returns:
            Best first; fewer where the rules leave fewer.
        """
        scores = np.array(scores, np.float32)
        self._grow_history(1)
        if self._must_read():
            logits = self._read_windows()
            ranked = self.programs.rank(logits, scores, self.past, self.rules, np.int32(count))
        else:
            token, lengths = self._last()
            ranked, self.cache = self.programs.extend(
                self.cache, token, lengths - 1, scores, self.past, self.rules
            )
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
            self.cache, self.past = self.programs.regroup(self.cache, self.past, parents)
        self.past = self.programs.after(self.past, np.array(tokens, np.int32))

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
        n_ctx = self.model.config.n_ctx
        for row, tokens in enumerate(self.rows):
            if len(tokens) - self.window[row] > self.full:
                all_of_it = self.cache is None or self.sees_last
                self.window[row] = len(tokens) - (self.full if all_of_it else max(1, n_ctx // 2))
        lengths = self._seen_lengths()
        padded = np.zeros([len(self.rows), lengths.max()], np.int32)
        for row, length in enumerate(lengths):
            start = self.window[row]
            padded[row, :length] = self.rows[row][start : start + length]
        logits, self.cache = self.programs.logits_after(padded, lengths)
        self._grow_cache(min(n_ctx, int(lengths.max() + self.length - self._generated().min())))
        return logits

    def _choose_first(self):
        """One token a row, after its window."""
        logits, uniform = self._read_windows(), self._uniform(1)
        self._grow_history(1)
        chosen, logprobs, self.past = self.programs.first(
            logits, uniform[:, 0], self.past, self.rules
        )
        return chosen.numpy()[:, None], logprobs.numpy()[:, None], 1

    def _grow_cache(self, needed):
        """Give the cache the smallest size that holds `needed` slots."""
        size, n_ctx = SMALLEST_CACHE, self.model.config.n_ctx
        while size < needed:
            size *= 2
        more = min(size, n_ctx) - self.cache[0][0].shape[1]
        if more > 0:
            self.cache = tf.nest.map_structure(
                lambda kept: tf.pad(kept, [[0, 0], [0, more], [0, 0], [0, 0]]), self.cache
            )

    def _grow_history(self, steps):
        """Give the history room for `steps` more tokens: at once for all that will come, up to
        n_ctx, then twice as much whenever it is full. Each size is one compilation."""
        if not self.ngram:
            return
        longest = max(map(len, self.rows))
        all_of_it = int(self.prompt_lengths.max()) + self.length
        needed = max(longest + steps, min(all_of_it, self.model.config.n_ctx)) + 1
        size = max(SMALLEST_CACHE, 1 << (needed - 1).bit_length())
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
        tokens, logprobs, done, self.cache, self.past = self.programs.run(
            self.cache,
            token,
            lengths - 1,
            self.finished,
            self.past,
            noise,
            np.int32(steps),
            self.rules,
        )
        return tokens.numpy(), logprobs.numpy(), int(done)

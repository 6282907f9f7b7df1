"""The rules of sampling.py in TensorFlow, for the compiled loop of graph.py, all rows at once."""

from typing import NamedTuple

import numpy as np

from gpt2cli.tensorflow import tf

BLOCK = 256  # as in sampling.py, so that the same number draws the same token


class Rules(NamedTuple):
    """How each row chooses its next token; every field is a tensor or an array.

    temperature, top_p, repetition_penalty: float32 [B]; top_k, min_length: int32 [B].
    no_repeat_ngram: int32 [B], how many tokens in a row must not come twice; 0 allows it.
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


RULES_SPEC = Rules(
    *(tf.TensorSpec([None], t) for t in (tf.float32, tf.int32, tf.float32, tf.float32, tf.int32)),
    no_repeat_ngram=tf.TensorSpec([None], tf.int32),
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
    """[B, V]: tokens at -inf that would write `size` [B] in a row that are in the row already.

    A row in which that leaves no token stays as it is, as does one whose size is 0.
    """
    history, length, size = past.history, past.length, size[:, None]
    places = tf.range(tf.shape(history)[1])
    # where the row holds what would come again: the last token of an earlier `size` in a row
    found = (places >= size - 1) & (places < length[:, None]) & (size > 0)  # [B, M]

    def compare(back, found):
        earlier = tf.gather(history, tf.maximum(places - back, 0), axis=1)  # [B, M]
        # a finished row's length may be past the end
        at = tf.clip_by_value(length - back, 0, tf.size(places) - 1)
        last = tf.gather(history, at, batch_dims=1)  # [B]
        return back + 1, found & ((earlier == last[:, None]) | (back >= size))

    def go_on(back, found):
        return tf.reduce_any((back < size) & found)

    _, found = tf.while_loop(go_on, compare, [tf.constant(1), found])
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
    """The next token of each row [B] from logits [B, V], and the new Past.

    After apply_rules: temperature, top-k, top-p.
    """
    logits = apply_rules(logits, past, rules)

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
    return chosen, past.after(chosen)


def logprobs_of(logits, chosen, count, wanted):
    """The log-probabilities of chosen tokens [B], in nats, and of the likeliest in their places.

    Args:
        logits: [B, V], before all rules.
        count: how many of the likeliest.
        wanted: bool [], whether anybody asks; else all is 0.

    Returns:
        float32 [B], int32 [B, count], float32 [B, count], best first.
    """
    rows = tf.size(chosen)

    def found():
        total = tf.reduce_logsumexp(logits, -1)
        best, others = tf.math.top_k(logits, count)
        own = tf.gather(logits, chosen, batch_dims=1)
        return own - total, others, best - total[:, None]

    def nothing():
        return tf.zeros(rows), tf.zeros([rows, count], tf.int32), tf.zeros([rows, count])

    return tf.cond(wanted, found, nothing)


def past_of(rows, generated, n_vocab, steps, history):
    """The Past of rows of ids, with room for `steps` more tokens each.

    Args:
        history: tokens for which it has room at the least; 0 if nobody asks for it. Each of its
            sizes is one compilation.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    seen = np.zeros([len(rows), n_vocab], bool)
    room = max(history, int(lengths.max()) + steps + 1) if history else 1
    held = np.zeros([len(rows), 1 << (room - 1).bit_length()], np.int32)
    for number, row in enumerate(rows):
        seen[number, row] = True
        if history:
            held[number, : len(row)] = row
    return Past(seen, held, lengths, generated)


def tensors_of(rules, logprobs, n_vocab):
    """The Rules of rows that have these sampling.Rules; one batch bans the same tokens."""
    kinds = {name: spec.dtype.as_numpy_dtype for name, spec in RULES_SPEC._asdict().items()}
    own = {n: np.array([getattr(row, n) for row in rules], kinds[n]) for n in Rules._fields[:6]}
    bias = np.zeros(n_vocab, np.float32)
    bias[list(rules[0].banned)] = -np.inf
    return Rules(
        **own,
        end=np.int32(rules[0].end),
        logprobs=np.bool_(logprobs),
        bias=bias,
    )

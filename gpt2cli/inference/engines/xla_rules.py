"""The rules of sampling.py in TensorFlow, all rows at once, for the compiled loop of xla.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpt2cli.inference import sampling
from gpt2cli.inference.sampling import BLOCK  # so that the same number draws the same token
from gpt2cli.tensorflow import tf


class Rules(NamedTuple):
    """How each row chooses its next token: the fields of sampling.Rules as tensors or arrays.

    Args:
        temperature: float32 [B].
        top_k: int32 [B].
        top_p: float32 [B].
        repetition_penalty: float32 [B].
        min_length: int32 [B].
        no_repeat_ngram: int32 [B].
        ends: bool [V], the tokens that end a row.
        logprobs: bool [], whether any row needs the log-probabilities of its tokens.
        bias: float32 [V], added to the logits; -inf where a token must never be chosen.
    """

    temperature: tf.Tensor
    top_k: tf.Tensor
    top_p: tf.Tensor
    repetition_penalty: tf.Tensor
    min_length: tf.Tensor
    no_repeat_ngram: tf.Tensor
    ends: tf.Tensor
    logprobs: tf.Tensor
    bias: tf.Tensor


RULES_SPEC = Rules(
    temperature=tf.TensorSpec([None], tf.float32),
    top_k=tf.TensorSpec([None], tf.int32),
    top_p=tf.TensorSpec([None], tf.float32),
    repetition_penalty=tf.TensorSpec([None], tf.float32),
    min_length=tf.TensorSpec([None], tf.int32),
    no_repeat_ngram=tf.TensorSpec([None], tf.int32),
    ends=tf.TensorSpec([None], tf.bool),
    logprobs=tf.TensorSpec([], tf.bool),
    bias=tf.TensorSpec([None], tf.float32),
)


class Past(NamedTuple):
    """The tokens of each whole row, not only of its window.

    Args:
        seen: bool [B, V], the tokens that occur in it.
        history: int32 [B, M], its tokens in order, with M above `length`. Only no_repeat_ngram
            reads it; without that, M = 1 and the values have no meaning.
        length: int32 [B], the number of its tokens.
        generated: int32 [B], the number of those that came after the prompt.
    """

    seen: tf.Tensor
    history: tf.Tensor
    length: tf.Tensor
    generated: tf.Tensor

    def after(self, chosen: tf.Tensor) -> Past:
        """Return the Past with one more token per row, `chosen` [B]."""
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
    seen=tf.TensorSpec([None, None], tf.bool),
    history=tf.TensorSpec([None, None], tf.int32),
    length=tf.TensorSpec([None], tf.int32),
    generated=tf.TensorSpec([None], tf.int32),
)


def largest_threshold(values: tf.Tensor, enough: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Find in each row the largest t for which enough(values >= t) is true.

    Floats have the order of their bits as integers, so t is found exactly, bit by bit, in 32 passes
    over the row, without a sort.

    Args:
        values: float32 [B, V].
        enough: bool [B, V] -> bool [B].

    Returns:
        bool [B, V], values >= t; all true in a row where no t is enough.
    """
    bits = tf.bitcast(values, tf.int32)
    keys = tf.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # [B, V], ordered as the floats are
    least = tf.fill([tf.shape(keys)[0]], tf.int32.min)
    start = tf.where(enough(keys >= 0), 0, least)

    def try_bit(bit: tf.Tensor, t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        candidate = t + tf.bitwise.left_shift(1, bit)
        return bit - 1, tf.where(enough(keys >= candidate[:, None]), candidate, t)

    _, t = tf.while_loop(lambda bit, _: bit >= 0, try_bit, [tf.constant(30), start])
    return keys >= t[:, None]


def keep_top_k(logits: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    """Set all but the k likeliest of [B, V] to -inf, k [B]; 0 keeps all, and ties are kept."""
    k = tf.where(k > 0, k, tf.shape(logits)[1])

    def enough(kept: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(kept, tf.int32), -1) >= k

    return tf.where(largest_threshold(logits, enough), logits, -np.inf)


def keep_top_p(logits: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
    """Keep the fewest likeliest of [B, V] that together reach p [B], and set all others to -inf.

    The token that crosses p is kept (openai/gpt-2 drops it), so at least one is; 0 and 1 keep all.
    Nucleus sampling, arXiv 1904.09751.
    """
    probs = tf.nn.softmax(logits)
    # A sum of some probabilities may round to 1, but never to 2.
    p = tf.where((p > 0) & (p < 1), p, 2.0)

    def enough(kept: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.where(kept, probs, 0.0), -1) >= p

    return tf.where(largest_threshold(logits, enough), logits, -np.inf)


def penalize_repetition(logits: tf.Tensor, seen: tf.Tensor, penalty: tf.Tensor) -> tf.Tensor:
    """Make the tokens in `seen` [B, V] less likely by `penalty` [B] (arXiv 1909.05858)."""
    penalty = penalty[:, None]
    return tf.where(seen, tf.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    """Draw a token per row from softmax(logits [B, V]), by a random number in [0, 1) per row.

    It is the first token whose cumulative probability exceeds the number. The sum is taken in two
    levels of a few hundred terms, so that float32 is exact enough.

    Returns:
        int32 [B].
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


def _first_above(cumulative: tf.Tensor, mass: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """Return the first index of [B, N] whose cumulative sum exceeds target [B] and that has mass.

    If rounding leaves none, the last index with mass.
    """
    index = tf.reduce_sum(tf.cast(cumulative <= target[:, None], tf.int32), -1)
    last = tf.reduce_max(tf.where(mass > 0, tf.range(tf.shape(mass)[1]), 0), -1)
    return tf.minimum(index, last)  # rounding may leave target just above the last sum


def forbid_repeats(logits: tf.Tensor, past: Past, size: tf.Tensor) -> tf.Tensor:
    """Set tokens that would repeat an n-gram of the row, of `size` [B] tokens, to -inf.

    A row in which this would leave no token, or whose size is 0, stays as it is.

    Args:
        logits: [B, V].
        past: the rows.
        size: int32 [B].
    """
    history, length, size = past.history, past.length, size[:, None]
    places = tf.range(tf.shape(history)[1])
    # places of the last token of each earlier n-gram that the next token could repeat
    found = (places >= size - 1) & (places < length[:, None]) & (size > 0)  # [B, M]

    def compare(back: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        earlier = tf.gather(history, tf.maximum(places - back, 0), axis=1)  # [B, M]
        # a finished row's length may be past the end
        at = tf.clip_by_value(length - back, 0, tf.size(places) - 1)
        last = tf.gather(history, at, batch_dims=1)  # [B]
        return back + 1, found & ((earlier == last[:, None]) | (back >= size))

    def any_left(back: tf.Tensor, found: tf.Tensor) -> tf.Tensor:
        return tf.reduce_any((back < size) & found)

    _, found = tf.while_loop(any_left, compare, [tf.constant(1), found])
    rows = tf.broadcast_to(tf.range(tf.shape(history)[0])[:, None], tf.shape(history))
    banned = tf.tensor_scatter_nd_max(
        tf.zeros(tf.shape(logits), tf.int32),
        tf.stack([rows, history], axis=-1),  # [B, M, 2]
        tf.cast(found, tf.int32),
    )
    left = tf.where(banned > 0, -np.inf, logits)
    return tf.where(tf.reduce_max(left, -1, keepdims=True) > -np.inf, left, logits)


def _where(
    needs: tf.Tensor, change: Callable[[tf.Tensor], tf.Tensor], logits: tf.Tensor
) -> tf.Tensor:
    """Return change(logits) if any row needs it: a pass over [B, V] takes much of a step's time."""
    return tf.cond(tf.reduce_any(needs), lambda: change(logits), lambda: logits)


def apply_rules(logits: tf.Tensor, past: Past, rules: Rules) -> tf.Tensor:
    """Apply everything that comes before temperature, top-k and top-p to logits [B, V].

    In this order: repetition penalty, banned tokens, minimal length, repeated n-grams. The logits
    may be log-probabilities.
    """
    early = past.generated < rules.min_length  # [B]

    def penalize(logits: tf.Tensor) -> tf.Tensor:
        return penalize_repetition(logits, past.seen, rules.repetition_penalty)

    def without_end(logits: tf.Tensor) -> tf.Tensor:
        return tf.where(early[:, None] & rules.ends, -np.inf, logits)

    def without_repeats(logits: tf.Tensor) -> tf.Tensor:
        return forbid_repeats(logits, past, rules.no_repeat_ngram)

    logits = _where(rules.repetition_penalty != 1, penalize, logits)
    logits = _where(rules.bias != 0, lambda logits: logits + rules.bias, logits)
    logits = _where(early, without_end, logits)
    return _where(rules.no_repeat_ngram > 0, without_repeats, logits)


def choose(
    logits: tf.Tensor, uniform: tf.Tensor, past: Past, rules: Rules
) -> tuple[tf.Tensor, Past]:
    """Choose each row's next token: apply_rules, then temperature, top-k, top-p.

    Args:
        logits: [B, V].
        uniform: float32 [B], random numbers in [0, 1).
        past: the rows.
        rules: how each row chooses.

    Returns:
        The tokens int32 [B], and the Past that includes them.
    """
    logits = apply_rules(logits, past, rules)

    def cool(logits: tf.Tensor) -> tf.Tensor:
        cold = tf.maximum(rules.temperature, 1e-6)[:, None]
        # shifted first, so that a small temperature cannot overflow
        return (logits - tf.reduce_max(logits, -1, keepdims=True)) / cold

    def sample() -> tf.Tensor:
        kept = _where(rules.temperature != 1, cool, logits)
        kept = _where(rules.top_k > 0, lambda kept: keep_top_k(kept, rules.top_k), kept)
        kept = _where(rules.top_p > 0, lambda kept: keep_top_p(kept, rules.top_p), kept)
        return draw(kept, uniform)

    def greedy() -> tf.Tensor:
        return tf.argmax(logits, -1, output_type=tf.int32)

    cold = rules.temperature <= 0
    drawn = tf.cond(tf.reduce_all(cold), greedy, sample)
    chosen = tf.cond(tf.reduce_any(cold), lambda: tf.where(cold, greedy(), drawn), lambda: drawn)
    return chosen, past.after(chosen)


def logprobs_of(
    logits: tf.Tensor, chosen: tf.Tensor, count: int, wanted: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the log-probabilities, in nats, of the chosen tokens and of the likeliest ones.

    Args:
        logits: [B, V], before all rules.
        chosen: ids [B].
        count: number of likeliest tokens.
        wanted: bool []; if false, all results are 0.

    Returns:
        float32 [B], of the chosen tokens; int32 [B, count], the likeliest tokens, best first; and
        float32 [B, count], of these.
    """
    rows = tf.size(chosen)

    def found() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        total = tf.reduce_logsumexp(logits, -1)
        best, others = tf.math.top_k(logits, count)
        own = tf.gather(logits, chosen, batch_dims=1)
        return own - total, others, best - total[:, None]

    def nothing() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return tf.zeros(rows), tf.zeros([rows, count], tf.int32), tf.zeros([rows, count])

    return tf.cond(wanted, found, nothing)


def past_of(
    rows: Sequence[Sequence[int]], generated: np.ndarray, n_vocab: int, steps: int, history: int
) -> Past:
    """Return the Past of rows.

    Args:
        rows: the ids of each.
        generated: int32 [B], the number of those that came after the prompt.
        n_vocab: V.
        steps: number of tokens to make room for.
        history: least room for the history, in tokens; 0 if no row needs it. Each size that it has
            costs a compilation.
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


def tensors_of(rules: Sequence[sampling.Rules], logprobs: bool, n_vocab: int) -> Rules:
    """Return the rules of all rows, which end with the same tokens and ban the same tokens.

    Args:
        rules: of each row.
        logprobs: whether any row needs log-probabilities.
        n_vocab: V.
    """
    dtypes = {name: spec.dtype.as_numpy_dtype for name, spec in RULES_SPEC._asdict().items()}
    own = {n: np.array([getattr(row, n) for row in rules], dtypes[n]) for n in Rules._fields[:6]}
    # 0 keeps all tokens, so a tiny P must not be rounded to 0
    own["top_p"][[row.top_p > 0 for row in rules]] += np.finfo(np.float32).tiny
    bias = np.zeros(n_vocab, np.float32)
    bias[list(rules[0].banned)] = -np.inf
    ends = np.zeros(n_vocab, bool)
    ends[list(rules[0].ends)] = True
    return Rules(
        **own,
        ends=ends,
        logprobs=np.bool_(logprobs),
        bias=bias,
    )

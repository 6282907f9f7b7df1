"""Logits -> next token, and the loop that generates.

The loop is one compiled program (XLA): keys and values lie in buffers made once, each row writes
its next token at its own slot, and a finished mask ends the loop when all rows have ended. Prompts
are padded at the right, so a token's slot is its position, whatever else is in the batch.

Past n_ctx tokens the window slides: when a row's window is full, its older half is dropped and the
newer half processed again. A row's window depends on that row alone, not on its batch.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from gpt2cli.engine import tf

CHUNK = 32  # tokens a call of the compiled loop may generate; more would delay --stop
SMALLEST_CACHE = 64  # slots; caches double from here to n_ctx, one compilation each
BLOCK = 256  # about sqrt(50257): the two cumulative sums of `draw` are equally long


class Rules(NamedTuple):
    """How each row chooses its next token; every field is a tensor or an array.

    temperature, top_p, repetition_penalty: float32 [B]; top_k, min_length: int32 [B].
    end: int32 [], the token that ends a row, or -1.
    bias: float32 [V], added to the logits; -inf where a token must never be chosen.
    """

    temperature: tf.Tensor
    top_k: tf.Tensor
    top_p: tf.Tensor
    repetition_penalty: tf.Tensor
    min_length: tf.Tensor
    end: tf.Tensor
    bias: tf.Tensor


RULES_SPEC = Rules(
    *(tf.TensorSpec([None], t) for t in (tf.float32, tf.int32, tf.float32, tf.float32, tf.int32)),
    end=tf.TensorSpec([], tf.int32),
    bias=tf.TensorSpec([None], tf.float32),
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


def choose(logits, uniform, seen, generated, rules):
    """The next token of each row [B] from logits [B, V]; `generated` [B] counts those before.

    In this order: repetition penalty, banned tokens, minimal length, temperature, top-k, top-p.
    """
    logits = penalize_repetition(logits, seen, rules.repetition_penalty) + rules.bias
    is_end = tf.range(tf.shape(logits)[1]) == rules.end
    too_early = (generated < rules.min_length)[:, None] & is_end
    logits = tf.where(too_early, -np.inf, logits)
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

    return tf.cond(tf.reduce_any(rules.temperature > 0), sample, lambda: greedy)


def logits_after(model, tokens, lengths):
    """Rows [B, T], padded at the right -> logits [B, V] after the `lengths` [B] tokens; cache."""
    x, cache = model.hidden(tokens)
    return model.head(tf.gather(x, lengths - 1, batch_dims=1)), cache


def run(model, cache, token, position, generated, finished, seen, noise, steps, rules):
    """Generate up to `steps` tokens a row.

    Args:
        model: a GPT2.
        cache: of each layer [B, S, H, D], filled before `position`.
        token, position: [B], the token to feed next and its slot.
        generated: [B], tokens generated so far, `token` included.
        finished: [B], rows that have ended; they write nothing that counts.
        seen: [B, V], tokens that occurred in the row.
        noise: [B, N], random numbers in [0, 1); steps <= N.
        rules: Rules.

    Returns:
        tokens [B, N], of which the first `steps done` count, steps done, cache, seen.
    """
    rows = tf.range(tf.shape(token)[0])

    def step(i, cache, token, finished, seen, out):
        x, cache = model.hidden(token[:, None], cache, (position + i)[:, None])
        uniform = tf.gather(noise, i, axis=1)
        chosen = choose(model.head(x[:, 0]), uniform, seen, generated + i, rules)
        places = tf.stack([rows, chosen], axis=1)
        seen = tf.tensor_scatter_nd_update(seen, places, tf.fill([tf.size(rows)], True))
        out = tf.where(tf.range(tf.shape(noise)[1]) == i, chosen[:, None], out)
        return i + 1, cache, chosen, finished | (chosen == rules.end), seen, out

    def go_on(i, cache, token, finished, seen, out):
        return (i < steps) & ~tf.reduce_all(finished)

    start = [tf.constant(0), cache, token, finished, seen, tf.zeros(tf.shape(noise), tf.int32)]
    i, cache, _, _, seen, out = tf.while_loop(go_on, step, start)
    return out, i, cache, seen


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
        seen, noise = array(tf.bool, 2), array(tf.float32, 2)
        self.logits_after = compiled(partial(logits_after, model), array(tf.int32, 2), ints)
        self.first = compiled(
            *(choose, array(tf.float32, 2), array(tf.float32, 1), seen, ints, RULES_SPEC)
        )
        self.run = compiled(
            *(partial(run, model), [(slots, slots)] * model.config.n_layer, ints, ints, ints),
            *(array(tf.bool, 1), seen, noise, array(tf.int32, 0), RULES_SPEC),
            xla=True,
        )


class Generation:
    """One batch being generated. Call `step` until `finished` is all true.

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
    """

    def __init__(self, model, programs, prompts, settings, length, seed, indices, end, banned):
        self.model, self.programs, self.length = model, programs, length
        self.rows = [list(prompt) for prompt in prompts]
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self.finished = np.array([index is None for index in indices])
        self.end = -1 if end is None else end
        n_vocab, size = model.config.n_vocab, len(prompts)
        bias = np.zeros(n_vocab, np.float32)
        bias[[token for token in banned if token < n_vocab]] = -np.inf
        self.rules = Rules(
            temperature=tf.fill([size], np.float32(settings.temperature)),
            top_k=tf.fill([size], np.int32(min(settings.top_k, n_vocab))),
            top_p=tf.fill([size], np.float32(settings.top_p)),
            repetition_penalty=tf.fill([size], np.float32(settings.repetition_penalty)),
            min_length=tf.fill([size], np.int32(min(settings.min_length, 2**31 - 1))),
            end=tf.constant(self.end),
            bias=tf.constant(bias),
        )
        self.noise = [np.random.Generator(np.random.Philox(key=[seed, i or 0])) for i in indices]
        seen = np.zeros([size, n_vocab], bool)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
        self.seen = tf.constant(seen)
        self.window = [0] * size  # where the part of each row that the model sees begins
        self.cache = None

    def step(self, limit=CHUNK):
        """Generate up to `limit` tokens a row; returns the new ones of each row, [] if finished.

        The end token is not among them; `finished` says which rows are done.
        """
        if self.cache is None or self._seen_lengths().max() > self.model.config.n_ctx:
            new, counts = self._process_windows()
        else:
            new, counts = self._decode(min(limit, CHUNK))
        fresh = []
        for row, tokens in enumerate(self.rows):
            if self.finished[row]:
                fresh.append([])
                continue
            added = new[row, : min(counts, self.length - self._generated()[row])].tolist()
            if self.end in added:
                added = added[: added.index(self.end)]
                self.finished[row] = True
            tokens += added
            self.finished[row] |= self._generated()[row] >= self.length
            fresh.append(added)
        return fresh

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

    def _process_windows(self):
        """Read all windows in one pass, move those that are full, choose one token a row."""
        n_ctx = self.model.config.n_ctx
        for row, tokens in enumerate(self.rows):
            if len(tokens) - self.window[row] > n_ctx:
                first_time = self.cache is None
                self.window[row] = len(tokens) - (n_ctx if first_time else max(1, n_ctx // 2))
        lengths = self._seen_lengths()
        padded = np.zeros([len(self.rows), lengths.max()], np.int32)
        for row, length in enumerate(lengths):
            start = self.window[row]
            padded[row, :length] = self.rows[row][start : start + length]
        logits, self.cache = self.programs.logits_after(padded, lengths)
        self._grow_cache(min(n_ctx, int(lengths.max() + self.length - self._generated().min())))
        uniform = self._uniform(1)
        chosen = self.programs.first(
            logits, uniform[:, 0], self.seen, self._generated(), self.rules
        ).numpy()
        self.seen |= tf.one_hot(chosen, self.model.config.n_vocab, True, False, dtype=tf.bool)
        return chosen[:, None], 1

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

    def _decode(self, limit):
        """Run the compiled loop for up to `limit` tokens, no further than the fullest window."""
        lengths = self._seen_lengths()
        generated = self._generated()
        most = int((self.length - generated[~self.finished]).max())
        # a row's last token has position length - 1 and is not in the cache yet
        steps = min(limit, most, self.model.config.n_ctx - int(lengths.max()) + 1)
        noise = np.zeros([len(self.rows), CHUNK], np.float32)
        noise[:, :steps] = self._uniform(steps)
        token = np.array([tokens[-1] for tokens in self.rows], np.int32)
        out, done, self.cache, self.seen = self.programs.run(
            self.cache,
            token,
            lengths - 1,
            generated,
            self.finished,
            self.seen,
            noise,
            np.int32(steps),
            self.rules,
        )
        return out.numpy(), int(done)

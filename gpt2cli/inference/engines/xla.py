"""The network as TensorFlow runs it: on a GPU, and of a model in training.

The loop that generates is one compiled program (XLA): keys and values lie in buffers made once,
each row writes its next token at its own slot, and a finished mask ends the loop when all rows have
ended. Prompts are padded at the right, so a token's slot is its position, whatever else is in the
batch.
"""

from functools import partial

import numpy as np

from gpt2cli.inference import sampling
from gpt2cli.inference.engines import xla_rules as graph_rules
from gpt2cli.model import kernels
from gpt2cli.model import network as model
from gpt2cli.tensorflow import tf

SMALLEST_CACHE = 64  # slots; caches double from here, one compilation each


def step(network, cache, token, position):
    """One token more a row: token [N] at its slot position [N].

    Args:
        network: a GPT2.
        cache: of each layer keys and values [N, H, S, D], filled before `position`.

    Returns:
        Logits [N, V] and the new cache.
    """
    rows, slots = tf.shape(token)[0], tf.shape(cache[0][0])[2]
    x = network.embed(token[None], position)  # [1, N, E]
    apart = tf.where(tf.eye(rows) > 0, 0.0, kernels.MASKED)
    seen = tf.where(tf.range(slots) < position[:, None], 0.0, kernels.MASKED)[:, None, None]
    x, new = network.layers(x, [model.Past(apart, seen, *pair) for pair in cache])
    heads = tf.range(network.config.n_head)
    places = tf.meshgrid(tf.range(rows), heads, indexing="ij")  # [N, H]
    places = tf.stack([*places, tf.broadcast_to(position[:, None], tf.shape(places[0]))], -1)

    def store(kept, added):  # [N, H, S, D], [1, H, N, D]
        return tf.tensor_scatter_nd_update(kept, places, tf.transpose(added[0], [1, 0, 2]))

    return network.head(x[0]), tf.nest.map_structure(store, cache, new)


def run(network, cache, token, position, finished, past, noise, steps, rules):
    """Generate up to `steps` tokens a row.

    Args:
        network: a GPT2.
        cache: of each layer [N, H, S, D], filled before `position`.
        token, position: [N], the token to feed next and its slot.
        finished: [N], rows that have ended; they write nothing that counts.
        past: graph_rules.Past, `token` included.
        noise: [N, M], random numbers in [0, 1); steps <= M.
        rules: graph_rules.Rules.

    Returns:
        The arrays of sampling.Chosen, of which the first `steps done` [N, M] count, steps done, and
        the cache.
    """
    size = tf.shape(noise)[1]
    kept = min(sampling.LIKELIEST, network.config.n_vocab)

    def one(i, cache, token, finished, past, told):
        logits, cache = step(network, cache, token, position + i)
        uniform = tf.gather(noise, i, axis=1)
        chosen, past = graph_rules.choose(logits, uniform, past, rules)
        here = tf.range(size) == i
        now = chosen, *graph_rules.logprobs_of(logits, chosen, kept, rules.logprobs)

        def put(old, new):  # [N, M, ...], [N, ...]
            shape = [1, size, *[1] * (len(old.shape) - 2)]
            return tf.where(tf.reshape(here, shape), new[:, None], old)

        told = tf.nest.map_structure(put, told, now)
        return i + 1, cache, chosen, finished | (chosen == rules.end), past, told

    def go_on(i, cache, token, finished, *rest):
        return (i < steps) & ~tf.reduce_all(finished)

    flat, deep = tf.shape(noise), [*tf.unstack(tf.shape(noise)), kept]
    empty = tf.zeros(flat, tf.int32), tf.zeros(flat), tf.zeros(deep, tf.int32), tf.zeros(deep)
    start = [tf.constant(0), cache, token, finished, past, empty]
    i, cache, _, _, _, told = tf.while_loop(go_on, one, start)
    return told, i, cache


def read(network, tokens, lengths):
    """Rows [N, T], padded at the right -> logits [N, V] after the `lengths` [N] tokens; cache."""
    x, cache = network.hidden(tokens)
    return network.head(tf.gather(x, lengths - 1, batch_dims=1)), cache


def sums(network, inputs, targets, mask):
    """Ids [B, T] and their weights -> the sum of their losses in nats, and of their hits."""
    nats, hits = network.losses(network.hidden(inputs)[0], targets)
    return tf.reduce_sum(nats * mask), tf.reduce_sum(hits * mask)


class Graph:
    """A network to read, to continue and to score texts with. Each function is traced once.

    Args:
        network: a model.GPT2, whose variables may change between two calls.
    """

    needs_full_batches = True  # the loop is compiled for each number of rows

    def __init__(self, network):
        self.config = network.config

        def compiled(function, *signature, xla=False):
            return tf.function(
                partial(function, network),
                input_signature=signature,
                autograph=False,
                jit_compile=xla,
            )

        def array(kind, rank):
            return tf.TensorSpec([None] * rank, kind)

        ints, batch = array(tf.int32, 1), array(tf.int32, 2)
        head = self.config.n_embd // self.config.n_head
        slots = tf.TensorSpec([None, self.config.n_head, None, head], network.dtype)
        cache = [(slots, slots)] * self.config.n_layer
        self._call = compiled(lambda network, tokens: network(tokens), batch)
        self._sums = compiled(sums, batch, batch, array(tf.float32, 2))
        self._read = compiled(read, batch, ints)
        self._feed = compiled(step, cache, ints, ints, xla=True)
        self._run = compiled(
            *(run, cache, ints, ints, array(tf.bool, 1), graph_rules.PAST_SPEC),
            *(array(tf.float32, 2), array(tf.int32, 0), graph_rules.RULES_SPEC),
            xla=True,
        )

    def read_apart(self):
        """Nothing: reading does not move a cache here; see lite.Lite."""

    def logits(self, tokens):
        """Ids of one row, up to n_ctx -> float32 [T, V]."""
        return self._call(np.array([tokens], np.int32))[0].numpy()

    def sums(self, inputs, targets, mask):
        """Ids [B, T] and their weights -> the sum of their losses in nats, and of their hits."""
        return self._sums(inputs, targets, mask)

    def read(self, rows, slots):
        """Rows of ids -> logits [N, V] after them, and their cache, of at least so many slots."""
        lengths = np.array([len(row) for row in rows], np.int32)
        padded = np.zeros([len(rows), lengths.max()], np.int32)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        logits, cache = self._read(padded, lengths)
        return logits, _wide(cache, slots, self.config.n_ctx)

    def feed(self, cache, token, position):
        """One token more a row: logits [N, V] and the new cache."""
        return self._feed(cache, token, position)

    def run(self, cache, rows, position, finished, generated, noise, rules, logprobs):
        """As `sampling.run`, in one compiled loop."""
        steps, n_vocab = noise.shape[1], self.config.n_vocab
        ngrams = any(row.no_repeat_ngram for row in rules)
        padded = np.zeros([len(rows), sampling.CHUNK], np.float32)  # one shape, one compilation
        padded[:, :steps] = noise
        told, done, cache = self._run(
            cache,
            np.array([row[-1] for row in rows], np.int32),
            position,
            finished,
            graph_rules.past_of(rows, generated, n_vocab, steps, ngrams and self.config.n_ctx),
            padded,
            np.int32(steps),
            graph_rules.tensors_of(rules, logprobs.any(), n_vocab),
        )
        return sampling.Chosen(*(array.numpy()[:, : int(done)] for array in told), cache)

    def arrange(self, cache, new, sources):
        """The cache of other rows.

        Args:
            cache, new: caches, of which one may be None.
            sources: for each row the number of one in `cache` or, counted on, in `new`; or -1 for
                a place that holds nothing.
        """
        both = [c for c in (cache, new) if c is not None]
        slots = max(c[0][0].shape[2] for c in both)
        both = [_wide(c, slots, slots) for c in both]
        places = np.maximum(np.array(sources, np.int32), 0)
        return tf.nest.map_structure(lambda *rows: tf.gather(tf.concat(rows, 0), places), *both)


def cache_sizes(n_ctx):
    """The numbers of slots that caches have, of which each is compiled."""
    sizes = [n_ctx]
    while sizes[0] > SMALLEST_CACHE:
        sizes.insert(0, max(SMALLEST_CACHE, 1 << (sizes[0] - 1).bit_length() - 1))
    return sizes


def _wide(cache, needed, most):
    """The cache with room for as many slots as are needed, in one of few sizes."""
    size = max(SMALLEST_CACHE, 1 << (needed - 1).bit_length())
    more = min(size, most) - cache[0][0].shape[2]
    if more <= 0:
        return cache
    padding = [[0, 0], [0, 0], [0, more], [0, 0]]
    return tf.nest.map_structure(lambda kept: tf.pad(kept, padding), cache)

"""The engine for a GPU, and for a model in training: TensorFlow runs the network.

The loop that generates is one compiled program (XLA). Keys and values are in buffers made once,
each row writes its next token at its own slot, and the loop ends when all rows have finished.
Prompts are padded on the right, so a token's slot is its position, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2cli.inference import sampling
from gpt2cli.inference.engines import xla_rules
from gpt2cli.inference.engines.prefixes import Prefixes
from gpt2cli.inference.sampling import CHUNK, LIKELIEST, Chosen
from gpt2cli.model.network import GPT2, KeysAndValues, Past
from gpt2cli.model.weights import MASKED
from gpt2cli.tensorflow import tf

if TYPE_CHECKING:
    from gpt2cli.inference.lookup import Lookup

SMALLEST_CACHE = 64  # slots; the sizes of caches double from here, one compilation each

Cache = list[KeysAndValues]  # a pair per layer, each [N, H, S, D]


def step(
    network: GPT2, cache: Cache, token: tf.Tensor, position: tf.Tensor
) -> tuple[tf.Tensor, Cache]:
    """Feed one more token per row; return logits [N, V] and the new cache.

    Args:
        network: the GPT2.
        cache: filled before `position`.
        token: [N].
        position: [N], its slot.
    """
    rows, slots = tf.shape(token)[0], tf.shape(cache[0][0])[2]
    x = network.embed(token[None], position)  # [1, N, E]
    apart = tf.where(tf.eye(rows) > 0, 0.0, MASKED)
    seen = tf.where(tf.range(slots) < position[:, None], 0.0, MASKED)[:, None, None]
    past = [Past(apart, seen, keys, tf.linalg.matrix_transpose(values)) for keys, values in cache]
    x, new = network.layers(x, past)
    heads = tf.range(network.config.n_head)
    places = tf.meshgrid(tf.range(rows), heads, indexing="ij")  # [N, H]
    places = tf.stack([*places, tf.broadcast_to(position[:, None], tf.shape(places[0]))], -1)

    def store(kept: tf.Tensor, added: tf.Tensor) -> tf.Tensor:  # [N, H, S, D], [1, H, N, D]
        return tf.tensor_scatter_nd_update(kept, places, tf.transpose(added[0], [1, 0, 2]))

    return network.head(x[0]), tf.nest.map_structure(store, cache, new)


def run(
    network: GPT2,
    cache: Cache,
    token: tf.Tensor,
    position: tf.Tensor,
    finished: tf.Tensor,
    past: xla_rules.Past,
    noise: tf.Tensor,
    steps: tf.Tensor,
    rules: xla_rules.Rules,
) -> tuple[tuple[tf.Tensor, ...], tf.Tensor, Cache]:
    """Generate up to `steps` tokens per row.

    Args:
        network: the GPT2.
        cache: filled before `position`.
        token: [N], the token to feed next.
        position: [N], its slot.
        finished: bool [N], rows that have ended; nothing they write counts.
        past: the rows, including `token`.
        noise: [N, M], random numbers in [0, 1).
        steps: int32 [], up to M.
        rules: how each row chooses.

    Returns:
        The first four fields of sampling.Chosen, each [N, M, ...]; the number of steps done, of
        which the results count; and the new cache.
    """
    size = tf.shape(noise)[1]
    kept = min(LIKELIEST, network.config.n_vocab)

    def one(*state: Any) -> tuple[Any, ...]:
        i, cache, token, finished, past, found = state
        logits, cache = step(network, cache, token, position + i)
        uniform = tf.gather(noise, i, axis=1)
        chosen, past = xla_rules.choose(logits, uniform, past, rules)
        here = tf.range(size) == i
        now = chosen, *xla_rules.logprobs_of(logits, chosen, kept, rules.logprobs)

        def put(old: tf.Tensor, new: tf.Tensor) -> tf.Tensor:  # [N, M, ...], [N, ...]
            shape = [1, size, *[1] * (len(old.shape) - 2)]
            return tf.where(tf.reshape(here, shape), new[:, None], old)

        found = tf.nest.map_structure(put, found, now)
        finished |= tf.gather(rules.ends, chosen)
        return i + 1, cache, chosen, finished, past, found

    def is_growing(*state: Any) -> tf.Tensor:
        return (state[0] < steps) & ~tf.reduce_all(state[3])

    flat, deep = tf.shape(noise), [*tf.unstack(tf.shape(noise)), kept]
    empty = tf.zeros(flat, tf.int32), tf.zeros(flat), tf.zeros(deep, tf.int32), tf.zeros(deep)
    start = [tf.constant(0), cache, token, finished, past, empty]
    i, cache, _, _, _, found = tf.while_loop(is_growing, one, start)
    return found, i, cache


def read(network: GPT2, tokens: tf.Tensor, lengths: tf.Tensor) -> tuple[tf.Tensor, Cache]:
    """Return logits [N, V] after rows [N, T] of `lengths` [N], padded on the right, and a cache."""
    x, cache = network.hidden(tokens)
    return network.head(tf.gather(x, lengths - 1, batch_dims=1)), cache


def sums(
    network: GPT2, inputs: tf.Tensor, targets: tf.Tensor, mask: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the weighted sums of losses and of hits; see Engine."""
    nats, hits = network.losses(network.hidden(inputs)[0], targets)
    return tf.reduce_sum(nats * mask), tf.reduce_sum(hits * mask)


class XlaEngine:
    """An Engine for a GPU. Each of its functions is traced once.

    Args:
        network: the GPT2; its variables may change between two calls.
    """

    looks_up = False
    needs_full_batches = True  # the loop is compiled for each number of rows

    def __init__(self, network: GPT2) -> None:
        self.config = network.config
        self.prefixes = Prefixes(0)
        self.cache_sizes: Sequence[int] = cache_sizes(self.config.n_ctx)

        def compiled(function: Callable[..., Any], *signature: Any, xla: bool = False) -> Any:
            return tf.function(
                partial(function, network),
                input_signature=signature,
                autograph=False,
                jit_compile=xla,
            )

        def array(dtype: tf.DType, rank: int) -> tf.TensorSpec:
            return tf.TensorSpec([None] * rank, dtype)

        ints, batch = array(tf.int32, 1), array(tf.int32, 2)
        head = self.config.n_embd // self.config.n_head
        slots = tf.TensorSpec([None, self.config.n_head, None, head], network.dtype)
        cache = [(slots, slots)] * self.config.n_layer
        self._call = compiled(lambda network, tokens: network(tokens), batch)
        self._sums = compiled(sums, batch, batch, array(tf.float32, 2))
        self._read = compiled(read, batch, ints)
        self._feed = compiled(step, cache, ints, ints, xla=True)
        self._run = compiled(
            run,
            cache,
            ints,  # token
            ints,  # position
            array(tf.bool, 1),
            xla_rules.PAST_SPEC,
            array(tf.float32, 2),
            array(tf.int32, 0),
            xla_rules.RULES_SPEC,
            xla=True,
        )

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return float32 [T, V]; see Engine."""
        return self._call(np.array([tokens], np.int32))[0].numpy()

    def sums(
        self, inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the weighted sums of losses and of hits; see Engine."""
        return self._sums(inputs, targets, mask)

    def read(self, rows: Sequence[np.ndarray], slots: int) -> tuple[tf.Tensor, Cache]:
        """Return logits [N, V] and a cache of at least `slots` slots; see Engine."""
        lengths = np.array([len(row) for row in rows], np.int32)
        padded = np.zeros([len(rows), lengths.max()], np.int32)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        logits, cache = self._read(padded, lengths)
        return logits, _wide(cache, slots, self.config.n_ctx)

    def feed(
        self, cache: Cache, token: np.ndarray, position: np.ndarray
    ) -> tuple[tf.Tensor, Cache]:
        """Return logits [N, V] and the new cache; see Engine."""
        return self._feed(cache, token, position)

    def run(
        self,
        cache: Cache,
        rows: Sequence[Sequence[int]],
        position: np.ndarray,
        finished: np.ndarray,
        generated: np.ndarray,
        noise: np.ndarray,
        rules: Sequence[sampling.Rules],
        logprobs: np.ndarray,
        lookup: Lookup | None = None,
    ) -> Chosen:
        """Generate tokens in one compiled loop; arguments and result as of `sampling.run`.

        `lookup` is not used.
        """
        steps, n_vocab = noise.shape[1], self.config.n_vocab
        history = self.config.n_ctx if any(row.no_repeat_ngram for row in rules) else 0
        padded = np.zeros([len(rows), CHUNK], np.float32)  # one shape, one compilation
        padded[:, :steps] = noise
        found, done, cache = self._run(
            cache,
            np.array([row[-1] for row in rows], np.int32),
            position,
            finished,
            xla_rules.past_of(rows, generated, n_vocab, steps, history),
            padded,
            np.int32(steps),
            xla_rules.tensors_of(rules, bool(logprobs.any()), n_vocab),
        )
        tokens, own, others, beside = (array.numpy()[:, : int(done)] for array in found)
        return Chosen(tokens, own, others, beside, cache)

    def arrange(self, cache: Cache | None, new: Cache | None, sources: Sequence[int]) -> Cache:
        """Return the cache of other rows; see Engine."""
        both = [c for c in (cache, new) if c is not None]
        slots = max(c[0][0].shape[2] for c in both)
        both = [_wide(c, slots, slots) for c in both]
        places = np.maximum(np.array(sources, np.int32), 0)
        return tf.nest.map_structure(lambda *rows: tf.gather(tf.concat(rows, 0), places), *both)


def cache_sizes(n_ctx: int) -> list[int]:
    """Return the sizes in slots that caches may have; each costs a compilation."""
    sizes = [n_ctx]
    while sizes[0] > SMALLEST_CACHE:
        sizes.insert(0, max(SMALLEST_CACHE, 1 << (sizes[0] - 1).bit_length() - 1))
    return sizes


def _wide(cache: Cache, needed: int, most: int) -> Cache:
    """Return the cache with at least `needed` slots, but not above `most`, in one of few sizes."""
    size = max(SMALLEST_CACHE, 1 << (needed - 1).bit_length())
    more = min(size, most) - cache[0][0].shape[2]
    if more <= 0:
        return cache
    padding = [[0, 0], [0, 0], [0, more], [0, 0]]
    return tf.nest.map_structure(lambda kept: tf.pad(kept, padding), cache)

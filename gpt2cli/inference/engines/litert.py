"""The engine for a CPU: runs the network as the programs of litert_program.py.

It is faster than XLA there (benchmarks/README.md), and compiles nothing for a batch or a length.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from gpt2cli.inference import sampling
from gpt2cli.inference.engines.litert_program import Program
from gpt2cli.inference.sampling import Chosen
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import MASKED, Values, weight_shapes

SLOTS = 128  # a cache grows by this many
ROWS = 256  # when a text is scored, the logits of this many tokens are in memory at once


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """Allow one call at a time, because all threads share a program's memory."""

    @functools.wraps(method)
    def locked(self: LitertEngine, *arguments: Any) -> Any:
        with self._lock:
            return method(self, *arguments)

    return locked


class Cache:
    """The keys and values of N rows, in arrays or in the memory of a Program.

    Attributes:
        seen: float32 [N, 1, 1, S], 0 for the slots that contain a token, MASKED for the others.
        used: number of slots up to the last that contains a token, in any row.
        arrays: an input's name -> [N, H, used, D]; empty while they are in the program.
    """

    def __init__(self, seen: np.ndarray, used: int, arrays: dict[str, np.ndarray]) -> None:
        self.seen, self.used, self.arrays = seen, used, arrays


class LitertEngine:
    """An Engine for a CPU.

    Args:
        config: the model's sizes.
        stored: returns a weight's values.
        precision: "float32"; "bfloat16": weights rounded to it, computed in float32, because
            XNNPACK has no bfloat16 product; "int8": matrices in eight bits with a scale per column,
            multiplied as integers with activations that get eight bits per token, and float32 for
            everything else.
    """

    needs_full_batches = False
    cache_sizes: Sequence[int] = (64,)  # any one

    def __init__(self, config: ModelConfig, stored: Values, precision: str = "float32") -> None:
        self.config = config
        if precision == "bfloat16":
            stored = _rounded(stored)
        self._make_layers = lambda: Program("layers", config, stored, precision)
        self._layers = self._reader = self._make_layers()
        self._head = Program("head", config, stored, precision)
        self._tokens, self._positions = (
            stored(*table) for table in list(weight_shapes(config).items())[:2]
        )
        depth = range(config.n_layer)
        # in the order of the outputs
        self._halves = [f"{half}{layer}" for layer in depth for half in ("keys", "values")]
        self._lock = threading.RLock()
        # returns the Cache that is in the program's memory, as long as anybody needs it
        self._resident: Callable[[], Cache | None] = _nothing

    @_alone
    def read_apart(self) -> None:
        """Read with a second program from now on, so that a cache can stay in the first.

        To move a cache takes as long as one or two steps of all its rows. The second program needs
        as much memory as the weights of the layers.
        """
        self._reader = self._make_layers()

    @_alone
    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return float32 [T, V]; see Engine."""
        x = self._read(np.asarray(tokens))[0]
        logits = np.empty([len(x), self.config.n_vocab], np.float32)
        for start in range(0, len(x), ROWS):
            part = slice(start, start + ROWS)
            logits[part] = self._head(x=x[part])[0]
        return logits

    @_alone
    def sums(
        self, inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray
    ) -> tuple[float, float]:
        """Return the weighted sums of losses and of hits; see Engine."""
        loss, hits = 0.0, 0.0
        for row, wanted, weight in zip(inputs, targets, mask, strict=True):
            x = self._read(row)[0]
            for start in range(0, len(x), ROWS):
                part = slice(start, start + ROWS)
                nats, hit = sampling.losses(self._head(x=x[part])[0], wanted[part])
                loss += float(np.sum(nats * weight[part]))
                hits += float(np.sum(hit * weight[part]))
        return loss, hits

    @_alone
    def read(self, rows: Sequence[np.ndarray], slots: int) -> tuple[np.ndarray, Cache]:
        """Return logits and Cache; see Engine. `slots` is not used: a cache grows with its rows.

        Rows are read one after another, and equal rows once. So a row's numbers are the same to the
        last bit in any batch; side by side the rows would be read only a little faster.
        """
        head, used = self.config.n_embd // self.config.n_head, max(map(len, rows))
        shape = len(rows), self.config.n_head, used, head
        arrays = {half: np.zeros(shape, np.float32) for half in self._halves}
        seen = np.full([len(rows), 1, 1, _room(used + 1)], MASKED, np.float32)
        equal: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            equal.setdefault(tuple(row), []).append(number)
        last = np.empty([len(rows), self.config.n_embd], np.float32)
        for ids, numbers in equal.items():
            x, new = self._read(np.array(ids))
            last[numbers] = x[-1]
            for half, array in zip(self._halves, new, strict=True):
                arrays[half][numbers, :, : len(ids)] = array
            seen[numbers, ..., : len(ids)] = 0
        return self._head(x=last)[0], Cache(seen, used, arrays)

    @_alone
    def feed(
        self, cache: Cache, token: np.ndarray, position: np.ndarray
    ) -> tuple[np.ndarray, Cache]:
        """Return logits [N, V] and the same Cache; see Engine."""
        self._enter(cache, int(position.max()) + 1)
        rows = np.arange(len(token))
        x, *new = self._layers(
            x=self._embed(token, position),
            beside=_mask(np.eye(len(token), dtype=bool)),
            seen=cache.seen,
        )
        for half, array in zip(self._halves, new, strict=True):
            self._layers.input(half)[rows, :, position] = array[0].swapaxes(0, 1)
        cache.seen[rows, 0, 0, position] = 0
        cache.used = max(cache.used, int(position.max()) + 1)
        return self._head(x=x[0])[0], cache

    @_alone
    def arrange(self, cache: Cache | None, new: Cache | None, sources: Sequence[int]) -> Cache:
        """Return the Cache of other rows; see Engine."""
        both, chosen = [c for c in (cache, new) if c], np.array(sources)
        rows = [(c, number) for c in both for number in range(len(c.seen))]
        if len(both) == 1 and np.array_equal(chosen, range(len(rows))):
            return both[0]
        lengths = np.concatenate([(c.seen == 0).sum((1, 2, 3)) for c in both])
        lengths = np.where(chosen < 0, 0, lengths[chosen])
        used = max(1, int(lengths.max()))
        slots = _room(used + 1)
        seen = _mask(np.arange(slots) < lengths[:, None, None, None])
        if cache and self._resident() is cache:
            has_room = slots <= cache.seen.shape[-1] <= 2 * slots
            if has_room and len(chosen) == len(cache.seen):
                self._arrange_in_place(len(cache.seen), new, chosen, lengths)
                cache.seen, cache.used = _widened(seen, cache.seen.shape[-1]), used
                return cache
            self._leave()
        shape = len(chosen), self.config.n_head, used, self.config.n_embd // self.config.n_head
        arrays = {half: np.zeros(shape, np.float32) for half in self._halves}
        for place, length in enumerate(lengths):
            source, number = rows[chosen[place]]
            for half, array in arrays.items():
                array[place, :, :length] = source.arrays[half][number, :, :length]
        return Cache(seen, used, arrays)

    def _arrange_in_place(
        self, count: int, new: Cache | None, sources: np.ndarray, lengths: np.ndarray
    ) -> None:
        """Arrange rows in the program's memory, which has `count` rows and enough room."""
        added = new.arrays if new else {}
        old = np.where((sources >= 0) & (sources < count), sources, np.arange(count))
        for half in self._halves:
            memory = self._layers.input(half)
            if not np.array_equal(old, range(count)):
                memory[:, :, : lengths.max()] = memory[old, :, : lengths.max()]
            for place in np.flatnonzero(sources >= count):
                length = lengths[place]
                memory[place, :, :length] = added[half][sources[place] - count, :, :length]

    def run(self, *arguments: Any, **more: Any) -> Chosen:
        """Generate tokens, as `sampling.run`."""
        return sampling.run(self.feed, self.config.n_vocab, *arguments, **more)

    def _embed(self, tokens: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return the sums of token and position embeddings: [N], [N] -> [1, N, E]."""
        return (self._tokens[tokens] + self._positions[position])[None].astype(np.float32)

    def _read(self, row: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return x [T, E] of the ids [T] of one row, and its keys and values, each [1, H, T, D]."""
        if self._reader is self._layers:
            self._leave()
        head = self.config.n_embd // self.config.n_head
        nothing = np.zeros([1, self.config.n_head, 1, head], np.float32)  # one for all tokens
        place = np.arange(len(row))
        x, *new = self._reader(
            x=self._embed(row, place),
            beside=_mask(place[:, None] >= place),
            seen=_mask(np.zeros([1, 1, 1, 1], bool)),
            **dict.fromkeys(self._halves, nothing),
        )
        return x[0], new

    def _enter(self, cache: Cache, needed: int) -> None:
        """Move a cache into the program's memory, with room for `needed` slots."""
        if self._resident() is cache and needed <= cache.seen.shape[-1]:
            return
        self._leave()
        cache.seen = _widened(cache.seen, _room(needed))
        rows, *_, slots = cache.seen.shape
        shape = rows, self.config.n_head, slots, self.config.n_embd // self.config.n_head
        self._layers.reshape(
            x=(1, rows, self.config.n_embd),
            beside=(rows, rows),
            seen=cache.seen.shape,
            **dict.fromkeys(self._halves, shape),
        )
        for half in self._halves:
            memory = self._layers.input(half)
            memory[:, :, : cache.used] = cache.arrays.pop(half)
            memory[:, :, cache.used :] = 0  # it may contain NaN
        self._resident = weakref.ref(cache)

    def _leave(self) -> None:
        """Move the cache out of the program's memory, before the program does other work."""
        cache = self._resident()
        if cache is not None:
            cache.arrays = {
                half: self._layers.input(half)[:, :, : cache.used].copy() for half in self._halves
            }
        self._resident = _nothing


def _nothing() -> None:
    return None


def _rounded(stored: Values) -> Values:
    """Return the same function with its values rounded to bfloat16."""
    short = ml_dtypes.bfloat16
    return lambda name, shape: np.asarray(stored(name, shape)).astype(short).astype(np.float32)


def _room(slots: int) -> int:
    """Return the number of slots rounded up to a multiple of SLOTS."""
    return math.ceil(slots / SLOTS) * SLOTS


def _widened(seen: np.ndarray, slots: int) -> np.ndarray:
    """Return [N, 1, 1, S] with masked slots added, so that S is at least `slots`."""
    more = [(0, 0), (0, 0), (0, 0), (0, max(0, slots - seen.shape[-1]))]
    return np.pad(seen, more, constant_values=MASKED)


def _mask(looks: np.ndarray) -> np.ndarray:
    """Return float32: 0 where one token looks at another, MASKED elsewhere."""
    return np.where(looks, 0, MASKED).astype(np.float32)

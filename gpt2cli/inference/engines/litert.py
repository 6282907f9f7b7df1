"""The network on a CPU, by the programs of program.py: texts are read, continued and scored.

Faster than XLA there (benchmarks/README.md), and nothing is compiled for a batch or a length.
"""

import functools
import threading
import weakref

import numpy as np

from gpt2cli.inference import sampling
from gpt2cli.inference.engines import litert_program as program
from gpt2cli.inference.engines.litert_program import Program
from gpt2cli.model import kernels
from gpt2cli.model import network as model
from gpt2cli.tensorflow import tf

SLOTS = 128  # a cache grows by so many
ROWS = 256  # tokens whose logits exist at once when a text is scored


def _alone(method):
    """One call at a time, from whichever thread: a program has one memory."""

    @functools.wraps(method)
    def locked(self, *arguments):
        with self._lock:
            return method(self, *arguments)

    return locked


class Cache:
    """The keys and values of N rows; in arrays, or in the memory of a Program.

    Attributes:
        seen: float32 [N, 1, 1, S], 0 for the slots that hold a token, else kernels.MASKED.
        used: slots from which on no row holds a token.
        arrays: input's name -> [N, H, used, D]; None while the program holds them.
    """

    def __init__(self, seen, used, arrays):
        self.seen, self.used, self.arrays = seen, used, arrays


class Lite:
    """A network to read, to continue and to score texts with, on a CPU.

    Args:
        config: ModelConfig.
        stored: function of a weight's name and shape that gives its values.
        precision: "float32"; "bfloat16": weights rounded to it, computed with in float32, because
            XNNPACK has no such product; "int8": matrices in eight bits with a scale a column,
            multiplied as integers with activations that get eight bits a token, all else float32.
    """

    needs_full_batches = False  # any number of rows is as good as another

    def __init__(self, config, stored, precision="float32"):
        self.config = config
        if precision == "bfloat16":
            stored = _rounded(stored)
        self._make_layers = lambda: Program(program.layers, config, stored, precision)
        self._layers = self._reader = self._make_layers()
        self._head = Program(program.head, config, stored, precision)
        wpe = list(model.weight_shapes(config).items())[1]
        self._positions = np.asarray(stored(*wpe), np.float32)
        depth = range(config.n_layer)
        # in the order of the outputs
        self._halves = [f"{half}{layer}" for layer in depth for half in ("keys", "values")]
        self._lock = threading.RLock()
        self._resident = _nothing  # gives the Cache that the program holds, while it is wanted

    @_alone
    def read_apart(self):
        """From now on read by a program of its own, so that a cache stays where it is meanwhile.

        For rows that join others: moving these takes as long as a step or two of all of them. It
        takes the memory of the layers' weights once more.
        """
        self._reader = self._make_layers()

    @_alone
    def logits(self, tokens):
        """Ids of one row, up to n_ctx -> float32 [T, V]."""
        x = self._read(np.asarray(tokens))[0]
        logits = np.empty([len(x), self.config.n_vocab], np.float32)
        for start in range(0, len(x), ROWS):
            part = slice(start, start + ROWS)
            logits[part] = self._head(x=x[part])[0]
        return logits

    @_alone
    def sums(self, inputs, targets, mask):
        """Ids [B, T] and their weights -> the sum of their losses in nats, and of their hits."""
        loss, hits = 0.0, 0.0
        for row, wanted, weight in zip(inputs, targets, mask, strict=True):
            x = self._read(row)[0]
            for start in range(0, len(x), ROWS):
                part = slice(start, start + ROWS)
                found = model.losses(self._head(x=x[part])[0], wanted[part])
                loss += float(np.sum(found[0] * weight[part]))
                hits += float(np.sum(found[1] * weight[part]))
        return loss, hits

    @_alone
    def read(self, rows, slots):
        """Rows of ids -> logits [N, V] after them, and their Cache.

        One after another, and equal ones once: so a row's numbers are the same to the last bit
        whatever its batch, and side by side they would be little faster.

        Args:
            slots: not used; a cache grows with its rows.
        """
        head, used = self.config.n_embd // self.config.n_head, max(map(len, rows))
        shape = len(rows), self.config.n_head, used, head
        arrays = {half: np.zeros(shape, np.float32) for half in self._halves}
        seen = np.full([len(rows), 1, 1, _room(used + 1)], kernels.MASKED, np.float32)
        equal = {}
        for number, row in enumerate(rows):
            equal.setdefault(tuple(row), []).append(number)
        last = np.empty([len(rows), self.config.n_embd], np.float32)
        for row, numbers in equal.items():
            x, new = self._read(np.array(row))
            last[numbers] = x[-1]
            for half, array in zip(self._halves, new, strict=True):
                arrays[half][numbers, :, : len(row)] = array
            seen[numbers, ..., : len(row)] = 0
        return self._head(x=last)[0], Cache(seen, used, arrays)

    @_alone
    def feed(self, cache, tokens, position):
        """One token [N] more a row, at its slot position [N]; logits [N, V] and the Cache."""
        self._enter(cache, int(position.max()) + 1)
        rows = np.arange(len(tokens))
        x, *new = self._layers(
            x=self._embed(tokens, position),
            beside=_mask(np.eye(len(tokens), dtype=bool)),
            seen=cache.seen,
        )
        for half, array in zip(self._halves, new, strict=True):
            self._layers.input(half)[rows, :, position] = array[0].swapaxes(0, 1)
        cache.seen[rows, 0, 0, position] = 0
        cache.used = max(cache.used, int(position.max()) + 1)
        return self._head(x=x[0])[0], cache

    @_alone
    def arrange(self, cache, new, sources):
        """The Cache of other rows.

        Args:
            cache, new: Caches, of which one may be None; both are used up.
            sources: for each row the number of one in `cache` or, counted on, in `new`; or -1 for
                a place that holds nothing.
        """
        both, sources = [c for c in (cache, new) if c], np.array(sources)
        rows = [(c, number) for c in both for number in range(len(c.seen))]
        if len(both) == 1 and np.array_equal(sources, range(len(rows))):
            return both[0]
        lengths = np.concatenate([(c.seen == 0).sum((1, 2, 3)) for c in both])
        lengths = np.where(sources < 0, 0, lengths[sources])
        used = max(1, int(lengths.max()))
        slots = _room(used + 1)
        seen = _mask(np.arange(slots) < lengths[:, None, None, None])
        stays = cache and self._resident() is cache and len(sources) == len(cache.seen)
        if stays and slots <= cache.seen.shape[-1] <= 2 * slots:
            seen = _widened(seen, cache.seen.shape[-1])
            self._arrange_in_place(len(cache.seen), new, sources, lengths)
            cache.seen, cache.used = seen, used
            return cache
        if cache and self._resident() is cache:
            self._leave()
        shape = len(sources), self.config.n_head, used, self.config.n_embd // self.config.n_head
        arrays = {half: np.zeros(shape, np.float32) for half in self._halves}
        for place, length in enumerate(lengths):
            source, number = rows[sources[place]]
            for half, array in arrays.items():
                array[place, :, :length] = source.arrays[half][number, :, :length]
        return Cache(seen, used, arrays)

    def _arrange_in_place(self, count, new, sources, lengths):
        """`arrange` in the program's memory, which has `count` rows and room enough."""
        old = np.where((sources >= 0) & (sources < count), sources, np.arange(count))
        for half in self._halves:
            memory = self._layers.input(half)
            if not np.array_equal(old, range(count)):
                memory[:, :, : lengths.max()] = memory[old, :, : lengths.max()]
            for place in np.flatnonzero(sources >= count):
                length = lengths[place]
                memory[place, :, :length] = new.arrays[half][sources[place] - count, :, :length]

    def run(self, *arguments):
        """As `sampling.run`."""
        return sampling.run(self, *arguments)

    def _embed(self, tokens, position):
        """[N], [N] -> [1, N, E], the sum of their rows."""
        x = self._head.rows(tokens)  # of wte
        return (x + self._positions[position])[None]

    def _read(self, row):
        """Ids [T] of one row -> x [T, E], and its keys and values, each [1, H, T, D]."""
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

    def _enter(self, cache, needed):
        """Have the program hold this cache, with room for as many slots as are needed."""
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
            memory[:, :, cache.used :] = 0  # what lies there may be no number
        cache.arrays, self._resident = None, weakref.ref(cache)

    def _leave(self):
        """Take the cache that the program holds out of it, before the program does other work."""
        cache = self._resident()
        if cache is not None:
            cache.arrays = {
                half: self._layers.input(half)[:, :, : cache.used].copy() for half in self._halves
            }
        self._resident = _nothing


def _nothing():
    return None


def _rounded(stored):
    """The same function, of weights rounded to bfloat16."""
    short = tf.bfloat16.as_numpy_dtype
    return lambda name, shape: np.asarray(stored(name, shape)).astype(short).astype(np.float32)


def _room(slots):
    """So many slots, or the next multiple of SLOTS."""
    return -(-slots // SLOTS) * SLOTS


def _widened(seen, slots):
    """The same [N, 1, 1, S] with at least so many slots."""
    more = [(0, 0), (0, 0), (0, 0), (0, max(0, slots - seen.shape[-1]))]
    return np.pad(seen, more, constant_values=kernels.MASKED)


def _mask(looks):
    """Bool -> float32: 0 where one token looks at another, else MASKED."""
    return np.where(looks, 0, kernels.MASKED).astype(np.float32)

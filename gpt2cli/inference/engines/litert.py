"""The engine for a CPU: runs the network as the programs of litert_program.py.

It is faster than XLA there (benchmarks/README.md), and compiles nothing for a batch or a length.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from gpt2cli.inference import sampling
from gpt2cli.inference.engines.litert_program import Program
from gpt2cli.inference.engines.litert_runtime import Tensor
from gpt2cli.inference.engines.packed_weights import PackedWeights
from gpt2cli.inference.engines.prefixes import PIECE, Halves, Prefixes
from gpt2cli.inference.sampling import Chosen
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import MASKED, Values, weight_shapes

SLOTS = 32  # a cache grows by at least this many, the columns of XNNPACK's kernels
TOGETHER = 256  # tokens of short texts that are read in one pass
NOT_SEEN = np.zeros([1, 1, 1, 1], bool)
FEW = 16  # up to this many tokens, a pass has outputs of its own


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """Allow one call at a time, because all threads share a program's memory."""

    @functools.wraps(method)
    def locked(self: LitertEngine, *arguments: Any) -> Any:
        with self._lock:
            return method(self, *arguments)

    return locked


class Cache:
    """The keys and values of N rows.

    Args:
        lengths: int [N], each row's tokens.
        halves: an input's name -> a layer's keys [N, H, S, D] or values [N, H, D, S].
    """

    def __init__(self, lengths: np.ndarray, halves: dict[str, Tensor]) -> None:
        self.lengths, self.halves = lengths, halves

    @property
    def slots(self) -> int:
        """S, the number of tokens that a row has room for."""
        return int(self.halves["keys0"].array.shape[2])

    def view(self, half: str) -> np.ndarray:
        """Return keys or values as [N, H, S, D], to change in place."""
        array = self.halves[half].array
        return array.swapaxes(2, 3) if half.startswith("values") else array


class LitertEngine:
    """An Engine for a CPU.

    Args:
        config: the model's sizes.
        stored: returns a weight's values.
        precision: "float32"; "bfloat16": weights rounded to it, computed in float32, because
            XNNPACK has no bfloat16 product; "int8": matrices in eight bits with a scale per column,
            multiplied as integers with activations that get eight bits per token, and float32 for
            everything else.
        lookup: whether rows may look up what to propose.
        prefix_bytes: bytes for common beginnings of texts.
        kept: the checkpoint's packed weights on disk, if they may be used.

    Attributes:
        prefixes: the common beginnings.
    """

    needs_full_batches = False
    cache_sizes: Sequence[int] = (64,)  # any one

    def __init__(
        self,
        config: ModelConfig,
        stored: Values,
        precision: str = "float32",
        lookup: bool = False,
        prefix_bytes: int = 0,
        kept: PackedWeights | None = None,
    ) -> None:
        self.config, self.looks_up = config, lookup
        self.prefixes = Prefixes(prefix_bytes)
        if precision == "bfloat16":
            stored = _rounded(stored)
        self._layers = Program("layers", config, stored, precision, kept)
        self._head = Program("head", config, stored, precision, kept)
        if kept:
            kept.report()
        self._tokens, self._positions = (
            stored(*table) for table in list(weight_shapes(config).items())[:2]
        )
        depth = range(config.n_layer)
        # in the order of the outputs
        self._halves = [f"{half}{layer}" for layer in depth for half in ("keys", "values")]
        self._inputs: dict[str, Tensor] = {}  # those of the last call
        self._no_cache, self._no_beginning = self._empty(1, 1), self._unread(1)
        self._outputs: dict[int, list[Tensor]] = {}  # number of tokens -> tensors
        self._lock = threading.RLock()

    @_alone
    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return float32 [T, V]; see Engine."""
        ids = np.asarray(tokens, np.int32)
        found = np.empty([len(ids), self.config.n_vocab], np.float32)  # 200 MB for a whole window
        for part, logits in self._scored(ids):
            found[part] = logits
        return found

    @_alone
    def sums(
        self, inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray
    ) -> tuple[float, float]:
        """Return the weighted sums of losses and of hits; see Engine."""
        loss, hits = 0.0, 0.0
        for row, wanted, weight in zip(inputs, targets, mask, strict=True):
            for part, logits in self._scored(np.asarray(row, np.int32)):
                nats, hit = sampling.losses(logits, wanted[part])
                loss += float(np.sum(nats * weight[part]))
                hits += float(np.sum(hit * weight[part]))
        return loss, hits

    @_alone
    def read(self, rows: Sequence[np.ndarray], slots: int) -> tuple[np.ndarray, Cache]:
        """Return logits and Cache; see Engine. `slots` is not used: a cache grows with its rows.

        A common beginning of several rows is read once, and the ends of such rows side by side.
        """
        lengths = np.array([len(row) for row in rows])
        cache = Cache(lengths, self._empty(len(rows), _room(int(lengths.max()) + 1)))
        last = np.empty([len(rows), self.config.n_embd], np.float32)
        groups: dict[bytes, dict[bytes, list[int]]] = {}  # beginning -> text -> numbers of rows
        for number, row in enumerate(rows):
            ids = np.asarray(row, np.int32)
            begin = ids[: (len(ids) - 1) // PIECE * PIECE].tobytes()
            groups.setdefault(begin, {}).setdefault(ids.tobytes(), []).append(number)
        for begin, texts in groups.items():
            seen = len(begin) // 4
            past = self._beginning(np.frombuffer(begin, np.int32))
            ends = {text: np.frombuffer(text, np.int32)[seen:] for text in texts}
            for some in _batches(ends):
                x, new = self._read_on(past, seen, [ends[text] for text in some])
                at = 0
                for text in some:
                    part, numbers = slice(at, at + len(ends[text])), texts[text]
                    at = part.stop
                    last[numbers] = x[part][-1]
                    for half, array in zip(self._halves, new, strict=True):
                        to = cache.view(half)
                        to[numbers, :, :seen] = past[half].array[:, :, :seen]
                        to[numbers, :, seen : seen + len(ends[text])] = array[:, :, part]
        return self._logits(last), cache

    @_alone
    def feed(
        self, cache: Cache, token: np.ndarray, position: np.ndarray
    ) -> tuple[np.ndarray, Cache]:
        """Return logits [N, V] and the same Cache; see Engine."""
        needed = int(position.max()) + 1
        if needed > cache.slots:
            self._grow(cache, needed)
        rows = np.arange(len(token))
        x, new = self._run_layers(
            self._embed(token, position),
            beside=np.eye(len(token), dtype=bool),
            cache=cache.halves,
            seen=np.arange(cache.slots) < position[:, None, None, None],
        )
        for half, array in zip(self._halves, new, strict=True):
            cache.view(half)[rows, :, position] = array[0].swapaxes(0, 1)
        cache.lengths[:] = position + 1
        return self._logits(x), cache

    @_alone
    def check(self, cache: Cache, tokens: np.ndarray, position: int) -> tuple[np.ndarray, Cache]:
        """Feed several tokens to a cache of one row in one pass.

        Args:
            cache: filled before `position`; used up.
            tokens: int32 [T].
            position: the slot of the first.

        Returns:
            Logits [T, V], which differ from those of feeding one token after another by rounding;
            and the same Cache. The next slot may be any up to the last.
        """
        end = position + len(tokens)
        if end > cache.slots:
            self._grow(cache, end)
        place = np.arange(len(tokens))
        x, new = self._run_layers(
            self._embed(tokens, position + place),
            beside=place[:, None] >= place,
            cache=cache.halves,
            seen=np.arange(cache.slots)[None, None, None] < position,
        )
        for half, array in zip(self._halves, new, strict=True):
            cache.view(half)[0, :, position:end] = array[0]
        cache.lengths[:] = end
        return self._logits(x), cache

    @_alone
    def arrange(self, cache: Cache | None, new: Cache | None, sources: Sequence[int]) -> Cache:
        """Return the Cache of other rows; see Engine."""
        both, chosen = [c for c in (cache, new) if c], np.array(sources)
        rows = [(c, number) for c in both for number in range(len(c.lengths))]
        if len(both) == 1 and np.array_equal(chosen, range(len(rows))):
            return both[0]
        lengths = np.concatenate([c.lengths for c in both])
        lengths = np.where(chosen < 0, 0, lengths[chosen])
        slots, place = _room(int(lengths.max()) + 1), np.arange(len(chosen))
        if cache and len(chosen) == len(cache.lengths) and slots <= cache.slots <= 2 * slots:
            made = cache
            moved = (chosen >= 0) & (chosen != place)  # the others stay
            stay = np.where(moved & (chosen < len(place)), chosen, place)
            for half in self._halves if not np.array_equal(stay, place) else ():
                array, end = made.view(half), int(lengths.max())
                array[:, :, :end] = array[stay, :, :end]
            moved &= chosen >= len(place)
        else:
            made = Cache(lengths, self._empty(len(chosen), slots))
            moved = chosen >= 0
        for to in np.flatnonzero(moved):
            source, number = rows[chosen[to]]
            for half in self._halves:
                array = source.view(half)[number, :, : lengths[to]]
                made.view(half)[to, :, : lengths[to]] = array
        made.lengths = lengths
        return made

    def run(self, *arguments: Any, **more: Any) -> Chosen:
        """Generate tokens, as `sampling.run`."""
        more["check"] = self.check
        return sampling.run(self.feed, self.config.n_vocab, *arguments, **more)

    def _embed(self, tokens: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return the sums of token and position embeddings: [N], [N] -> [N, E]."""
        return np.asarray(self._tokens[tokens] + self._positions[position], np.float32)

    def _empty(self, rows: int, slots: int) -> dict[str, Tensor]:
        """Return the tensors of a Cache."""
        heads, head = self.config.n_head, self.config.n_embd // self.config.n_head
        return {
            half: Tensor(rows, heads, *([head, slots] if "values" in half else [slots, head]))
            for half in self._halves
        }

    def _grow(self, cache: Cache, needed: int) -> None:
        """Give a cache more slots."""
        grown = Cache(cache.lengths, self._empty(len(cache.lengths), _room(needed)))
        used = int(cache.lengths.max())
        for half in self._halves:
            grown.view(half)[:, :, :used] = cache.view(half)[:, :, :used]
        cache.halves = grown.halves

    def _unread(self, slots: int) -> dict[str, Tensor]:
        """Return tensors for the keys and values of a beginning, each [1, H, S, D]."""
        head = self.config.n_embd // self.config.n_head
        return {half: Tensor(1, self.config.n_head, slots, head) for half in self._halves}

    def _scored(self, ids: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the logits after each token of a text [T], some tokens at a time."""
        past = self._unread(1)
        for start in range(0, len(ids), PIECE):
            part = slice(start, start + PIECE)
            x, new = self._read_on(past, start, [ids[part]])
            if part.stop < len(ids):
                past = self._extended(past, start, new, len(ids))
            yield part, self._logits(x)

    def _beginning(self, ids: np.ndarray) -> dict[str, Tensor]:
        """Return the keys and values [1, H, S, D] of a text [n * PIECE], S at least its length."""
        past = self._unread(1)
        kept = self.prefixes.find(ids)
        for start in range(0, len(ids), PIECE):
            if start // PIECE < len(kept):
                new = kept[start // PIECE]
            else:
                _, made = self._read_on(past, start, [ids[start : start + PIECE]])
                new = [array.copy() for array in made]
                self.prefixes.keep(ids[: start + PIECE], new)
            past = self._extended(past, start, new, len(ids))
        return past

    def _extended(
        self, past: dict[str, Tensor], start: int, new: Halves, most: int
    ) -> dict[str, Tensor]:
        """Return the same tensors, or larger ones, with new keys and values from a slot on."""
        end, slots = start + new[0].shape[2], past["keys0"].array.shape[2]
        if end > slots:
            larger = self._unread(min(max(2 * start, end), max(most, end)))
            for half, tensor in past.items():
                larger[half].array[:, :, :start] = tensor.array[:, :, :start]
            past = larger
        for half, array in zip(self._halves, new, strict=True):
            past[half].array[:, :, start:end] = array
        return past

    def _read_on(
        self, past: dict[str, Tensor], seen: int, texts: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, Halves]:
        """Read texts that continue the same beginning, side by side.

        Args:
            past: keys and values of the beginning, [1, H, S, D].
            seen: its number of tokens.
            texts: ids, int32 [T] each.

        Returns:
            x [N, E] of all tokens, and their keys and values, each [1, H, N, D]; the next call may
            overwrite them.
        """
        own = np.concatenate([np.full(len(ids), number) for number, ids in enumerate(texts)])
        place = np.concatenate([np.arange(len(ids)) for ids in texts])
        begun = np.arange(past["keys0"].array.shape[2]) < seen
        beside = (own[:, None] == own) & (place[:, None] >= place)
        return self._run_layers(
            self._embed(np.concatenate(texts), seen + place),
            beside=np.concatenate([np.tile(begun, (len(own), 1)), beside], axis=1),
            shared=past,
        )

    def _run_layers(
        self,
        x: np.ndarray,
        beside: np.ndarray,
        cache: dict[str, Tensor] | None = None,
        seen: np.ndarray = NOT_SEEN,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[np.ndarray, Halves]:
        """Return x [N, E] after all layers and the new keys and values, each [1, H, N, D].

        Args:
            x: [N, E], sums of token and position embeddings.
            beside: bool [N, N], whether a token (row) looks at another of x; with `shared`
                [N, S' + N], whether it looks at a slot of that or at another of x.
            cache: the halves of a Cache; with a single row, all tokens have the same.
            seen: bool [N or 1, 1, 1, S], whether a token looks at a slot of `cache`.
            shared: a beginning that all look at, [1, H, S', D].
        """
        if shared is None:
            beside = np.pad(beside, [(0, 0), (1, 0)])
        inputs = {
            "x": self._input("x", x[None]),
            "beside": self._input("beside", _mask(beside)),
            "seen": self._input("seen", _mask(seen)),
            "ones": self._input("ones", np.ones([1, 1, beside.shape[1], 1], np.float32)),
            **(cache or self._no_cache),
        }
        for half, tensor in (shared or self._no_beginning).items():
            inputs[f"shared_{half}"] = tensor
        outputs = self._outputs.get(len(x))
        if outputs is None:
            made = self._unread(len(x)).values()
            outputs = [Tensor(1, len(x), self.config.n_embd), *made]
            if len(x) > FEW:
                self._outputs = {n: made for n, made in self._outputs.items() if n <= FEW}
            self._outputs[len(x)] = outputs
        self._layers(inputs, outputs)
        return outputs[0].array[0], [tensor.array for tensor in outputs[1:]]

    def _logits(self, x: np.ndarray) -> np.ndarray:
        """Return logits [N, V] of x [N, E]."""
        logits = Tensor(len(x), self.config.n_vocab)
        self._head({"x": self._input("last", x)}, [logits])
        return logits.array

    def _input(self, name: str, values: np.ndarray) -> Tensor:
        """Return a tensor with these values; there is one of each name."""
        tensor = self._inputs.get(name)
        if tensor is None or tensor.array.shape != values.shape:
            tensor = self._inputs[name] = Tensor(*values.shape)
        tensor.array[...] = values
        return tensor


def _batches(ends: dict[bytes, np.ndarray]) -> Iterator[list[bytes]]:
    """Yield the keys of texts that are read side by side: at most TOGETHER tokens, or one text."""
    some: list[bytes] = []
    count = 0
    for text, ids in ends.items():
        if some and count + len(ids) > TOGETHER:
            yield some
            some, count = [], 0
        some.append(text)
        count += len(ids)
    yield some


def _rounded(stored: Values) -> Values:
    """Return the same function with its values rounded to bfloat16."""
    short = ml_dtypes.bfloat16
    return lambda name, shape: np.asarray(stored(name, shape)).astype(short).astype(np.float32)


def _room(slots: int) -> int:
    """Return the number of slots of a cache that needs `slots` of them.

    A cache grows by an eighth to a quarter: masked slots cost as much as others, and growing copies
    the cache.
    """
    step = max(SLOTS, (1 << (slots - 1).bit_length()) // 8)
    return math.ceil(slots / step) * step


def _mask(looks: np.ndarray) -> np.ndarray:
    """Return float32: 0 where one token looks at another, MASKED elsewhere."""
    return np.where(looks, 0, MASKED).astype(np.float32)

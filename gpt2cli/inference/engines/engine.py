"""The interface of all engines, by which rows grow and texts are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gpt2cli.inference.engines.prefixes import Prefixes
from gpt2cli.inference.sampling import Chosen, Rules
from gpt2cli.model.sizes import ModelConfig

if TYPE_CHECKING:
    from gpt2cli.inference.lookup import Lookup

Cache = Any  # the keys and values of N rows, in the form of the engine that made them


class Engine(Protocol):
    """A network that scores texts and continues them.

    A token's slot in a cache is its place in the row's window: 0, 1, ... The logits may be tensors
    or arrays.

    Attributes:
        config: the model's sizes.
        needs_full_batches: each number of rows costs a compilation, so the number should stay the
            same.
        prefixes: the common beginnings of texts that it keeps.
        looks_up: it uses the proposals of a row's Lookup.
        cache_sizes: the numbers of slots to try before the first request: all that cost a
            compilation.
    """

    config: ModelConfig
    needs_full_batches: bool
    looks_up: bool
    prefixes: Prefixes
    cache_sizes: Sequence[int]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return float32 [T, V] for the ids of one text, T up to n_ctx."""

    def sums(self, inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        """Return the weighted sums of the losses, in nats, and of the hits.

        Args:
            inputs: ids [B, T].
            targets: the ids that follow them, [B, T].
            mask: the weight of each prediction, float32 [B, T].
        """

    def read(self, rows: Sequence[np.ndarray], slots: int) -> tuple[Any, Cache]:
        """Read texts; return the logits [N, V] after each of them, and their cache.

        Args:
            rows: ids of each text, int32 [T], T up to n_ctx.
            slots: number of slots that the rows will need; a hint.
        """

    def feed(self, cache: Cache, token: np.ndarray, position: np.ndarray) -> tuple[Any, Cache]:
        """Feed one more token per row; return logits [N, V] and the new cache.

        Args:
            cache: filled before `position`; used up.
            token: int32 [N].
            position: the slot of each token, int32 [N].
        """

    def run(
        self,
        cache: Cache,
        rows: Sequence[Sequence[int]],
        position: np.ndarray,
        finished: np.ndarray,
        generated: np.ndarray,
        noise: np.ndarray,
        rules: Sequence[Rules],
        logprobs: np.ndarray,
        lookup: Lookup | None = None,
    ) -> Chosen:
        """Generate up to M tokens per row; see `sampling.run`."""

    def arrange(self, cache: Cache | None, new: Cache | None, sources: Sequence[int]) -> Cache:
        """Return the cache of other rows.

        Args:
            cache: the present cache, or None; used up.
            new: the cache of more rows, or None; used up.
            sources: the source of each row: n for row n of `cache`; its number of rows + n for row
                n of `new`; -1 for an empty place.
        """

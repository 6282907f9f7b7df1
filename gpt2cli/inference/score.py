"""How well a model predicts a text."""

from collections.abc import Iterable
from typing import NamedTuple

from gpt2cli.inference.engines.engine import Engine
from gpt2cli.text.batches import Batch


class Score(NamedTuple):
    """How well a text is predicted.

    Args:
        loss: mean loss, in nats per token.
        accuracy: share of the tokens that were the likeliest.
        tokens: number of tokens predicted.
    """

    loss: float
    accuracy: float
    tokens: int


def score(engine: Engine, batches: Iterable[Batch]) -> Score:
    """Return how well an engine predicts all batches together."""
    loss, hits, count = 0.0, 0.0, 0
    for batch in batches:
        more_loss, more_hits = engine.sums(*batch)
        loss += float(more_loss)
        hits += float(more_hits)
        count += int(batch.mask.sum())
    return Score(loss / max(count, 1), hits / max(count, 1), count)

"""How well a model predicts a text."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from gpt2cli.text.batches import Batch


class Score(NamedTuple):
    """How well a text is predicted.

    Attributes:
        loss: mean loss of a token, in nats.
        accuracy: share of tokens that were the likeliest.
        tokens: number of predicted tokens.
    """

    loss: float
    accuracy: float
    tokens: int


def score(network: Any, batches: Iterable[Batch]) -> Score:
    """Score batches with a graph.Graph or lite.Lite."""
    loss, hits, count = 0.0, 0.0, 0
    for batch in batches:
        batch_loss, batch_hits = network.sums(*batch)
        loss += float(batch_loss)
        hits += float(batch_hits)
        count += int(batch.mask.sum())
    return Score(loss / max(count, 1), hits / max(count, 1), count)

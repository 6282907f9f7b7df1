"""Choose the next token from logits: the rules for one token, and the loop for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from gpt2cli.inference.lookup import Lookup

CHUNK = 32  # tokens per call of the loop, at most; more would delay --stop
LIKELIEST = 5  # number of likeliest tokens whose log-probabilities are kept, as in OpenAI's API
BLOCK = 256  # about sqrt(50257), so that both cumulative sums of `draw` have the same length


class Rules(NamedTuple):
    """How a row chooses its next token.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among the K likeliest tokens; 0 is all.
        top_p: choose among the fewest likeliest tokens that together reach P; 0 and 1 are all.
        repetition_penalty: above 1 makes tokens that occur in the row less likely.
        min_length: number of tokens before any of `ends` is allowed.
        no_repeat_ngram: never write the same N tokens in a row twice; 0 allows repeats.
        ends: the tokens that end a row, any number of them.
        banned: tokens that are never chosen.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    min_length: int = 0
    no_repeat_ngram: int = 0
    ends: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()


def apply_rules(logits: np.ndarray, row: Sequence[int], generated: int, rules: Rules) -> np.ndarray:
    """Apply everything that comes before temperature, top-k and top-p; return logits [V].

    In this order: repetition penalty (arXiv 1909.05858), banned tokens, minimal length, repeated
    n-grams.

    Args:
        logits: logits or log-probabilities [V].
        row: ids so far.
        generated: the number of those that came after the prompt.
        rules: how the row chooses.
    """
    logits = logits.copy()  # a few microseconds
    if rules.repetition_penalty != 1:
        seen = np.unique(row)
        old, penalty = logits[seen], np.float32(rules.repetition_penalty)
        logits[seen] = np.where(old > 0, old / penalty, old * penalty)
    logits[list(rules.banned)] = -np.inf
    if generated < rules.min_length:
        logits[list(rules.ends)] = -np.inf
    if rules.no_repeat_ngram:
        left = logits.copy()
        left[repeats(row, rules.no_repeat_ngram)] = -np.inf
        if left.max() > -np.inf:  # otherwise no token is left, and the row stays as it is
            logits = left
    return logits


def repeats(row: Sequence[int], size: int) -> np.ndarray:
    """Return the ids that would repeat an n-gram of the row, of `size` tokens."""
    ids = np.asarray(row)
    found = np.arange(size - 1, len(ids))  # ends of the n-grams that the next token could repeat
    for back in range(1, size):
        if not len(found):
            break
        found = found[ids[found - back] == ids[len(ids) - back]]
    return ids[found]


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the k likeliest of [V], in order, and of ties with the last of them."""
    k = min(k, len(logits))
    return np.flatnonzero(logits >= np.partition(logits, -k)[-k])


def keep_top_p(mass: np.ndarray, p: float) -> np.ndarray:
    """Return the indices of the fewest likeliest tokens that together reach p, in order.

    The token that crosses p is kept (openai/gpt-2 drops it), so at least one is, and those that tie
    with it. Nucleus sampling, arXiv 1904.09751.

    Args:
        mass: [V], a multiple of the probabilities.
        p: in (0, 1).
    """
    falling = np.sort(mass)[::-1]
    return np.flatnonzero(mass >= falling[_crossing(falling, p, "left")])


def draw(mass: np.ndarray, uniform: float) -> int:
    """Return the first index of mass [V] whose cumulative share exceeds a number in [0, 1)."""
    return _crossing(mass, uniform, "right")


def _crossing(mass: np.ndarray, share: float, side: Literal["left", "right"]) -> int:
    """Return where the sum of mass [V] reaches ("left") or exceeds ("right") a share of the total.

    The sum is taken in two levels, because one cumulative sum over [V] would take longer than the
    rest of a row's work. An index without mass is never returned, whatever the rounding.
    """
    sums = np.add.reduceat(mass, np.arange(0, len(mass), BLOCK))
    total = np.cumsum(sums, dtype=np.float64)
    block = _first(total, share * total[-1], side, sums)
    inside = mass[block * BLOCK : (block + 1) * BLOCK]
    before = total[block - 1] if block else 0
    left = share * total[-1] - before
    return block * BLOCK + _first(np.cumsum(inside, dtype=np.float64), left, side, inside)


def _first(
    cumulative: np.ndarray, target: float, side: Literal["left", "right"], mass: np.ndarray
) -> int:
    """Return the first index with mass where the sum is enough, or the last index with mass."""
    index, with_mass = np.searchsorted(cumulative, target, side), np.flatnonzero(mass)
    return int(with_mass[min(int(np.searchsorted(with_mass, index)), len(with_mass) - 1)])


def choose(
    logits: np.ndarray, uniform: float, row: Sequence[int], generated: int, rules: Rules
) -> int:
    """Choose a row's next token: apply_rules, then temperature, top-k, top-p.

    Args:
        logits: [V].
        uniform: a random number in [0, 1).
        row: ids so far.
        generated: the number of those that came after the prompt.
        rules: how the row chooses.
    """
    logits = apply_rules(logits, row, generated, rules)
    if rules.temperature <= 0:
        return int(logits.argmax())
    tokens = None
    if 0 < rules.top_k < len(logits):
        tokens = keep_top_k(logits, rules.top_k)
        logits = logits[tokens]
    # shifted first, so that a small temperature cannot overflow
    mass = logits - logits.max()
    if rules.temperature != 1:
        mass /= np.float32(max(rules.temperature, 1e-6))
    np.exp(mass, out=mass)
    if 0 < rules.top_p < 1:
        kept = keep_top_p(mass, rules.top_p)
        tokens, mass = kept if tokens is None else tokens[kept], mass[kept]
    index = draw(mass, uniform)
    return index if tokens is None else int(tokens[index])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of [..., V], in nats."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def losses(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nats by which each id was missed, and 1 where it was the likeliest, else 0.

    Args:
        logits: float32 [N, V].
        targets: ids [N].

    Returns:
        Two float32 [N].
    """
    nats, hits = np.empty(len(logits), np.float32), np.empty(len(logits), np.float32)
    for n, (row, target) in enumerate(zip(logits, targets, strict=True)):
        best = int(row.argmax())  # a row stays in the processor's cache for all of these
        nats[n] = np.log(np.exp(row - row[best]).sum()) + row[best] - row[target]
        hits[n] = best == target
    return nats, hits


class Candidate(NamedTuple):
    """A row with one more token.

    Args:
        score: the sum of its log-probabilities, after the rules.
        row: the number of the row.
        token: the new token.
        logprob: the token's log-probability, before the rules; nats.
    """

    score: float
    row: int
    token: int
    logprob: float


def rank(
    logits: np.ndarray,
    scores: Sequence[float],
    rows: Sequence[Sequence[int]],
    generated: Sequence[int],
    rules: Sequence[Rules],
    count: int,
) -> list[Candidate]:
    """Return the `count` likeliest ways to continue any of the rows by one token, best first.

    As in transformers, the rules change log-probabilities, and the result is not normalized. There
    are fewer candidates if the rules leave fewer tokens.

    Args:
        logits: [N, V].
        scores: [N], the log-probability of each row so far.
        rows: [N], as for `apply_rules`.
        generated: [N], as for `apply_rules`.
        rules: [N], as for `apply_rules`.
        count: number of candidates.
    """
    found = []
    for number, row in enumerate(rows):
        own = log_softmax(logits[number])
        total = scores[number] + apply_rules(own, row, generated[number], rules[number])
        tokens = np.argpartition(total, -min(count, len(total)))[-count:]
        found += [Candidate(float(total[t]), number, int(t), float(own[t])) for t in tokens]
    possible = (candidate for candidate in found if candidate.score > -np.inf)
    return sorted(possible, key=lambda one: (-one.score, one.row, one.token))[:count]


def likeliest(logprobs: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the `count` likeliest of [V], best first; of equals the lower id first."""
    found = np.argpartition(logprobs, -min(count, len(logprobs)))[-count:]
    return found[np.lexsort((found, -logprobs[found]))]


class Chosen(NamedTuple):
    """The result of a call of the loop.

    Only rows that need log-probabilities have them; elsewhere the values have no meaning.

    Args:
        tokens: int32 [N, M].
        logprobs: float32 [N, M], of the tokens, before all rules and temperature; nats.
        others: [N, M, LIKELIEST], the likeliest tokens in each token's place, best first.
        other_logprobs: [N, M, LIKELIEST], their log-probabilities.
        cache: the engine's, for the next call.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    others: np.ndarray
    other_logprobs: np.ndarray
    cache: Any = None


def run(
    feed: Callable[[Any, np.ndarray, np.ndarray], tuple[np.ndarray, Any]],
    n_vocab: int,
    cache: Any,
    rows: Sequence[Sequence[int]],
    position: np.ndarray,
    finished: np.ndarray,
    generated: np.ndarray,
    noise: np.ndarray,
    rules: Sequence[Rules],
    logprobs: np.ndarray,
    lookup: Lookup | None = None,
    check: Callable[[Any, np.ndarray, int], tuple[np.ndarray, Any]] | None = None,
) -> Chosen:
    """Generate up to M tokens per row, one after another.

    Args:
        feed: function of a cache, one token per row and their positions; returns logits [N, V] and
            the new cache.
        n_vocab: width of the logits.
        cache: filled before `position`.
        rows: the ids of each row.
        position: int32 [N], the slot of each row's last token, which is fed next.
        finished: bool [N], rows that have ended; nothing they write counts.
        generated: int32 [N], the number of each row's tokens that came after the prompt.
        noise: float32 [N, M], random numbers in [0, 1).
        rules: how each row chooses.
        logprobs: bool [N], rows that need log-probabilities.
        lookup: proposes the next tokens of a single row.
        check: as `feed` for a single row and several of its tokens; returns the logits after each.

    Returns:
        Fewer than M tokens if all rows have ended.
    """
    growing = [list(row) for row in rows]
    finished = finished.copy()
    kept = min(LIKELIEST, n_vocab)
    tokens, found = np.zeros(noise.shape, np.int32), np.zeros(noise.shape, np.float32)
    others, beside = np.zeros([*noise.shape, kept], np.int32), np.zeros([*noise.shape, kept])

    def take(i: int, logits: np.ndarray) -> None:
        """Choose token i of each row that grows, from logits [N, V]."""
        for n in np.flatnonzero(~finished).tolist():
            token = choose(logits[n], noise[n, i], growing[n], generated[n] + i, rules[n])
            growing[n].append(token)
            tokens[n, i] = token
            if logprobs[n]:
                own = log_softmax(logits[n])
                found[n, i], others[n, i] = own[token], likeliest(own, kept)
                beside[n, i] = own[others[n, i]]
            finished[n] = token in rules[n].ends

    i, steps = 0, noise.shape[1]
    while i < steps and not (i and finished.all()):
        if lookup and check and (ahead := lookup.propose(growing[0], steps - i - 1)):
            fed = np.array([growing[0][-1], *ahead], np.int32)
            logits, cache = check(cache, fed, int(position[0]) + i)
            known = len(growing[0])
            for one in logits:
                take(i, one[None])
                i += 1
                if finished[0] or growing[0][known:] != ahead[: len(growing[0]) - known]:
                    break
            same = zip(growing[0][known:], ahead, strict=False)
            lookup.learn(len(ahead), sum(token == other for token, other in same))
        else:
            fed = np.array([row[-1] for row in growing], np.int32)
            logits, cache = feed(cache, fed, position + i)
            take(i, logits)
            i += 1
    done = slice(i)
    return Chosen(tokens[:, done], found[:, done], others[:, done], beside[:, done], cache)

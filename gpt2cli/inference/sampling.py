"""Logits -> next token: the rules by which it is chosen, and the loop that chooses many."""

from typing import NamedTuple

import numpy as np

CHUNK = 32  # tokens a call of the loop may generate; more would delay --stop
LIKELIEST = 5  # tokens whose log-probabilities are kept beside the chosen one's, as OpenAI's API
BLOCK = 256  # about sqrt(50257): the two cumulative sums of `draw` are equally long


class Rules(NamedTuple):
    """How a row chooses its next token.

    Args:
        temperature: by which logits are divided; 0 takes the likeliest.
        top_k: choose among so many likeliest; 0 is all.
        top_p: choose among the fewest likeliest that together reach it; 0 and 1 are all.
        repetition_penalty: by which tokens that the row holds are made less likely.
        min_length: tokens before `end` may come.
        no_repeat_ngram: how many tokens in a row must not come twice; 0 allows it.
        end: the token that ends a row, or -1.
        banned: tokens that are never chosen.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    min_length: int = 0
    no_repeat_ngram: int = 0
    end: int = -1
    banned: tuple = ()


def apply_rules(logits, row, generated, rules):
    """Logits or log-probabilities [V] -> [V], before any temperature and cut.

    In this order: repetition penalty (arXiv 1909.05858), banned tokens, minimal length, repeated
    n-grams.

    Args:
        row: ids so far.
        generated: how many of them came after the prompt.
    """
    logits = logits.copy()  # a few microseconds
    if rules.repetition_penalty != 1:
        seen = np.unique(row)
        old, penalty = logits[seen], np.float32(rules.repetition_penalty)
        logits[seen] = np.where(old > 0, old / penalty, old * penalty)
    logits[list(rules.banned)] = -np.inf
    if generated < rules.min_length and rules.end >= 0:
        logits[rules.end] = -np.inf
    if rules.no_repeat_ngram:
        left = logits.copy()
        left[repeats(row, rules.no_repeat_ngram)] = -np.inf
        if left.max() > -np.inf:  # a row in which no token is left stays as it is
            logits = left
    return logits


def repeats(row, size):
    """The ids that would write `size` tokens in a row that are in `row` already."""
    row = np.asarray(row)
    found = np.arange(size - 1, len(row))  # where what would come again ends
    for back in range(1, size):
        if not len(found):
            break
        found = found[row[found - back] == row[len(row) - back]]
    return row[found]


def keep_top_k(logits, k):
    """[V] -> the indices of the k likeliest, in order; with those that tie with the last."""
    k = min(k, len(logits))
    return np.flatnonzero(logits >= np.partition(logits, -k)[-k])


def keep_top_p(mass, p):
    """[V], a multiple of the probabilities -> the indices of the fewest that reach p, in order.

    The token that crosses p is kept (openai/gpt-2 drops it), so at least one is, and those that tie
    with it. Nucleus sampling, arXiv 1904.09751.
    """
    falling = np.sort(mass)[::-1]
    return np.flatnonzero(mass >= falling[_crossing(falling, p, "left")])


def draw(mass, uniform):
    """The first index of mass [V] whose cumulative share exceeds a number in [0, 1)."""
    return _crossing(mass, uniform, "right")


def _crossing(mass, share, side):
    """The index of mass [V] at which its sum reaches ("left") or exceeds ("right") a share of all.

    In two levels: one cumulative sum over [V] would take longer than all else that is done with a
    row. Never an index without mass, whatever the rounding.
    """
    sums = np.add.reduceat(mass, np.arange(0, len(mass), BLOCK))
    total = np.cumsum(sums, dtype=np.float64)
    block = _first(total, share * total[-1], side, sums)
    inside = mass[block * BLOCK : (block + 1) * BLOCK]
    before = total[block - 1] if block else 0
    left = share * total[-1] - before
    return block * BLOCK + _first(np.cumsum(inside, dtype=np.float64), left, side, inside)


def _first(cumulative, target, side, mass):
    """The first index at which the sum is enough and that has mass; if none has, the last one."""
    index, with_mass = np.searchsorted(cumulative, target, side), np.flatnonzero(mass)
    return int(with_mass[min(np.searchsorted(with_mass, index), len(with_mass) - 1)])


def choose(logits, uniform, row, generated, rules):
    """The next token of a row, from logits [V] and a random number in [0, 1).

    After apply_rules: temperature, top-k, top-p.
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


def log_softmax(logits):
    """[..., V] -> the log-probabilities, in nats."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def rank(logits, scores, rows, generated, rules, count):
    """The likeliest `count` rows of one token more, best first.

    As in transformers, the rules apply to log-probabilities, and what they leave is not normalized.

    Args:
        logits: [N, V].
        scores: [N], the log-probability of each row so far.
        rows, generated, rules: of each row, as for `apply_rules`.

    Returns:
        Tuples of score, row, token, the token's own log-probability; none of probability 0.
    """
    found = []
    for number, row in enumerate(rows):
        own = log_softmax(logits[number])
        total = scores[number] + apply_rules(own, row, generated[number], rules[number])
        tokens = np.argpartition(total, -min(count, len(total)))[-count:]
        found += [(float(total[t]), number, int(t), float(own[t])) for t in tokens]
    best = sorted((f for f in found if f[0] > -np.inf), key=lambda f: (-f[0], f[1], f[2]))
    return best[:count]


def likeliest(logprobs, count):
    """[V] -> the ids of the `count` likeliest, best first; the lower id where two are equal."""
    found = np.argpartition(logprobs, -min(count, len(logprobs)))[-count:]
    return found[np.lexsort((found, -logprobs[found]))]


class Chosen(NamedTuple):
    """What a call of the loop generated.

    tokens: int32 [N, M].
    logprobs: float32 [N, M], of the tokens, before all rules and temperature; nats.
    others, other_logprobs: [N, M, LIKELIEST], the likeliest tokens in each one's place, best first.
    cache: the network's, for the next call.

    The three in the middle have a meaning only if they were asked for.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    others: np.ndarray
    other_logprobs: np.ndarray
    cache: object = None


def run(network, cache, rows, position, finished, generated, noise, rules, logprobs):
    """Generate up to M tokens a row, one after another.

    Args:
        network: what has `feed`: a lite.Lite.
        cache: what `network.read` returned, filled before `position`.
        rows: the ids of each row.
        position: [N], the slot of each row's last token, which is to be fed next.
        finished: bool [N], rows that have ended; they write nothing that counts.
        generated: [N], tokens of each row that came after the prompt.
        noise: [N, M], random numbers in [0, 1).
        rules: the Rules of each row.
        logprobs: bool [N], whether anybody asks for the log-probabilities of a row.

    Returns:
        Chosen, of fewer than M tokens if all rows have ended.
    """
    rows, finished = [list(row) for row in rows], finished.copy()
    kept = min(LIKELIEST, network.config.n_vocab)
    tokens, found = np.zeros(noise.shape, np.int32), np.zeros(noise.shape, np.float32)
    others, beside = np.zeros([*noise.shape, kept], np.int32), np.zeros([*noise.shape, kept])
    for i in range(noise.shape[1]):
        fed = np.array([row[-1] for row in rows], np.int32)
        logits, cache = network.feed(cache, fed, position + i)
        for n in np.flatnonzero(~finished):
            token = choose(logits[n], noise[n, i], rows[n], generated[n] + i, rules[n])
            rows[n].append(token)
            tokens[n, i] = token
            if logprobs[n]:
                own = log_softmax(logits[n])
                found[n, i], others[n, i] = own[token], likeliest(own, kept)
                beside[n, i] = own[others[n, i]]
            finished[n] = token == rules[n].end
        if finished.all():
            break
    done = slice(i + 1)
    return Chosen(tokens[:, done], found[:, done], others[:, done], beside[:, done], cache)

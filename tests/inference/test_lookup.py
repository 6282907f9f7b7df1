"""Prompt look-up decoding: the same tokens in fewer passes."""

import numpy as np
import pytest

from gpt2cli.inference import sampling
from gpt2cli.inference.lookup import PATIENCE, Lookup
from gpt2cli.inference.sampling import Rules

N_VOCAB = 40


class Periodic:
    """A network without weights: a token is likely to follow as it did `period` tokens before.

    Attributes:
        passes: the number of tokens in each pass.
    """

    def __init__(self, row, period, noise):
        self.row, self.period, self.noise = list(row), period, noise
        self.passes = []

    def after(self, row):
        random = np.random.default_rng([len(row), *row[-3:]])
        logits = self.noise * random.standard_normal(N_VOCAB)
        logits[row[-self.period]] += 6
        return logits.astype(np.float32)

    def check(self, cache, tokens, position):
        assert position <= len(cache)  # what was proposed in vain lies behind
        cache = cache[:position]
        logits = []
        for token in tokens:
            cache = [*cache, int(token)]
            logits.append(self.after(cache))
        self.passes.append(len(tokens))
        return np.array(logits), cache

    def feed(self, cache, token, position):
        logits, cache = self.check(cache, token, int(position[0]))
        return logits, cache


def generated(network, lookup, length, rules, seed=0, chunk=32):
    """The tokens and log-probabilities of one row, as Generation asks for them."""
    row, start = list(network.row), len(network.row)
    cache, random, found = row[:-1], np.random.default_rng(seed), []
    while len(row) - start < length:
        steps = min(chunk, length - (len(row) - start))
        chosen = sampling.run(
            network.feed,
            N_VOCAB,
            cache,
            rows=[row],
            position=np.array([len(row) - 1], np.int32),
            finished=np.array([False]),
            generated=np.array([len(row) - start]),
            noise=random.random([1, steps], np.float32),
            rules=[rules],
            logprobs=np.array([True]),
            lookup=lookup,
            check=network.check,
        )
        row += chosen.tokens[0].tolist()
        found += zip(chosen.logprobs[0], map(tuple, chosen.others[0]), strict=True)
        cache = chosen.cache
        if row[-1] in rules.ends:
            break
    return row[start:], found


@pytest.mark.parametrize("rules", [Rules(temperature=0), Rules(), Rules(top_k=5, ends=(7,))])
@pytest.mark.parametrize("noise", [0, 1, 3])
def test_the_tokens_are_the_same_as_without(rules, noise):
    for seed in range(20):
        row = np.random.default_rng(seed).integers(N_VOCAB, size=12).tolist()
        plain, ahead = Periodic(row, 9, noise), Periodic(row, 9, noise)
        expected = generated(plain, None, 100, rules, seed)
        assert generated(ahead, Lookup(), 100, rules, seed) == expected
        assert set(plain.passes) == {1}


def test_a_text_that_repeats_itself_takes_a_third_of_the_passes():
    row = list(range(12)) * 2
    plain, ahead = Periodic(row, 12, 0), Periodic(row, 12, 0)
    generated(plain, None, 128, Rules(temperature=0))
    generated(ahead, Lookup(), 128, Rules(temperature=0))
    assert len(plain.passes) == 128 and len(ahead.passes) < 128 / 3


def test_a_text_that_does_not_repeat_itself_costs_few_attempts():
    random, lookup, attempts = np.random.default_rng(0), Lookup(), 0
    row = [0, 1] * 3
    for _ in range(400):
        row.append(int(random.integers(2)))  # every pair has occurred, and nothing follows it
        if proposed := lookup.propose(row, 100):
            attempts += 1
            lookup.learn(len(proposed), 0)
    assert attempts <= 2 + np.log2(PATIENCE) + 400 / PATIENCE


def test_the_longest_match_and_of_those_the_last_is_proposed():
    row = [1, 2, 3, 9, 9, 2, 3, 8, 1, 2, 3, 7, 6, 5, 4, 1, 2, 3]
    assert Lookup().propose(row, 100) == [7, 6, 5]
    assert Lookup().propose(row, 2) == [7, 6]
    assert Lookup().propose(row, 0) == []
    assert Lookup().propose([5, 6, 7], 100) == []
    assert Lookup().propose([3, 3, 3, 3], 100) == [3]


def test_the_table_grows_with_the_row():
    lookup, whole = Lookup(), [4, 5, 6, 7, 4, 5, 6, 7, 4, 5]
    for end in range(1, len(whole) + 1):
        found = lookup.propose(whole[:end], 100)
        assert found == Lookup().propose(whole[:end], 100), end
    assert found == [6, 7, 4]

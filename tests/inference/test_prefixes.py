"""Common beginnings: read once, with the numbers of a text that is read alone, to the last bit."""

import numpy as np
import pytest
from conftest import TINY, compiled, lively

from gpt2cli.inference.engines.litert import LitertEngine
from gpt2cli.inference.engines.prefixes import PIECE, Prefixes
from gpt2cli.inference.generator import LanguageModel, load_model
from gpt2cli.model.sizes import ModelConfig

CONFIG = ModelConfig(n_vocab=97, n_ctx=600, n_embd=48, n_head=3, n_layer=2)
TEXT = np.random.default_rng(0).integers(97, size=600).astype(np.int32)


@pytest.fixture(scope="module")
def network():
    return lively(CONFIG)


@pytest.fixture(scope="module")
def plain(network):
    return compiled("lite", network)


def keeping(network, precision="float32", most=2**24):
    def stored(name, shape):
        return network.weights[name].numpy()

    return LitertEngine(CONFIG, stored, precision, prefix_bytes=most)


def after(engine, rows):
    """The logits after rows, and after one more token each."""
    logits, cache = engine.read(rows, 600)
    position = np.array([len(row) for row in rows], np.int32)
    return logits, engine.feed(cache, np.full(len(rows), 5, np.int32), position)[0]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_beginning_that_was_kept_gives_the_same_numbers(network, precision):
    """Also with ends of many lengths, which are read side by side."""
    random = np.random.default_rng(1)
    rows = [
        np.append(TEXT[:start], random.integers(97, size=size)).astype(np.int32)
        for start in (0, 300, 256)
        for size in (1, 9, 40, 70, 100)
    ]
    alone = keeping(network, precision, most=0)
    expected = [after(alone, [row]) for row in rows]
    assert not alone.prefixes.size
    engine = keeping(network, precision)
    for _ in range(2):
        for place in (0, 1):
            found = after(engine, rows)[place]
            np.testing.assert_array_equal(found, [one[place][0] for one in expected])
    assert engine.prefixes.reused >= 2 * PIECE * 4


def test_the_logits_are_those_of_the_graph(network, plain):
    expected = network(TEXT[None, :400])[0]
    np.testing.assert_allclose(plain.logits(TEXT[:400]), expected, atol=2e-4)
    logits, _ = plain.read([TEXT[:400]], 600)
    np.testing.assert_allclose(logits[0], expected[-1], atol=2e-4)


def test_prompts_that_share_a_beginning_are_read_once(network, monkeypatch):
    engine = keeping(network)
    read, run = [], engine._run_layers

    def counted(x, *arguments, **more):
        read.append(len(x))
        return run(x, *arguments, **more)

    monkeypatch.setattr(engine, "_run_layers", counted)
    prompts = [[*TEXT[:512].tolist(), token] for token in range(32)]
    LanguageModel(engine, None).generate(prompts, length=1, batch_size=32)
    assert sum(read) == 512 + 32
    for prompt in prompts[:5]:  # one after another, as requests come
        LanguageModel(engine, None).generate([prompt], length=1)
    assert sum(read) == 512 + 32 + 5


def piece(number):
    return [np.full([1, 2, PIECE, 4], number, np.float32)]


def test_the_last_used_are_kept():
    size = piece(0)[0].nbytes
    prefixes = Prefixes(3 * size)
    one, two = TEXT[: 2 * PIECE], TEXT[PIECE : 3 * PIECE]
    prefixes.keep(one[:PIECE], piece(1))
    prefixes.keep(one, piece(2))
    prefixes.keep(two[:PIECE], piece(3))
    assert [p[0][0, 0, 0, 0] for p in prefixes.find(one)] == [1, 2]
    prefixes.keep(two, piece(4))  # two's beginning was used least
    assert prefixes.size == 3 * size and prefixes.reused == 2 * PIECE
    assert len(prefixes.find(one)) == 2 and prefixes.find(two) == []
    prefixes.keep(TEXT[:PIECE][::-1], piece(5))
    prefixes.keep(TEXT[5 : 5 + PIECE], piece(6))
    assert len(prefixes.find(one)) == 1  # the end goes before the beginning it needs
    Prefixes(0).keep(one, piece(1))


def test_a_piece_that_is_kept_again_counts_once():
    prefixes = Prefixes(10**6)
    for _ in range(3):
        prefixes.keep(TEXT[:PIECE], piece(1))
    assert prefixes.size == piece(1)[0].nbytes


REPEATED = "for item in items:\n    total += item.price\n    count += item.count\n" * 2


@pytest.mark.parametrize("number", [12, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_looking_up_changes_no_text(number, temperature):
    """Not for certain, because sums are rounded in another order; in each of these prompts."""
    plain, quick = (load_model(TINY, lookup=lookup) for lookup in (False, True))
    random, checked = np.random.default_rng(3), []
    real = quick.network.check

    def check(cache, tokens, position):
        checked.append(len(tokens))
        return real(cache, tokens, position)

    quick.network.check = check
    for index in range(number):
        ids = random.integers(2000, size=random.integers(1, 30)).tolist()
        prompt = REPEATED if index % 2 else ids * 3
        settings = dict(length=40, temperature=temperature, seed=index, batch_size=1 + index % 8)
        prompts = [prompt] * (1 + index % 3)
        expected, found = (model.generate(prompts, **settings) for model in (plain, quick))
        assert [s.tokens for s in found] == [s.tokens for s in expected]
    assert checked and max(checked) > 2

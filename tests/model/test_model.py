"""The network against an independent float64 GPT-2 and the original program's numbers."""

import numpy as np
import oracle
import pytest
from conftest import check_golden, compiled, golden_models, lively

from gpt2cli.model.network import GPT2
from gpt2cli.model.sizes import ACTIVATIONS, ModelConfig
from gpt2cli.model.weights import random_weights, weight_shapes
from gpt2cli.storage import checkpoint
from gpt2cli.tensorflow import tf

TOKENS = np.array([5, 90, 5, 17, 63, 2, 2, 88, 41, 0, 96, 30, 11], np.int32)
TOLERANCE = 2e-5  # float32 against float64; every slip below is far above it


def weights_of(network):
    return {name: variable.numpy() for name, variable in network.weights.items()}


def test_logits_are_those_of_the_equations(network):
    expected = oracle.logits(weights_of(network), 4, TOKENS)
    np.testing.assert_allclose(network(TOKENS[None])[0], expected, atol=TOLERANCE)


@pytest.mark.parametrize("slip", oracle.SLIPS)
def test_the_tolerance_would_show_a_known_mistake(network, slip):
    expected = oracle.logits(weights_of(network), 4, TOKENS, slip)
    assert np.abs(network(TOKENS[None])[0] - expected).max() > 5 * TOLERANCE


ODD = {"n_vocab": 97, "n_ctx": 16, "n_embd": 20, "n_head": 4, "n_layer": 2, "n_inner": 36}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_activation_and_inner_width_is_that_of_the_equations(activation):
    """In the graph and on a CPU; each other activation is far beyond the tolerance."""
    network = lively(ModelConfig(**ODD, activation=activation))
    weights = weights_of(network)
    expected = {
        other: oracle.logits(weights, 4, TOKENS, activation=other) for other in oracle.ACTIVATIONS
    }
    on_cpu = compiled("lite", network)
    for found in (network(TOKENS[None])[0].numpy(), on_cpu.logits(TOKENS)):
        for other, logits in expected.items():
            difference = np.abs(found - logits).max()
            assert (difference < TOLERANCE) == (other == activation), (other, difference)
    with tf.GradientTape() as tape:
        x = network.hidden(TOKENS[None, :-1])[0]
        loss = tf.reduce_mean(network.losses(x, TOKENS[None, 1:])[0])
    gradient = tape.gradient(loss, network.weights["model/h1/mlp/c_fc/w"])
    assert gradient.shape == (1, 20, 36) and np.isfinite(gradient).all()


def test_loss_is_that_of_the_equations(plain_model, network):
    assert plain_model.loss(TOKENS) == pytest.approx(
        oracle.loss(weights_of(network), 4, TOKENS), abs=1e-5
    )


def test_a_cache_changes_nothing_but_the_speed(network, either):
    whole = network(TOKENS[None]).numpy()
    shorter = [TOKENS[:9], TOKENS[:5]]
    logits, cache = either.read(shorter, 16)
    np.testing.assert_allclose(logits, [whole[0, 8], whole[0, 4]], atol=TOLERANCE)
    for at in range(4):
        position = np.array([9 + at, 5 + at], np.int32)
        logits, cache = either.feed(cache, TOKENS[position], position)
        np.testing.assert_allclose(logits, whole[0, position], atol=TOLERANCE)


def test_rows_of_a_batch_do_not_see_each_other(network):
    other = np.roll(TOKENS, 3)
    both = network(np.stack([TOKENS, other]))
    np.testing.assert_allclose(both[0], network(TOKENS[None])[0], atol=TOLERANCE)
    np.testing.assert_allclose(both[1], network(other[None])[0], atol=TOLERANCE)


def test_gradients_are_those_of_finite_differences(network):
    weights = weights_of(network)
    name = "model/h1/mlp/c_fc/w"
    with tf.GradientTape() as tape:
        x = network.hidden(TOKENS[None, :-1])[0]
        loss = tf.reduce_mean(network.losses(x, TOKENS[None, 1:])[0])
    gradient = tape.gradient(loss, network.weights[name])[0, 3, 7]
    changed = {}
    for sign in (1, -1):
        moved = weights[name].astype(np.float64)
        moved[0, 3, 7] += sign * 1e-4
        changed[sign] = oracle.loss({**weights, name: moved}, 4, TOKENS)
    assert float(gradient) == pytest.approx((changed[1] - changed[-1]) / 2e-4, rel=1e-3, abs=1e-6)


def test_bfloat16_is_close_and_keeps_logits_in_float32(network):
    small = GPT2(network.config, lambda name, _: network.weights[name], "bfloat16")
    logits = small(TOKENS[None])
    assert logits.dtype == tf.float32
    expected = network(TOKENS[None])
    assert 0 < np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_initial_weights_have_the_deviations_of_the_release():
    config = ModelConfig(n_vocab=500, n_ctx=200, n_embd=64, n_head=2, n_layer=8)
    initial = random_weights(config, seed=1)
    deviation = {n: initial(n, s).std() for n, s in weight_shapes(config).items()}
    assert deviation["model/wte"] == pytest.approx(0.02, rel=0.03)
    assert deviation["model/wpe"] == pytest.approx(0.01, rel=0.03)
    assert deviation["model/h3/mlp/c_fc/w"] == pytest.approx(0.02, rel=0.03)
    assert deviation["model/h3/mlp/c_proj/w"] == pytest.approx(0.02 / 4, rel=0.03)
    assert deviation["model/h3/attn/c_proj/w"] == pytest.approx(0.02 / 4, rel=0.03)
    assert deviation["model/ln_f/g"] == deviation["model/h0/mlp/c_fc/b"] == 0


def test_the_124m_model_has_124_million_weights():
    config = ModelConfig(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)
    assert sum(np.prod(s) for s in weight_shapes(config).values()) == 124_439_808


@pytest.mark.parametrize("folder", golden_models("gpt2-openai") + golden_models("gpt2_ml"))
def test_logits_and_losses_equal_the_original_program(folder):
    check_golden(checkpoint.load(folder), np.load(folder / "expected.npz"))


@pytest.mark.parametrize("rows", [1024, 24, 7])
def test_the_loss_in_parts_has_the_gradients_of_the_whole(network, monkeypatch, rows):
    monkeypatch.setattr("gpt2cli.model.network.LOGIT_ROWS", rows)
    tokens = np.stack([TOKENS, np.roll(TOKENS, 3)])
    x, targets = network.hidden(tokens[:, :-1])[0], tokens[:, 1:]
    weight = tf.random.stateless_uniform(targets.shape, [1, 2])
    with tf.GradientTape() as tape:
        tape.watch([x, network.wte])
        nats, hits = network.losses(x, targets)
        loss = tf.reduce_sum(nats * weight)
    expected = [loss, tf.reduce_sum(hits * weight), *tape.gradient(loss, [x, network.wte])]
    found = tf.function(network.loss_gradients)(x, targets, weight)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)

"""One step of training against float64, and the flags against each other."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import lively

from gpt2cli import dataset, model, training
from gpt2cli.config import ModelConfig, TrainConfig

SIZES = ModelConfig(n_vocab=97, n_ctx=24, n_embd=32, n_head=4, n_layer=2)
BASE = TrainConfig(dataset="-", learning_rate=0.01)


def batch(rows=4, length=16, seed=0):
    tokens = np.random.default_rng(seed).integers(97, size=[rows, length + 1]).astype(np.int32)
    return dataset.Batch(tokens[:, :-1], tokens[:, 1:], np.ones([rows, length], np.float32))


def train(steps=3, data=None, **changes):
    """Losses, and the weights by name, after some steps."""
    network = lively(SIZES)
    trainer = training.Trainer(network, dataclasses.replace(BASE, **changes))
    losses = [trainer.step(i, data or batch(seed=i)) for i in range(steps)]
    return losses, {name: v.numpy() for name, v in network.weights.items()}


def assert_same(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a[0], b[0], atol=tolerance)
    for name in a[1]:
        np.testing.assert_allclose(a[1][name], b[1][name], atol=tolerance, err_msg=name)


def test_accumulated_batches_are_one_large_batch():
    assert_same(train(optimizer="sgd"), train(optimizer="sgd", accumulate_gradients=2))
    assert_same(train(optimizer="sgd"), train(optimizer="sgd", accumulate_gradients=4))


def test_recomputation_changes_no_number_also_with_accumulation():
    plain = train(optimizer="sgd")
    assert_same(plain, train(optimizer="sgd", memory_saving_gradients=True))
    both = train(optimizer="sgd", memory_saving_gradients=True, accumulate_gradients=2)
    assert_same(plain, both)


def test_the_loss_falls_with_every_optimizer_and_precision():
    for optimizer, rate in (("adam", 0.003), ("sgd", 0.3), ("adamw", 0.003)):
        for precision in ("float32", "bfloat16"):
            network = lively(SIZES)
            network = model.GPT2(SIZES, lambda n, s, w=network: w.weights[n], precision, "float32")
            config = dataclasses.replace(BASE, optimizer=optimizer, learning_rate=rate)
            trainer = training.Trainer(network, config)
            losses = [trainer.step(i, batch(seed=1)) for i in range(12)]
            assert losses[-1] < 0.8 * losses[0], (optimizer, precision, losses)
            assert all(v.dtype == np.float32 for v in network.weights.values())


def test_adam_is_the_one_of_tf1():
    """tf.compat.v1.train.AdamOptimizer: the correction is in the rate, epsilon 1e-8 outside.

    Two steps: the first is the rate times the gradient's sign, whatever the moments' constants.
    """
    name, data = "model/h0/mlp/c_fc/w", [batch(seed=0), batch(seed=1)]
    start = {n: v.numpy() for n, v in lively(SIZES).weights.items()}

    def gradient(weights, of):  # a step of plain SGD with rate 1 shows it
        network = model.GPT2(SIZES, lambda n, _: weights[n])
        sgd = dataclasses.replace(BASE, optimizer="sgd", learning_rate=1.0)
        training.Trainer(network, sgd).step(0, of)
        return weights[name].astype(np.float64) - network.weights[name].numpy()

    network = model.GPT2(SIZES, lambda n, _: start[n])
    adam = training.Trainer(network, BASE)
    m = v = 0.0
    expected, clear = start[name].astype(np.float64), True
    for step in (1, 2):
        g = gradient({n: w.numpy() for n, w in network.weights.items()}, data[step - 1])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.01 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        expected = expected - rate * m / (np.sqrt(v) + 1e-8)
        clear = clear & (np.abs(g) > 1e-3)  # where the subtraction left enough digits
        adam.step(step - 1, data[step - 1])
    assert clear.sum() > 1000
    np.testing.assert_allclose(network.weights[name].numpy()[clear], expected[clear], atol=1e-5)


def test_weight_decay_spares_gains_biases_and_embeddings():
    _, plain = train(steps=1, optimizer="adamw", weight_decay=0.0)
    _, decayed = train(steps=1, optimizer="adamw", weight_decay=0.5)
    start = {n: v.numpy() for n, v in lively(SIZES).weights.items()}
    for name in plain:
        difference = decayed[name] - plain[name]
        expected = -0.01 * 0.5 * start[name] if name.endswith("/w") else 0
        np.testing.assert_allclose(difference, expected, atol=1e-6, err_msg=name)


def test_the_embeddings_stay_when_only_the_layers_are_trained():
    _, before = train(steps=0)
    _, after = train(only_train_transformer_layers=True)
    for name in before:
        assert np.array_equal(before[name], after[name]) == (not name.startswith("model/h"))


def test_clipping_bounds_the_global_norm():
    _, before = train(steps=0)
    _, after = train(steps=1, optimizer="sgd", learning_rate=1.0, clip_norm=0.25)
    moved = math.sqrt(sum(float(((after[n] - before[n]) ** 2).sum()) for n in before))
    assert moved == pytest.approx(0.25, rel=1e-3)


def test_masked_targets_do_not_count():
    short = batch(rows=2, length=8)
    pad = np.zeros([2, 8], np.int32)
    padded = dataset.Batch(
        np.concatenate([short.inputs, pad], 1),
        np.concatenate([short.targets, pad], 1),
        np.concatenate([short.mask, pad.astype(np.float32)], 1),
    )
    same = train(steps=2, data=short, optimizer="sgd"), train(steps=2, data=padded, optimizer="sgd")
    assert_same(*same)


def test_schedules_warm_up_and_come_down():
    def rates(**changes):
        config = dataclasses.replace(BASE, learning_rate=1.0, steps=10, **changes)
        return [training.learning_rate(config, step) for step in range(11)]

    assert rates() == [1.0] * 11
    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(lr_schedule="linear", warmup_steps=2)[2:] == pytest.approx(
        [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
    )
    cosine = rates(lr_schedule="cosine")
    assert cosine[0] == 1 and cosine[5] == pytest.approx(0.5) and cosine[10] == pytest.approx(0)


def test_a_changing_rate_makes_no_new_graph():
    trainer = training.Trainer(lively(SIZES), dataclasses.replace(BASE, warmup_steps=5))
    for step in range(8):
        trainer.step(step, batch(rows=1 + step % 2, length=8 + step))
    assert trainer._step.experimental_get_tracing_count() == 1


def test_optimizer_state_of_another_optimizer_is_refused():
    from gpt2cli.errors import UserError

    state = {n: v.numpy() for n, v in training.Trainer(lively(SIZES), BASE).state().items()}
    other = training.Trainer(lively(SIZES), dataclasses.replace(BASE, optimizer="sgd"))
    with pytest.raises(UserError, match="--optimizer"):
        other.restore(state)

"""One step of training compared with float64, and flags compared with each other."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import lively

from gpt2cli.commands.train import TrainOptions
from gpt2cli.model import network as model
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import checkpoint, folders, reading
from gpt2cli.tensorflow import tf
from gpt2cli.text import batches as windows
from gpt2cli.training import memory as training_memory
from gpt2cli.training import optimizers
from gpt2cli.training import step as training

SIZES = ModelConfig(n_vocab=97, n_ctx=24, n_embd=32, n_head=4, n_layer=2)
BASE = TrainOptions(dataset="-", learning_rate=0.01)


def batch(rows=4, length=16, seed=0):
    tokens = np.random.default_rng(seed).integers(97, size=[rows, length + 1]).astype(np.int32)
    return windows.Batch(tokens[:, :-1], tokens[:, 1:], np.ones([rows, length], np.float32))


def train(steps=3, data=None, **changes):
    """Losses, and the weights by name, after some steps."""
    network = lively(SIZES)
    trainer = training.Trainer(network, dataclasses.replace(BASE, **changes))
    losses = [trainer.step(i, data or batch(seed=i))[0] for i in range(steps)]
    return losses, {name: v.numpy() for name, v in network.weights.items()}


def assert_same(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a[0], b[0], atol=tolerance)
    for name in a[1]:
        np.testing.assert_allclose(a[1][name], b[1][name], atol=tolerance, err_msg=name)


def test_accumulated_batches_are_one_large_batch():
    assert_same(train(optimizer="sgd"), train(optimizer="sgd", accumulate_gradients=2))
    assert_same(train(optimizer="sgd"), train(optimizer="sgd", accumulate_gradients=4))


ML = ModelConfig(n_vocab=97, n_ctx=24, n_embd=32, n_head=4, n_layer=2, arch="gpt2_ml")


@pytest.mark.parametrize("sizes", [SIZES, ML], ids=lambda sizes: sizes.arch)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_layer_by_layer_gives_the_gradients_of_all_at_once(sizes, rate):
    network, data = lively(sizes), batch()
    dropout = model.Dropout(rate, [3, 4]) if rate else None

    @tf.function
    def gradients(way):
        loss, hits, parts = way(network, *data[:2], data.mask / 64, dropout)
        return loss, hits, {v.name: g for vs, gs in parts for v, g in zip(vs, gs, strict=True)}

    whole, layers = gradients(training.all_at_once), gradients(training.layer_by_layer)
    assert float(whole[0]) == pytest.approx(float(layers[0])) and float(whole[1]) == layers[1]
    assert whole[2].keys() == layers[2].keys() == {v.name for v in network.weights.values()}
    for name, gradient in whole[2].items():
        np.testing.assert_allclose(gradient, layers[2][name], rtol=1e-4, atol=1e-5, err_msg=name)
        # a softmax does not see what is added to all its scores, as a bias of the keys is
        assert np.abs(gradient).max() > 1e-4 or "key_layer/bias" in name


@pytest.mark.parametrize("sizes", [SIZES, ML], ids=lambda sizes: sizes.arch)
def test_dropout_drops_its_share_and_the_same_for_the_same_seed(sizes):
    network, tokens = lively(sizes), batch().inputs

    def hidden(rate, *seed):
        dropout = model.Dropout(rate, list(seed)) if rate else None
        return network.hidden(tokens, dropout=dropout)[0].numpy()

    np.testing.assert_array_equal(hidden(0.1, 1, 2), hidden(0.1, 1, 2))
    assert np.abs(hidden(0.1, 1, 2) - hidden(0.1, 1, 3)).max() > 0.1
    np.testing.assert_allclose(hidden(1e-7, 1, 2), hidden(0), atol=1e-3)
    ones = model.Dropout(0.25, [5, 6]).at(7)(tf.ones([100, 100])).numpy()
    assert set(np.unique(ones)) == {0, np.float32(1 / 0.75)}
    assert (ones == 0).mean() == pytest.approx(0.25, abs=0.02)


# The original changes weights while other gradients still read them, in no fixed order. With the
# order of its embedding norm we match the first trace within 2e-5; the second's order is unknown.
ADAFACTOR_TRACES = (("a-clue-l2-h3-e24-p80", 1e-4), ("a-bert-l3-h2-e16-p64", 3e-4))


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, tolerance", ADAFACTOR_TRACES)
def test_adafactor_of_gpt2_ml_matches_the_original(golden, name, tolerance, recompute):
    """Six steps from the released slots: weights and slots within 1e-4, losses in `tolerance`."""
    folder = golden / "gpt2_ml" / name
    trace = np.load(folder / "adafactor_trace.npz")
    network = checkpoint.load(folder)
    config = dataclasses.replace(
        BASE, optimizer="adafactor_gpt2_ml", memory_saving_gradients=recompute
    )
    trainer = training.Trainer(network, config)
    slots = reading.load_slots(folders.find_checkpoint(folder), config.optimizer)
    assert trainer.adopt(slots) == len(slots) > 20
    for step, tokens in enumerate(trace["batches"]):
        inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
        # the rate of each step is the original's; a step's number makes no other difference here
        trainer.options = dataclasses.replace(config, learning_rate=float(trace["lrs"][step]))
        data = windows.Batch(inputs, targets, (targets != 0).astype(np.float32))
        loss = trainer.step(step, data).loss
        assert loss == pytest.approx(float(trace["losses"][step]), abs=tolerance)
    found = {name: v.numpy() for name, v in network.weights.items()}
    slots = {name.split("/", 1)[1]: value.numpy() for name, value in trainer.state().items()}
    checked = 0
    for key in (key for key in trace.files if key.startswith("after/")):
        name, expected = key.removeprefix("after/"), trace[key]
        if name == "global_step" or name.endswith("key_layer/bias"):
            continue  # a softmax does not see a bias of the keys: its gradient is rounding alone
        value = found[name] if name in found else slots[optimizers.slot_name(name)]
        if len(value) != len(expected):
            value = value[trace["rows"]]
        np.testing.assert_allclose(value, expected, atol=1e-4, rtol=1e-3, err_msg=name)
        checked += 1
    keys = network.config.n_layer
    assert checked == len(found) - keys + len(slots) - 1  # the last is the number of steps


def test_adafactor_matches_the_paper():
    """Algorithms 4 and 5 of arXiv 1804.04235 in float64, three steps of a matrix and a bias."""
    names = ("model/h0/mlp/c_fc/w", "model/h0/mlp/c_fc/b")
    weights = {n: v.numpy() for n, v in lively(SIZES).weights.items()}
    network = model.GPT2(SIZES, lambda n, _: weights[n])
    trainer = training.Trainer(network, dataclasses.replace(BASE, optimizer="adafactor"))
    expected = {n: np.squeeze(weights[n].astype(np.float64)) for n in names}
    moments = {n: [0.0, 0.0] for n in names}
    for t in (1, 2, 3):
        before = {n: v.numpy() for n, v in network.weights.items()}
        plain = model.GPT2(SIZES, lambda n, _, w=before: w[n])
        _, _, [(variables, gs)] = training.all_at_once(
            plain, *batch(seed=t)[:2], batch().mask / 64, None
        )
        g_of = {v.name.split(":")[0]: g.numpy() for v, g in zip(variables, gs, strict=True)}
        beta = 1 - t**-0.8
        for n in names:
            g = np.squeeze(g_of[n].astype(np.float64))
            axes = (1, 0) if g.ndim == 2 else (None,)
            square = g**2 + 1e-30
            means = [square.sum(a) if a is not None else square for a in axes]
            moments[n] = [
                beta * m + (1 - beta) * new for m, new in zip(moments[n], means, strict=False)
            ]
            v = moments[n][0]
            if g.ndim == 2:
                v = np.outer(moments[n][0], moments[n][1]) / moments[n][0].sum()
            update = g / np.sqrt(v)
            update /= max(1, np.sqrt(np.mean(update**2)))
            scale = max(1e-3, np.sqrt(np.mean(expected[n] ** 2)))
            expected[n] = expected[n] - 0.01 * scale * update
        trainer.step(t - 1, batch(seed=t))
    for n in names:
        moved = np.squeeze(network.weights[n].numpy())
        np.testing.assert_allclose(moved, expected[n], atol=2e-5)
        assert np.abs(moved - np.squeeze(weights[n])).max() > 1e-3


def test_adafactor_keeps_rows_and_columns_only():
    trainer = training.Trainer(lively(SIZES), dataclasses.replace(BASE, optimizer="adafactor"))
    kept = sum(int(np.prod(v.shape)) for v in trainer.state().values())
    weights = sum(int(np.prod(v.shape)) for v in trainer.variables)
    assert kept < 0.1 * weights


@pytest.mark.parametrize("sizes", [SIZES, ML], ids=lambda sizes: sizes.arch)
def test_no_weight_is_changed_while_a_gradient_still_reads_it(sizes):
    """A rate so high that half a new weight would show; it once did, in GPT2_ML's first norm."""
    moved = {}
    for recompute in (False, True):
        network = lively(sizes)
        before = {name: v.numpy() for name, v in network.weights.items()}
        config = dataclasses.replace(
            BASE, optimizer="sgd", learning_rate=1.0, memory_saving_gradients=recompute
        )
        training.Trainer(network, config).step(0, batch())
        moved[recompute] = {name: v.numpy() - before[name] for name, v in network.weights.items()}
    plain = lively(sizes)
    _, _, [(variables, gradients)] = training.all_at_once(
        plain, *batch()[:2], batch().mask / 64, None
    )
    for variable, gradient in zip(variables, gradients, strict=True):
        name = variable.name.split(":")[0]
        for recompute in moved:
            np.testing.assert_allclose(moved[recompute][name], -gradient, atol=2e-5, err_msg=name)


def test_recomputation_changes_no_result_even_with_accumulation():
    plain = train(optimizer="sgd")
    assert_same(plain, train(optimizer="sgd", memory_saving_gradients=True))
    both = train(optimizer="sgd", memory_saving_gradients=True, accumulate_gradients=2)
    assert_same(plain, both)
    adam = {"learning_rate": 0.001}  # its iterations count once a step, not once a layer
    assert_same(train(**adam), train(memory_saving_gradients=True, **adam), tolerance=2e-4)


def test_the_loss_falls_with_every_optimizer_and_precision():
    rates = {"adam": 0.003, "sgd": 0.3, "adamw": 0.003}
    rates |= {"adafactor": 0.02, "adafactor_gpt2_ml": 0.003}
    for optimizer, rate in rates.items():
        for precision in ("float32", "bfloat16") if optimizer == "adam" else ("float32",):
            network = lively(SIZES)
            network = model.GPT2(SIZES, lambda n, s, w=network: w.weights[n], precision, "float32")
            config = dataclasses.replace(BASE, optimizer=optimizer, learning_rate=rate)
            trainer = training.Trainer(network, config)
            losses = [trainer.step(i, batch(seed=1))[0] for i in range(12)]
            assert losses[-1] < 0.8 * losses[0], (optimizer, precision, losses)
            assert all(v.dtype == np.float32 for v in network.weights.values())


def test_adam_matches_tf1():
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
    padded = windows.Batch(
        np.concatenate([short.inputs, pad], 1),
        np.concatenate([short.targets, pad], 1),
        np.concatenate([short.mask, pad.astype(np.float32)], 1),
    )
    same = train(steps=2, data=short, optimizer="sgd"), train(steps=2, data=padded, optimizer="sgd")
    assert_same(*same)


def test_schedules_warm_up_and_come_down():
    def rates(**changes):
        config = dataclasses.replace(BASE, learning_rate=1.0, steps=10, **changes)
        return [optimizers.learning_rate(config, step) for step in range(11)]

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
        trainer.step(step, batch(rows=2, length=8), stops=step == 7)
    assert trainer._step.experimental_get_tracing_count() == 1


def test_optimizer_state_of_another_optimizer_is_rejected():
    from gpt2cli.errors import UserError

    state = {n: v.numpy() for n, v in training.Trainer(lively(SIZES), BASE).state().items()}
    other = training.Trainer(lively(SIZES), dataclasses.replace(BASE, optimizer="sgd"))
    with pytest.raises(UserError, match="--optimizer"):
        other.restore(state)


def test_the_estimate_of_memory_is_near_what_was_measured():
    """Peaks in GB on two cores: 124M at 1 x 1024, and 1558M with all flags that save memory."""
    small = ModelConfig(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)
    large = ModelConfig(n_vocab=50257, n_ctx=1024, n_embd=1600, n_head=25, n_layer=48)
    for measured, sizes, changes in (
        (4.5, small, {}),
        (3.89, small, {"precision": "bfloat16"}),
        (3.4, small, {"memory_saving_gradients": True}),
        (3.35, small, {"memory_saving_gradients": True, "precision": "bfloat16"}),
        (2.34, small, {**SAVING, "precision": "bfloat16"}),
        (9.8, large, {**SAVING, "precision": "bfloat16"}),
    ):
        config = dataclasses.replace(BASE, **changes)
        parts = training_memory.memory_needed(sizes, config)
        assert sum(parts.values()) / 1e9 == pytest.approx(measured, rel=0.2), changes


SAVING = {"memory_saving_gradients": True, "optimizer": "adafactor"}

"""Functions whose gradient is written out against their plain forms and TensorFlow's gradient."""

import numpy as np
import pytest

from gpt2cli.model import kernels
from gpt2cli.model.dropout import Dropout
from gpt2cli.tensorflow import tf


def both_gradients(ours, plain, *arguments):
    """The gradients of a function and of its plain form, for an upstream that is not all ones."""
    found = []
    for function in (ours, plain):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y = function(*arguments)
            loss = tf.reduce_sum(tf.sin(tf.cast(y, tf.float32) + 1))
        found.append((y, *tape.gradient(loss, arguments)))
    return found


def normal(*shape, seed):
    return tf.random.stateless_normal(shape, [seed, 7])


def plain_norm(x, g, b):
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return (x - mean) / tf.sqrt(variance + 1e-5) * g + b


def plain_attention(dropout=None):
    def attend(q, k, v):
        scores = tf.einsum("bhtd,bhsd->bhts", q, k)
        seen = tf.linalg.band_part(tf.ones(scores.shape[-2:], tf.bool), -1, 0)
        probs = tf.nn.softmax(tf.where(seen, scores, -np.inf))
        return tf.einsum("bhts,bhsd->bhtd", dropout * probs if dropout is not None else probs, v)

    return attend


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 64])
def test_gradients_written_out_are_those_of_the_plain_functions(length):
    wide, part = normal(2, length, 40, seed=1), [normal(2, 4, length, 5, seed=i) for i in (2, 3, 4)]
    norm = [3 * wide + 2, 1 + normal(40, seed=5), normal(40, seed=6)]
    for ours, plain, arguments in (
        (kernels.gelu, lambda x: tf.nn.gelu(x, approximate=True), [2 * wide]),
        (kernels.exact_gelu, lambda x: tf.nn.gelu(x, approximate=False), [2 * wide]),
        (kernels.ACTIVATION["silu"], tf.nn.silu, [2 * wide]),
        (kernels.layer_norm(1e-5), plain_norm, norm),
        (kernels.attend, plain_attention(), part),
    ):
        for a, b in zip(*both_gradients(ours, plain, *arguments), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_dropout_of_attention_has_the_gradient_of_its_mask():
    length, dropout = 8, Dropout(0.4, [1, 2])
    parts = [normal(2, 4, length, 5, seed=i) for i in (2, 3, 4)]
    size = length // kernels.BLOCKS
    mask = tf.concat(  # of each block of queries; the columns beyond are not seen
        [
            tf.pad(dropout.at(i)(tf.ones([2, 4, size, end])), [[0, 0]] * 3 + [[0, length - end]])
            for i, end in enumerate(range(size, length + 1, size))
        ],
        axis=2,
    )
    assert 0.2 < np.mean(mask[..., :size] == 0) < 0.6
    both = both_gradients(lambda *qkv: kernels.attend(*qkv, dropout), plain_attention(mask), *parts)
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_gradients_in_bfloat16_are_close_to_those_in_float32():
    parts = [normal(2, 4, 24, 5, seed=i) for i in (2, 3, 4)]
    wide = [3 * normal(2, 24, 40, seed=1) + 2, 1 + normal(40, seed=5), normal(40, seed=6)]
    for function, arguments in (
        (kernels.gelu, wide[:1]),
        (kernels.exact_gelu, wide[:1]),
        (kernels.ACTIVATION["silu"], wide[:1]),
        (kernels.layer_norm(1e-5), wide),
        (kernels.attend, parts),
    ):
        small = [tf.cast(argument, tf.bfloat16) for argument in arguments]
        exact = [tf.cast(argument, tf.float32) for argument in small]
        found = both_gradients(function, function, *small)[0]
        expected = both_gradients(function, function, *exact)[0]
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == tf.bfloat16
            error = np.abs(tf.cast(a, tf.float32) - b).max()
            assert error < 0.03 * np.abs(b).max() + 0.03


@pytest.mark.parametrize("gains", [True, False])
def test_product_and_its_gradient_where_bfloat16_is_fast_and_where_it_is_slow(monkeypatch, gains):
    """Both round x to bfloat16; only the fast way rounds w, too, and keeps its gradient coarse."""
    monkeypatch.setattr(kernels, "GPUS", [])
    monkeypatch.setattr(kernels.machine, "gains_by_bfloat16", lambda: gains)
    assert kernels.product_type(tf.bfloat16) == (tf.bfloat16 if gains else tf.float32)
    assert kernels.product_type(tf.float32) == tf.float32
    random = np.random.default_rng(0)
    wide = random.standard_normal((32, 48), np.float32)
    x, dy = (
        tf.cast(random.standard_normal(s, np.float32), tf.bfloat16) for s in ((8, 32), (8, 48))
    )
    w = tf.Variable(wide)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = kernels.product(x, w)
    dx, dw = tape.gradient(y, [x, w], output_gradients=dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (tf.bfloat16, tf.bfloat16, tf.float32)
    plain_x, plain_dy = (np.asarray(tf.cast(a, tf.float32)) for a in (x, dy))
    near = {"rtol": 2**-8, "atol": 0.1 if gains else 1e-5}  # half a unit in the last place
    np.testing.assert_allclose(tf.cast(y, tf.float32), plain_x @ wide, **near)
    np.testing.assert_allclose(tf.cast(dx, tf.float32), plain_dy @ wide.T, **near)
    np.testing.assert_allclose(dw, plain_x.T @ plain_dy, rtol=1e-2 if gains else 1e-5, atol=1e-4)


def test_a_slow_product_widens_its_input_again_for_the_gradient(monkeypatch):
    """A graph that shares one cast would keep the wide copy from the forward pass."""
    monkeypatch.setattr(kernels, "GPUS", [])
    monkeypatch.setattr(kernels.machine, "gains_by_bfloat16", lambda: False)

    @tf.function(autograph=False)
    def gradient(x, w):
        with tf.GradientTape() as tape:
            tape.watch(w)
            y = kernels.product(x, w)
        return tape.gradient(y, w, output_gradients=y)

    x = tf.TensorSpec([2, 4], tf.bfloat16)
    graph = gradient.get_concrete_function(x, tf.TensorSpec([4, 4], tf.float32)).graph
    early = [op for op in graph.inputs[0].consumers() if op.type == "Cast"]
    later = [op for op in graph.inputs[0].consumers() if op.type == "Identity"]
    assert len(early) == len(later) == 1, graph.inputs[0].consumers()
    assert later[0].control_inputs  # so that it is not equal to the first

"""Functions of the network whose gradient is written out, because TensorFlow's costs more.

Shape letters as in network.py. Forward, each is a plain composition. Backward, each is one compiled
program or keeps less memory. TensorFlow derives the rest of the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from gpt2cli import machine
from gpt2cli.model.dropout import Dropout
from gpt2cli.model.weights import MASKED
from gpt2cli.tensorflow import GPUS, tf

BLOCKS = 4  # of queries; a block is multiplied only with the keys that its last query sees


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function's many small steps to one program, without arrays between the steps.

    XLA compiles again for each new shape, so this is for training, where shapes stay the same. Use
    it for everything but products: XLA's bfloat16 products are slow on a CPU.
    """
    return tf.function(function, jit_compile=True, autograph=False)


def fused_gradient(function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """Return the same function of tensors with a `fused` float32 gradient.

    Only the arguments are kept for the gradient, nothing in between.
    """

    @fused
    def backward(arguments: Sequence[tf.Tensor], upstream: tf.Tensor) -> list[tf.Tensor]:
        wide = [tf.cast(argument, tf.float32) for argument in arguments]
        with tf.GradientTape() as tape:
            tape.watch(wide)
            y = function(*wide)
        gradients = tape.gradient(y, wide, output_gradients=tf.cast(upstream, tf.float32))
        return [tf.cast(g, a.dtype) for g, a in zip(gradients, arguments, strict=True)]

    @tf.custom_gradient
    def forward(*arguments: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], Any]]:
        return function(*arguments), lambda upstream: backward(arguments, upstream)

    return forward


# The tanh form of GELU is GPT-2's. The exact form, GPT2_ML's, differs by up to 5e-4.
gelu = fused_gradient(functools.partial(tf.nn.gelu, approximate=True))
exact_gelu = fused_gradient(functools.partial(tf.nn.gelu, approximate=False))
# The names are those of sizes.ACTIVATIONS.
ACTIVATION: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gelu_new": gelu,
    "gelu": exact_gelu,
    "relu": tf.nn.relu,
    "silu": fused_gradient(lambda x: x * tf.sigmoid(x)),
    "tanh": tf.tanh,
}


def product_type(kind: tf.DType) -> tf.DType:
    """Return the type in which matrices of this type are multiplied.

    It is float32 for bfloat16 on a processor that does not gain by bfloat16: rounding the results
    costs less there than the products would.
    """
    is_slow = kind == tf.bfloat16 and not GPUS and machine.gains_by_bfloat16() is False
    return tf.float32 if is_slow else kind


def product(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    """Return x [N, n_in] times w [n_in, n_out] in the type of x, multiplied in its `product_type`.

    The gradient keeps x in its own type, not a wider copy.
    """
    kind = product_type(x.dtype)
    if kind == x.dtype:
        return tf.matmul(x, tf.cast(w, kind))

    @tf.custom_gradient
    def forward(x: tf.Tensor, w: tf.Tensor) -> tuple[tf.Tensor, Any]:
        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.control_dependencies([dy]):
                # otherwise TensorFlow finds the two casts of x equal and keeps one result for both
                again = tf.identity(x)
            dy = tf.cast(dy, kind)
            dx = tf.matmul(dy, tf.cast(w, kind), transpose_b=True)
            dw = tf.matmul(tf.cast(again, kind), dy, transpose_a=True)
            return tf.cast(dx, x.dtype), tf.cast(dw, w.dtype)

        return tf.cast(tf.matmul(tf.cast(x, kind), tf.cast(w, kind)), x.dtype), gradient

    return forward(x, w)


@functools.cache  # one for all layers, to be compiled once
def layer_norm(epsilon: float) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
    """Return the function that network.LayerNorm applies to x [..., E], gain [E] and bias [E]."""

    def normalize(x: tf.Tensor, g: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        wide = tf.cast(x, tf.float32)
        mean = tf.reduce_mean(wide, -1, keepdims=True)
        centred = wide - mean
        variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
        normal = centred * tf.math.rsqrt(variance + epsilon)
        return tf.cast(normal * tf.cast(g, tf.float32) + tf.cast(b, tf.float32), x.dtype)

    return fused_gradient(normalize)


@fused
def _softmax_slope(probs: tf.Tensor, upstream: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
    """Return the gradient by the scores from the gradient by their softmax.

    Args:
        probs: the softmax.
        upstream: the gradient by it.
        mean: the mean of `upstream`, weighted by `probs`.
    """
    slope = tf.cast(upstream, tf.float32) - mean
    return tf.cast(tf.cast(probs, tf.float32) * slope, probs.dtype)


def attend(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, dropout: Dropout | None = None) -> tf.Tensor:
    """Compute causal attention in blocks of queries, so that most of the masked half is skipped.

    Only the probabilities are kept for the gradient.

    Args:
        q: [B, H, T, D], scaled.
        k: [B, H, T, D].
        v: [B, H, T, D].
        dropout: of the probabilities.

    Returns:
        [B, H, T, D].
    """
    drops = [dropout.at(i) if dropout else tf.identity for i in range(BLOCKS)]

    @tf.custom_gradient
    def blockwise(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, Any]:
        length = tf.shape(q)[2]
        ends = [length * (i + 1) // BLOCKS for i in range(BLOCKS)]
        sizes = [end - before for before, end in zip([0, *ends], ends, strict=False)]

        def split(x: tf.Tensor) -> list[tf.Tensor]:
            return tf.split(x, sizes, axis=2, num=BLOCKS)

        def probs_of(q: tf.Tensor, k: tf.Tensor, size: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
            scores = tf.cast(tf.matmul(q, k, transpose_b=True), tf.float32)
            seen = tf.range(end) <= tf.range(end - size, end)[:, None]
            return tf.cast(tf.nn.softmax(tf.where(seen, scores, MASKED)), q.dtype)

        until = [(k[:, :, :end], v[:, :, :end]) for end in ends]
        probs = [
            probs_of(q_i, k_i, size, end)
            for q_i, (k_i, _), size, end in zip(split(q), until, sizes, ends, strict=True)
        ]
        seen = zip(probs, until, drops, strict=True)
        a = tf.concat([tf.matmul(drop(p), v_i) for p, (_, v_i), drop in seen], axis=2)

        def gradient(da: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            mean = tf.reduce_sum(tf.cast(da, tf.float32) * tf.cast(a, tf.float32), -1, True)
            dq, dk, dv = [], [], []
            parts = zip(split(q), split(da), split(mean), probs, until, drops, ends, strict=True)
            for q_i, da_i, mean_i, p, (k_i, v_i), drop, end in parts:
                rest = [[0, 0], [0, 0], [0, length - end], [0, 0]]
                slope = _softmax_slope(p, drop(tf.matmul(da_i, v_i, transpose_b=True)), mean_i)
                dq.append(tf.matmul(slope, k_i))
                dk.append(tf.pad(tf.matmul(slope, q_i, transpose_a=True), rest))
                dv.append(tf.pad(tf.matmul(drop(p), da_i, transpose_a=True), rest))
            return tf.concat(dq, axis=2), tf.add_n(dk), tf.add_n(dv)

        return a, gradient

    return blockwise(q, k, v)


@fused
def cross_entropy(
    logits: tf.Tensor, targets: tf.Tensor, weight: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the weighted sums of losses and of hits, and the gradient of the loss.

    Args:
        logits: [N, V].
        targets: ids [N].
        weight: float32 [N].

    Returns:
        float32 [], float32 [], and [N, V] in the type of the logits.
    """
    logits, kind = tf.cast(logits, tf.float32), logits.dtype
    log_sum = tf.reduce_logsumexp(logits, -1)
    nats = log_sum - tf.gather(logits, targets, batch_dims=1)
    hit = tf.cast(tf.argmax(logits, -1, output_type=tf.int32) == targets, tf.float32)
    slope = tf.exp(logits - log_sum[:, None]) - tf.one_hot(targets, logits.shape[-1])
    slope = tf.cast(slope * weight[:, None], kind)
    return tf.reduce_sum(nats * weight), tf.reduce_sum(hit * weight), slope

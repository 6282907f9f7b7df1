"""Pieces of the network whose gradient is written out, because TensorFlow's own costs more.

Shape letters as in model.py. Forward they are plain compositions; backward they are one compiled
program each, or keep less. All else of the gradient is TensorFlow's.
"""

import functools

from gpt2cli.tensorflow import tf

MASKED = -1e10  # openai/gpt-2 src/model.py, mask_attn_weights

BLOCKS = 4  # of queries; each is multiplied with no more keys than its last query sees


def fused(function):
    """One program of a function's many small steps, so that none writes an array the next reads.

    XLA compiles it for each new shape, so it is for training, where shapes stay, and for what is
    no product: in bfloat16 XLA's are slow on a CPU.
    """
    return tf.function(function, jit_compile=True, autograph=False)


def fused_gradient(function):
    """The same function of tensors, whose gradient is `fused`, in float32, and keeps them alone."""

    @fused
    def backward(arguments, upstream):
        wide = [tf.cast(argument, tf.float32) for argument in arguments]
        with tf.GradientTape() as tape:
            tape.watch(wide)
            y = function(*wide)
        gradients = tape.gradient(y, wide, output_gradients=tf.cast(upstream, tf.float32))
        return [tf.cast(g, a.dtype) for g, a in zip(gradients, arguments, strict=True)]

    @tf.custom_gradient
    def forward(*arguments):
        return function(*arguments), lambda upstream: backward(arguments, upstream)

    return forward


# The tanh form of GELU. The exact form differs by up to 5e-4: another model.
gelu = fused_gradient(functools.partial(tf.nn.gelu, approximate=True))
exact_gelu = fused_gradient(functools.partial(tf.nn.gelu, approximate=False))


@functools.cache  # one for all layers, to be compiled once
def layer_norm(epsilon):
    """The function of x [..., E], gain [E] and bias [E] that model.LayerNorm is."""

    def normalize(x, g, b):
        wide = tf.cast(x, tf.float32)
        mean = tf.reduce_mean(wide, -1, keepdims=True)
        centred = wide - mean
        variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
        normal = centred * tf.math.rsqrt(variance + epsilon)
        return tf.cast(normal * tf.cast(g, tf.float32) + tf.cast(b, tf.float32), x.dtype)

    return fused_gradient(normalize)


@fused
def _softmax_slope(probs, upstream, mean):
    """The gradient of scores from that of their softmax; mean: of `upstream` by `probs`."""
    slope = tf.cast(upstream, tf.float32) - mean
    return tf.cast(tf.cast(probs, tf.float32) * slope, probs.dtype)


def attend(q, k, v, dropout=None):
    """Causal attention: q (scaled), k, v [B, H, T, D] -> [B, H, T, D].

    In blocks of queries, so that most of the masked half is not computed. For the gradient only
    the probabilities are kept.

    Args:
        dropout: a model.Dropout, of the probabilities.
    """
    drops = [dropout.at(i) if dropout else tf.identity for i in range(BLOCKS)]

    @tf.custom_gradient
    def blockwise(q, k, v):
        length = tf.shape(q)[2]
        ends = [length * (i + 1) // BLOCKS for i in range(BLOCKS)]
        sizes = [end - before for before, end in zip([0, *ends], ends, strict=False)]

        def split(x):
            return tf.split(x, sizes, axis=2, num=BLOCKS)

        def probs_of(q, k, size, end):
            scores = tf.cast(tf.matmul(q, k, transpose_b=True), tf.float32)
            seen = tf.range(end) <= tf.range(end - size, end)[:, None]
            return tf.cast(tf.nn.softmax(tf.where(seen, scores, MASKED)), q.dtype)

        until = [(k[:, :, :end], v[:, :, :end]) for end in ends]
        parts = zip(split(q), until, sizes, ends, strict=True)
        probs = [probs_of(q_i, k_i, size, end) for q_i, (k_i, _), size, end in parts]
        parts = zip(probs, until, drops, strict=True)
        a = tf.concat([tf.matmul(drop(p), v) for p, (_, v), drop in parts], axis=2)

        def gradient(da):
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
def cross_entropy(logits, targets, weight):
    """Logits [N, V], targets, weight [N] -> sums of losses and of hits, gradient of the first."""
    logits, kind = tf.cast(logits, tf.float32), logits.dtype
    log_sum = tf.reduce_logsumexp(logits, -1)
    nats = log_sum - tf.gather(logits, targets, batch_dims=1)
    hit = tf.cast(tf.argmax(logits, -1, output_type=tf.int32) == targets, tf.float32)
    slope = tf.exp(logits - log_sum[:, None]) - tf.one_hot(targets, logits.shape[-1])
    slope = tf.cast(slope * weight[:, None], kind)
    return tf.reduce_sum(nats * weight), tf.reduce_sum(hit * weight), slope

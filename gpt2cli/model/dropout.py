"""Dropout whose random numbers depend on the row in the whole batch, not on the device."""

from __future__ import annotations

from gpt2cli.tensorflow import tf

PHILOX = 1  # the generator's number in TensorFlow's operations; the default on CPU and GPU


class Dropout:
    """Set a share of a tensor to 0 and scale the rest up; the same seed drops the same.

    Args:
        rate: the share.
        seed: int32 [2], of this step.
        first: int32 [], where this tensor's first row is in the whole batch, whose other rows are
            on other devices; None if the tensor has all rows.
    """

    def __init__(self, rate: float, seed: tf.Tensor, first: tf.Tensor | None = None) -> None:
        self.rate, self.seed, self.first = rate, seed, first

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """Return x with some elements dropped; same shape."""
        if self.first is None:
            return tf.nn.experimental.stateless_dropout(x, self.rate, self.seed)
        return tf.nn.experimental.general_dropout(x, self.rate, self._uniform)

    def _uniform(self, shape: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        """Draw what stateless_dropout would draw for these rows: Philox can begin anywhere."""
        size = tf.reduce_prod(shape)
        start = tf.cast(self.first, tf.int64) * tf.cast(size // shape[0], tf.int64)
        key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=self.seed)
        skipped = tf.stack([tf.cast(start // 4, tf.uint64), tf.zeros([], tf.uint64)])
        rest = tf.cast(start % 4, tf.int32)  # a step of the counter gives four numbers
        drawn = tf.raw_ops.StatelessRandomUniformV2(
            shape=[size + rest], key=key, counter=counter + skipped, alg=PHILOX, dtype=dtype
        )
        return tf.reshape(drawn[rest:], shape)

    def at(self, place: int) -> Dropout:
        """Return the Dropout of one place in the network."""
        return Dropout(self.rate, tf.random.fold_in(self.seed, place), self.first)

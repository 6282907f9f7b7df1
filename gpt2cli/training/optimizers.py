"""The optimizers of training, and the schedule of their rate.

No other module uses private attributes of Keras. Those here are of its optimizers:
`_get_variable_index`, `_momentums`, `_velocities` and `_all_reduce_sum_gradients`. They were tried
with Keras 3.15.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gpt2cli.model.weights import MATRIX
from gpt2cli.tensorflow import tf

if TYPE_CHECKING:
    from gpt2cli.commands.train import TrainOptions


def learning_rate(options: TrainOptions, step: int) -> float:
    """Return the rate of step 0, 1, ...: a linear warm-up to --learning_rate, then the schedule."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if options.lr_schedule == "constant":
        return options.learning_rate
    done = min(1.0, (step - options.warmup_steps) / (options.steps - options.warmup_steps))
    left = 1 - done if options.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return options.learning_rate * left


class Adafactor(tf.keras.optimizers.Optimizer):
    """Adam with a second moment of one number a row and one a column (arXiv 1804.04235).

    Algorithms 4 and 5 of the paper without a first moment: the decay of the moments grows as
    1 - t ** -0.8, and the rate is relative to each weight's root mean square. GPT2_ML's variant
    (imcaspar/gpt2-ml train/optimization_adafactor.py) has a fixed decay, a plain rate, and
    decoupled weight decay. Both use the constants below.

    Args:
        learning_rate: the rate, which may be set again before each step.
        name: the first part of the variables' paths.
        gpt2_ml: use GPT2_ML's variant.
        decay: weight decay of the variant.
        spared: names of variables without weight decay.
    """

    EPSILON_1 = 1e-30  # added to the squared gradient
    EPSILON_2 = 1e-3  # the least root mean square that a rate is relative to; in the paper's only
    CLIP = 1.0  # the largest root mean square of an update
    GPT2_ML_BETA = 0.999

    def __init__(
        self,
        learning_rate: float,
        name: str,
        gpt2_ml: bool = False,
        decay: float = 0.0,
        spared: Iterable[str] = (),
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name)
        self.gpt2_ml = gpt2_ml
        self.decay = decay
        self.spared = frozenset(spared)

    def build(self, variables: Sequence[Any]) -> None:
        """Make the moments: vr [rows] and vc [columns] of a matrix, v [n] of a vector."""
        if self.built:
            return
        super().build(variables)
        self._moments = []
        for variable in variables:
            name = slot_name(variable.name.split(":")[0])
            *rows, columns = variable.shape[-2:]
            kinds = {"adafactor_v": [columns]}
            if rows:
                kinds = {"adafactor_vr": rows, "adafactor_vc": [columns]}
            self._moments.append(
                [self.add_variable(shape, name=f"{name}_{kind}") for kind, shape in kinds.items()]
            )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Change one variable; Keras calls this for each of them."""
        moments = self._moments[self._get_variable_index(variable)]
        shape = gradient.shape
        gradient = tf.reshape(tf.cast(gradient, tf.float32), shape[-2:])  # OpenAI's [1, nx, nf]
        weight = tf.reshape(tf.cast(variable, tf.float32), shape[-2:])
        step = tf.cast(self.iterations + 1, tf.float32)
        beta = self.GPT2_ML_BETA if self.gpt2_ml else 1 - tf.pow(step, -0.8)
        square = tf.square(gradient) + self.EPSILON_1
        means = [tf.reduce_mean(square, -1), tf.reduce_mean(square, 0)] if moments[1:] else [square]
        for moment, mean in zip(moments, means, strict=True):
            moment.assign(beta * moment + (1 - beta) * mean)
        if moments[1:]:
            rows, columns = (tf.convert_to_tensor(moment) for moment in moments)
            update = gradient * tf.math.rsqrt(rows / tf.reduce_mean(rows))[:, None]
            update *= tf.math.rsqrt(columns)
        else:
            update = gradient * tf.math.rsqrt(tf.convert_to_tensor(moments[0]))
        update /= tf.maximum(1.0, _root_mean_square(update) / self.CLIP)
        rate = tf.cast(learning_rate, tf.float32)
        if not self.gpt2_ml:
            rate *= tf.maximum(self.EPSILON_2, _root_mean_square(weight))
        elif self.decay and variable.name.split(":")[0] not in self.spared:
            update += self.decay * weight
        variable.assign_sub(tf.cast(tf.reshape(rate * update, shape), variable.dtype))


class Adam(tf.keras.optimizers.Adam):
    """Keras' Adam, without its temporary arrays: one operation updates a weight in place."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Change one variable; Keras calls this for each of them."""
        index = self._get_variable_index(variable)
        slots = {"m": self._momentums[index].value, "v": self._velocities[index].value}
        step = tf.cast(self.iterations + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            **{name: slot.handle for name, slot in slots.items()},
            beta1_power=tf.pow(self.beta_1, step),
            beta2_power=tf.pow(self.beta_2, step),
            lr=tf.cast(learning_rate, tf.float32),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


def slot_name(name: str) -> str:
    """Return a weight's name as Keras' variables spell it, without slashes."""
    return name.replace("/", "_")


def _root_mean_square(x: Any) -> Any:
    return tf.sqrt(tf.reduce_mean(tf.square(x)))


def make_optimizer(options: TrainOptions, variables: Sequence[Any]) -> Any:
    """Make the Keras optimizer for --optimizer, and its variables for the trained `variables`.

    Adam has the constants of tf.compat.v1.train.AdamOptimizer, which nshepperd/gpt-2 uses. The
    gradients given to `apply` must be sums over all replicas already.
    """
    # The name is part of the variables' names; Keras would name a second optimizer adam_1.
    common: dict[str, Any] = {"learning_rate": options.learning_rate, "name": options.optimizer}
    moments = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}
    names = {v.name.split(":")[0]: v for v in variables}
    if options.optimizer == "sgd":
        optimizer = tf.keras.optimizers.SGD(**common)
    elif options.optimizer == "adam":
        optimizer = Adam(**common, **moments)
    elif options.optimizer == "adafactor":
        optimizer = Adafactor(**common)
    elif options.optimizer == "adafactor_gpt2_ml":
        vectors = [name for name, v in names.items() if len(v.shape) == 1]
        optimizer = Adafactor(**common, gpt2_ml=True, decay=options.weight_decay, spared=vectors)
    else:
        optimizer = Adam(**common, **moments, weight_decay=options.weight_decay)
        spared = [v for name, v in names.items() if not MATRIX.search(name)]
        optimizer.exclude_from_weight_decay(var_list=spared)
    optimizer.build(variables)
    # the gradients are summed over replicas before they are clipped, not by Keras
    optimizer._all_reduce_sum_gradients = list
    return optimizer

"""Loss, learning-rate schedule, optimizer, and one compiled step of training."""

import math

import numpy as np

from gpt2cli.engine import tf
from gpt2cli.errors import UserError


def learning_rate(config, step):
    """The rate of step 0, 1, ...: a linear warm-up to --learning_rate, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - config.warmup_steps) / (config.steps - config.warmup_steps))
    left = 1 - done if config.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * left


def make_optimizer(config, variables):
    """The Keras optimizer that --optimizer names, its variables made for `variables`.

    Adam with the constants of tf.compat.v1.train.AdamOptimizer, which nshepperd/gpt-2 uses.
    """
    # The name is part of its variables' names; Keras would make it adam_1 the second time.
    common = {"learning_rate": config.learning_rate, "name": config.optimizer}
    moments = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}
    if config.optimizer == "sgd":
        optimizer = tf.keras.optimizers.SGD(**common)
    elif config.optimizer == "adam":
        optimizer = tf.keras.optimizers.Adam(**common, **moments)
    else:
        decay = config.weight_decay
        optimizer = tf.keras.optimizers.AdamW(**common, **moments, weight_decay=decay)
        spared = [v for v in variables if not v.name.split(":")[0].endswith("/w")]
        optimizer.exclude_from_weight_decay(var_list=spared)
    optimizer.build(variables)
    return optimizer


class Trainer:
    """A model being trained: its optimizer and the compiled step.

    Args:
        model: a GPT2 with float32 weights.
        config: TrainConfig.
    """

    def __init__(self, model, config):
        self.config = config
        self.variables = [
            variable
            for name, variable in model.weights.items()
            # as nshepperd/gpt-2 train.py: what is in a layer, so ln_f stays too
            if name.startswith("model/h") or not config.only_train_transformer_layers
        ]
        self.optimizer = make_optimizer(config, self.variables)
        recompute = config.memory_saving_gradients

        def part_of_loss(inputs, targets, mask, total):
            """[B, T] each -> this batch's share of the mean loss, and its gradients."""
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(self.variables)
                losses = model.losses(inputs, targets, recompute)
                loss = tf.reduce_sum(losses * mask) / total
            gradients = tape.gradient(loss, self.variables)
            return loss, [tf.convert_to_tensor(gradient) for gradient in gradients]

        tokens = tf.TensorSpec([config.accumulate_gradients, None, None], tf.int32)
        masks = tf.TensorSpec([config.accumulate_gradients, None, None], tf.float32)

        @tf.function(input_signature=[tokens, tokens, masks], autograph=False)
        def step(inputs, targets, mask):
            """Batches [A, B, T], whose gradients are averaged -> mean loss [] before the update."""
            total = tf.maximum(tf.reduce_sum(mask), 1.0)
            loss, gradients = part_of_loss(inputs[0], targets[0], mask[0], total)

            def add(i, loss, gradients):
                more, others = part_of_loss(inputs[i], targets[i], mask[i], total)
                return i + 1, loss + more, [a + b for a, b in zip(gradients, others, strict=True)]

            if config.accumulate_gradients > 1:
                _, loss, gradients = tf.while_loop(
                    lambda i, *_: i < config.accumulate_gradients,
                    add,
                    [tf.constant(1), loss, gradients],
                    parallel_iterations=1,
                )
            if config.clip_norm:
                gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm)
            self.optimizer.apply(gradients, self.variables)
            return loss

        self._step = step

    def step(self, number, batch):
        """Take step `number` (0, 1, ...) with a dataset.Batch of [A * B, T]; the mean loss."""
        self.optimizer.learning_rate = learning_rate(self.config, number)
        parts = self.config.accumulate_gradients
        split = (np.reshape(field, [parts, -1, field.shape[1]]) for field in batch)
        return float(self._step(*split))

    def state(self):
        """The optimizer's variables by name, the learning rate apart."""
        return {v.path: v.value for v in self.optimizer.variables if "learning_rate" not in v.path}

    def restore(self, tensors):
        """Set the optimizer's variables to {name: array} of an earlier `state`.

        Raises:
            UserError: they are those of another optimizer or of other weights.
        """
        ours = self.state()
        if {n: tuple(v.shape) for n, v in ours.items()} != {n: t.shape for n, t in tensors.items()}:
            raise UserError(
                "the run's optimizer state is of another --optimizer or another choice of trained "
                "weights. Go on with the same flags, or start a new run from its weights: "
                "--restore_from checkpoint/RUN --run_name NEW"
            )
        for name, value in tensors.items():
            ours[name].assign(value)


class Evaluator:
    """Sums of losses, for `evaluate` and the validation of `train`; traced once."""

    def __init__(self, model):
        tokens = tf.TensorSpec([None, None], tf.int32)

        @tf.function(
            input_signature=[tokens, tokens, tf.TensorSpec([None, None], tf.float32)],
            autograph=False,
        )
        def sum_of_losses(inputs, targets, mask):
            return tf.reduce_sum(model.losses(inputs, targets) * mask)

        self._sum = sum_of_losses

    def mean_loss(self, batches):
        """Batches of dataset.Batch -> (mean loss in nats a token, tokens predicted)."""
        total, count = 0.0, 0
        for batch in batches:
            total += float(self._sum(*batch))
            count += int(batch.mask.sum())
        return total / max(count, 1), count


class Events:
    """TensorBoard's event file of a run. tf.summary.scalar would need TensorBoard installed."""

    def __init__(self, folder):
        self._writer = tf.summary.create_file_writer(str(folder))

    def write(self, step, **values):
        """Record named numbers of a step."""
        for name, value in values.items():
            tf.raw_ops.WriteScalarSummary(
                writer=self._writer._resource,
                step=tf.constant(step, tf.int64),
                tag=name,
                value=value,
            )

    def close(self):
        """Write out what is buffered."""
        self._writer.close()

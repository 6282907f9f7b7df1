"""Loss, learning-rate schedule, optimizer, and one compiled step of training."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from gpt2cli.errors import UserError
from gpt2cli.inference.score import Score
from gpt2cli.model.network import IN_LAYER, LOGIT_ROWS, MATRIX, Dropout, weight_shapes
from gpt2cli.tensorflow import tf
from gpt2cli.training.devices import Replicas


def learning_rate(config, step):
    """The rate of step 0, 1, ...: a linear warm-up to --learning_rate, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - config.warmup_steps) / (config.steps - config.warmup_steps))
    left = 1 - done if config.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * left


def memory_needed(sizes, config):
    """About how many bytes training takes, by part; fitted to what was measured on a CPU.

    Within a fifth of the peak for 124M (batch 1 x 1024, with and without recomputation, float32 and
    bfloat16) and for 1558M with AdaFactor.

    Args:
        sizes: ModelConfig.
        config: TrainOptions.
    """
    width, length = sizes.n_embd, config.seq_length or sizes.n_ctx
    tokens, number = config.batch_size * length, 2 if config.precision == "bfloat16" else 4
    shapes = weight_shapes(sizes)
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    trained = [n for n in count if IN_LAYER.match(n) or not config.only_train_transformer_layers]
    weights, changed = 4 * sum(count.values()), 4 * sum(count[name] for name in trained)
    # 21 rows as wide as the model, and what is computed of the attention's probabilities
    layer = tokens * number * (21 * width + sizes.n_head * length * 5 / 8)
    if config.memory_saving_gradients:
        kept = layer + tokens * sizes.n_layer * width * number
    else:
        kept = layer * sizes.n_layer + (weights // 2 if number == 2 else 0)  # and the cast weights
    one_by_one = config.memory_saving_gradients and not config.clip_norm
    one_by_one = one_by_one and config.on_nonfinite == "stop"
    if config.accumulate_gradients > 1:
        gradients = 2 * changed
    else:  # of wte, the largest, there are some copies while it is applied
        gradients = min(4 * 4 * sizes.n_vocab * width, changed) if one_by_one else changed
    return {
        "weights": weights,
        "optimizer": 2 * changed if config.optimizer in ("adam", "adamw") else 0,
        "gradients": gradients,
        "activations": int(kept) + 2 * number * min(tokens, LOGIT_ROWS) * sizes.n_vocab,
        "TensorFlow": 800_000_000,  # with what XLA needs to compile
    }


class Adafactor(tf.keras.optimizers.Optimizer):
    """Adam's second moment kept as one number a row and one a column (arXiv 1804.04235).

    The paper's algorithms 4 and 5 without a first moment: the decay of the moments grows as
    1 - t ** -0.8, and the rate is relative, a share of each weight's root mean square. GPT2_ML's
    variant (imcaspar/gpt2-ml train/optimization_adafactor.py) has a fixed decay, a plain rate, and
    decoupled weight decay. The constants below are the same in both.

    Args:
        gpt2_ml: the variant.
        decay: weight decay of the variant.
        spared: names of variables that do not decay.
    """

    EPSILON_1 = 1e-30  # added to the squared gradient
    EPSILON_2 = 1e-3  # the least root mean square that a rate is relative to; the paper's only
    CLIP = 1.0  # the largest root mean square of an update
    GPT2_ML_BETA = 0.999

    def __init__(self, learning_rate, name, gpt2_ml=False, decay=0.0, spared=()):
        super().__init__(learning_rate=learning_rate, name=name)
        self.gpt2_ml, self.decay, self.spared = gpt2_ml, decay, frozenset(spared)

    def build(self, variables):
        """Make the moments: vr [rows] and vc [columns] of a matrix, v [n] of a vector."""
        if self.built:
            return
        super().build(variables)
        self._moments = []
        for variable in variables:
            name, (*rows, columns) = slot_name(variable.name.split(":")[0]), variable.shape[-2:]
            kinds = {"adafactor_vr": rows, "adafactor_vc": [columns]} if rows else None
            kinds = kinds or {"adafactor_v": [columns]}
            self._moments.append(
                [self.add_variable(shape, name=f"{name}_{kind}") for kind, shape in kinds.items()]
            )

    def update_step(self, gradient, variable, learning_rate):
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
    """Keras' Adam, each weight changed in one pass; Keras makes arrays as large for every step."""

    def update_step(self, gradient, variable, learning_rate):
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


def slot_name(name):
    """A weight's name in the names of Keras' variables, which hold no slash."""
    return name.replace("/", "_")


def _root_mean_square(x):
    return tf.sqrt(tf.reduce_mean(tf.square(x)))


def make_optimizer(config, variables):
    """The Keras optimizer that --optimizer names, its variables made for `variables`.

    Adam with the constants of tf.compat.v1.train.AdamOptimizer, which nshepperd/gpt-2 uses.
    """
    # The name is part of its variables' names; Keras would make it adam_1 the second time.
    common = {"learning_rate": config.learning_rate, "name": config.optimizer}
    moments = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}
    names = {v.name.split(":")[0]: v for v in variables}
    if config.optimizer == "sgd":
        optimizer = tf.keras.optimizers.SGD(**common)
    elif config.optimizer == "adam":
        optimizer = Adam(**common, **moments)
    elif config.optimizer == "adafactor":
        optimizer = Adafactor(**common)
    elif config.optimizer == "adafactor_gpt2_ml":
        vectors = [name for name, v in names.items() if len(v.shape) == 1]
        optimizer = Adafactor(**common, gpt2_ml=True, decay=config.weight_decay, spared=vectors)
    else:
        optimizer = Adam(**common, **moments, weight_decay=config.weight_decay)
        spared = [v for name, v in names.items() if not MATRIX.search(name)]
        optimizer.exclude_from_weight_decay(var_list=spared)
    optimizer.build(variables)
    return optimizer


def all_at_once(model, inputs, targets, weight, dropout):
    """Loss, hits and gradients, everything of the forward pass kept for the backward pass.

    Args:
        inputs, targets: int32 [B, T].
        weight: float32 [B, T], by which each loss counts.
        dropout: model.Dropout or None.

    Returns:
        The weighted sum of losses, that of hits, and a list of one (variables, gradients).
    """
    variables = list(model.weights.values())
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(variables)
        x = model.hidden(inputs, dropout=dropout)[0]
    loss, hits, dx, from_head = model.loss_gradients(x, targets, weight)
    of_wte, *gradients = tape.gradient(x, variables, output_gradients=dx)
    gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
    return loss, hits, [(variables, [_both(from_head, of_wte), *gradients])]


def _both(from_head, of_embedding):
    """The gradient of wte, without a second array as large: what the head adds to, and embed's."""
    return tf.tensor_scatter_nd_add(from_head, of_embedding.indices[:, None], of_embedding.values)


def layer_by_layer(model, inputs, targets, weight, dropout):
    """`all_at_once`, but only the input of each layer is kept, the rest is computed again.

    Gradient checkpointing (arXiv 1604.06174), written out so that the gradients come one layer at a
    time, the last layer's first: the third result is a generator, and what its consumer does with
    a layer's gradients is done before the layer below is computed again.
    """
    x = model.embed(inputs, dropout=dropout)
    kept = []
    for layer, block in enumerate(model.h):
        kept.append(x)
        with tf.control_dependencies([x]):  # as in GPT2.hidden
            x = block(x, dropout=dropout and dropout.at(layer))[0]
    layers = model.layer_weights()
    inside = {id(v) for variables in layers for v in variables} | {id(model.wte), id(model.wpe)}
    norms = [v for v in model.weights.values() if id(v) not in inside]  # ln_f, or that of embed
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([x, *norms])
        y = model.ln_f(x)
    loss, hits, dy, from_head = model.loss_gradients(y, targets, weight)
    dx, *of_norms = tape.gradient(y, [x, *norms], output_gradients=dy)

    def parts():
        nonlocal dx
        before = []
        for layer, block in reversed(list(enumerate(model.h))):
            variables = layers[layer]
            # A variable is read after it was assigned: nothing begins before the updates above are
            # done. Without this they lag behind, and half of the gradients are alive at once.
            before = [dx, *(v.read_value() for v in before)]
            with tf.control_dependencies(before), tf.GradientTape() as tape:
                x = tf.identity(kept[layer])
                tape.watch(x)
                y = block(x, dropout=dropout and dropout.at(layer))[0]
            dx, *gradients = tape.gradient(y, [x, *variables], output_gradients=dx)
            before = variables
            yield variables, gradients
        with tf.control_dependencies([dx]), tf.GradientTape() as tape:
            x = model.embed(inputs, dropout=dropout)
        rest = [model.wte, model.wpe, *norms]
        of_wte, of_wpe, *others = tape.gradient(x, rest, output_gradients=dx)
        others = [a if b is None else b for a, b in zip(of_norms, others, strict=True)]
        yield rest, [_both(from_head, of_wte), tf.convert_to_tensor(of_wpe), *others]

    return loss, hits, parts()


class Step(NamedTuple):
    """What came of one step: the mean loss before the update, the share of targets that were the
    likeliest token, the norm of all gradients, before clipping, and whether any host is to stop."""

    loss: float
    accuracy: float
    norm: float
    stops: float = 0.0

    @property
    def is_finite(self):
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Trainer:
    """A model being trained: its optimizer and the compiled step.

    Args:
        model: a GPT2 with float32 weights, made in the scope of the strategy.
        config: TrainOptions.
        replicas: Replicas; one device if not given.
    """

    def __init__(self, model, config, replicas=None):
        self.model, self.config, self.replicas = model, config, replicas or Replicas()
        self.variables = [
            variable
            for name, variable in model.weights.items()
            # as nshepperd/gpt-2 train.py: what is in a layer, so ln_f stays too
            if IN_LAYER.match(name) or not config.only_train_transformer_layers
        ]
        with self.replicas.strategy.scope():
            self.optimizer = make_optimizer(config, self.variables)
        # Keras sums gradients over replicas; here they are, before clipping and their norm
        self.optimizer._all_reduce_sum_gradients = list
        # Without a signature, so with known shapes, on one device and on many: else TensorFlow
        # rewrites the two graphs differently, and bfloat16's sums are rounded in another order
        self._step = tf.function(self._take_step, autograph=False)
        self._sums = tf.function(self._score, autograph=False)

    def _take_step(self, inputs, targets, mask, seeds, stops):
        """Batches [A, B, T], whose gradients are averaged -> what a Step has, each [].

        Each replica has rows of its own; the update is that of all rows, on every one of them.
        """
        told, gradients = self.replicas.run(self._learn, inputs, targets, mask, seeds, stops)
        told = self.replicas.first(told)
        if not gradients:  # they were applied in parts
            return told

        def apply():
            self.replicas.run(self._apply, gradients, self.variables)
            return True

        if self.config.on_nonfinite == "skip":
            loss, _, norm, _ = told
            tf.cond(tf.math.is_finite(loss) & tf.math.is_finite(norm), apply, lambda: False)
        else:
            apply()
        return told

    def _learn(self, inputs, targets, mask, seeds, stops):
        """On one replica: what a Step has, and the gradients of self.variables, summed over all.

        In place of the gradients (), where the update was made in parts.
        """
        batches, clip_norm = self.config.accumulate_gradients, self.config.clip_norm
        total = tf.maximum(self.replicas.sum(tf.reduce_sum(mask)), 1.0)

        def collected(i):
            """Loss, hits and all gradients of batch i, in the order of self.variables."""
            loss, hits, parts = self._parts(inputs[i], targets[i], mask[i] / total, seeds[i])
            found = {id(v): g for vs, gs in parts for v, g in zip(vs, gs, strict=True)}
            return loss, hits, [found[id(variable)] for variable in self.variables]

        def add(i, loss, hits, gradients):
            one = collected(i)
            sums = [a + b for a, b in zip(gradients, one[2], strict=True)]
            return i + 1, loss + one[0], hits + one[1], sums

        if batches == 1 and not clip_norm and self.config.on_nonfinite == "stop":
            loss, hits, parts = self._parts(inputs[0], targets[0], mask[0] / total, seeds[0])
            number = tf.identity(self.optimizer.iterations)
            squares, gradients = [], ()
            for variables, own in parts:  # each is applied and forgotten at once
                own = self.replicas.sum(list(own))
                squares += [tf.nn.l2_loss(gradient) for gradient in own]
                self.optimizer.iterations.assign(number)
                with tf.control_dependencies(squares[-len(own) :]):
                    self._apply(own, variables)
            norm = _norm(squares)
        else:
            loss, hits, gradients = collected(0)
            if batches > 1:
                _, loss, hits, gradients = tf.while_loop(
                    lambda i, *_: i < batches,
                    add,
                    [tf.constant(1), loss, hits, gradients],
                    parallel_iterations=1,
                )
            gradients = self.replicas.sum(gradients)
            norm = _norm([tf.nn.l2_loss(gradient) for gradient in gradients])
            if clip_norm:
                gradients, _ = tf.clip_by_global_norm(gradients, clip_norm, use_norm=norm)
        loss, hits, stops = self.replicas.sum([loss, hits, tf.identity(stops)])
        return (loss, hits, norm, stops), gradients

    def _parts(self, inputs, targets, weight, seed):
        """[B, T] each -> this batch's share of loss and hits, and parts of what is trained."""
        config, trained = self.config, {id(variable) for variable in self.variables}
        gradients_of = layer_by_layer if config.memory_saving_gradients else all_at_once
        first = None
        if self.replicas.count > 1:
            first = self.replicas.number() * tf.shape(inputs)[0]
        dropout = Dropout(config.dropout, seed, first) if config.dropout else None
        loss, hits, parts = gradients_of(self.model, inputs, targets, weight, dropout)
        return loss, hits, _only(parts, trained)

    def _apply(self, gradients, variables):
        """One update, begun when the last of the gradients is there.

        A variable is changed in place: a gradient still being computed would read it half new.
        """
        with tf.control_dependencies(gradients):
            gradients = [tf.identity(gradient) for gradient in gradients]
        self.optimizer.apply(gradients, variables)

    def step(self, number, batch, stops=False):
        """Take step `number` (0, 1, ...) with a windows.Batch [A * R, T] of all replicas' rows.

        Args:
            stops: whether this host is to stop; every host's Step tells of it.

        Returns:
            A Step.
        """
        self.optimizer.learning_rate = learning_rate(self.config, number)
        parts = self.config.accumulate_gradients
        split = [np.reshape(field, [parts, -1, field.shape[1]]) for field in batch]
        numbers = (number * parts + np.arange(parts)) % 2**31
        seeds = np.stack([np.full(parts, (self.config.seed or 0) % 2**31), numbers], 1)
        split = self.replicas.spread(split, axis=1)
        return Step(*map(float, self._step(*split, seeds.astype(np.int32), np.float32(stops))))

    def score(self, batches, stop=bool):
        """As `score`, with the batches spread over the replicas; each is used once.

        Args:
            stop: a function: whether this host is to stop; if any is, all of them return None.
        """
        many, sums = self.replicas.count, [0.0, 0.0, 0.0]
        batches = iter(batches)
        while group := list(itertools.islice(batches, many)):
            empty = group[0]._replace(mask=np.zeros_like(group[0].mask))
            group += [empty] * (many - len(group))
            fields = [np.concatenate(arrays) for arrays in zip(*group, strict=True)]
            *found, stops = self._sums(*self.replicas.spread(fields, axis=0), np.float32(stop()))
            if stops:
                return None
            sums = [one + float(other) for one, other in zip(sums, found, strict=True)]
        loss, hits, count = sums
        return Score(loss / max(count, 1), hits / max(count, 1), int(count))

    def _score(self, inputs, targets, mask, stops):
        """Rows [R, T] of all replicas -> the sums over all: losses, hits, tokens, `stops`."""

        def own(inputs, targets, mask, stops):
            nats, hits = self.model.losses(self.model.hidden(inputs)[0], targets)
            sums = [tf.reduce_sum(nats * mask), tf.reduce_sum(hits * mask), tf.reduce_sum(mask)]
            return self.replicas.sum([*sums, tf.identity(stops)])

        return self.replicas.first(self.replicas.run(own, inputs, targets, mask, stops))

    def state(self):
        """The optimizer's variables by name, the learning rate apart."""
        return {v.path: v.value for v in self.optimizer.variables if "learning_rate" not in v.path}

    def adopt(self, tensors):
        """Set those of the optimizer's variables that are in {name: array}; how many there were."""
        ours = self.state()
        fitting = [n for n in ours if n in tensors and tuple(ours[n].shape) == tensors[n].shape]
        with self.replicas.strategy.scope():
            for name in fitting:
                ours[name].assign(tensors[name])
        return len(fitting)

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
        with self.replicas.strategy.scope():
            for name, value in tensors.items():
                ours[name].assign(value)


def _norm(squares):
    """The norm of what these are half the sums of squares of."""
    return tf.sqrt(2 * tf.add_n(squares))


def _only(parts, trained):
    """The (variables, gradients) of `parts` without those whose id is not in `trained`."""
    for variables, gradients in parts:
        both = [(v, g) for v, g in zip(variables, gradients, strict=True) if id(v) in trained]
        if both:
            yield tuple(zip(*both, strict=True))

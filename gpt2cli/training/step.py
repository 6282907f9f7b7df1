"""Loss, gradients, and one compiled step of training.

Letters in shape comments: A batches whose gradients are averaged, B rows of a batch, T tokens of a
row, R rows of all replicas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpt2cli.errors import UserError
from gpt2cli.inference.score import Score
from gpt2cli.model.dropout import Dropout
from gpt2cli.model.network import GPT2
from gpt2cli.model.weights import IN_LAYER
from gpt2cli.tensorflow import tf
from gpt2cli.text.batches import Batch
from gpt2cli.training.devices import Replicas
from gpt2cli.training.optimizers import learning_rate, make_optimizer

if TYPE_CHECKING:
    from gpt2cli.commands.train import TrainOptions

Parts = Iterable[tuple[Sequence[Any], Sequence[Any]]]  # (variables, their gradients)


def all_at_once(
    model: GPT2, inputs: Any, targets: Any, weight: Any, dropout: Dropout | None
) -> tuple[Any, Any, Parts]:
    """Compute loss, hits and gradients; keep the whole forward pass for the backward pass.

    Args:
        inputs: int32 [B, T].
        targets: int32 [B, T].
        weight: float32 [B, T], the factor of each loss.
        dropout: the layers' dropout, or None.

    Returns:
        The weighted sums of losses and of hits, and a list of one (variables, gradients).
    """
    variables = list(model.weights.values())
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(variables)
        x = model.hidden(inputs, dropout=dropout)[0]
    loss, hits, dx, from_head = model.loss_gradients(x, targets, weight)
    of_wte, *gradients = tape.gradient(x, variables, output_gradients=dx)
    gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
    return loss, hits, [(variables, [_both(from_head, of_wte), *gradients])]


def _both(from_head: Any, of_embedding: Any) -> Any:
    """Add the embedding's sparse gradient of wte to the head's, without a second array as large."""
    return tf.tensor_scatter_nd_add(from_head, of_embedding.indices[:, None], of_embedding.values)


def layer_by_layer(
    model: GPT2, inputs: Any, targets: Any, weight: Any, dropout: Dropout | None
) -> tuple[Any, Any, Parts]:
    """Do as `all_at_once`, but keep only the input of each layer and recompute the rest.

    This is gradient checkpointing (arXiv 1604.06174), written out so that the gradients come one
    layer at a time, the last layer's first. The third result is a generator. Its consumer uses a
    layer's gradients before the layer below is recomputed.
    """
    x = model.embed(inputs, dropout=dropout)
    kept = []
    for layer, block in enumerate(model.h):
        kept.append(x)
        with tf.control_dependencies([x]):  # as in GPT2.hidden
            x = block(x, dropout=dropout and dropout.at(layer))[0]
    layers = model.layer_weights()
    inside = {id(v) for variables in layers for v in variables} | {id(model.wte), id(model.wpe)}
    norms = [v for v in model.weights.values() if id(v) not in inside]  # ln_f, or the one in embed
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([x, *norms])
        y = model.ln_f(x)
    loss, hits, dy, from_head = model.loss_gradients(y, targets, weight)
    dx, *of_norms = tape.gradient(y, [x, *norms], output_gradients=dy)

    def parts() -> Iterator[tuple[list[Any], list[Any]]]:
        nonlocal dx
        before: list[Any] = []
        for layer, block in reversed(list(enumerate(model.h))):
            variables = layers[layer]
            # Reading the variables above makes this layer wait for their updates. Otherwise the
            # updates lag behind, and half of the gradients are alive at once.
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
    """The result of one step.

    Attributes:
        loss: the mean loss before the update.
        accuracy: share of targets that were the likeliest token.
        norm: the norm of all gradients, before clipping.
        stops: more than 0 if any host was asked to stop.
    """

    loss: float
    accuracy: float
    norm: float
    stops: float = 0.0

    @property
    def is_finite(self) -> bool:
        """Whether loss and norm are finite numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Trainer:
    """A model in training: its optimizer and the compiled step.

    Args:
        model: the network with float32 weights, made in the scope of the strategy.
        options: flags of `train`.
        replicas: the devices; one if not given.
    """

    def __init__(
        self, model: GPT2, options: TrainOptions, replicas: Replicas | None = None
    ) -> None:
        self.model = model
        self.options = options
        self.replicas = replicas or Replicas()
        self.variables = [
            variable
            for name, variable in model.weights.items()
            # as nshepperd/gpt-2 train.py: only weights of the layers, so not ln_f
            if IN_LAYER.match(name) or not options.only_train_transformer_layers
        ]
        with self.replicas.strategy.scope():
            self.optimizer = make_optimizer(options, self.variables)
        # Without a signature, so with known shapes, on one device and on many. Otherwise TensorFlow
        # rewrites the two graphs differently, and bfloat16 sums are rounded in another order.
        self._step = tf.function(self._take_step, autograph=False)
        self._sums = tf.function(self._score, autograph=False)

    def _take_step(
        self, inputs: Any, targets: Any, mask: Any, seeds: Any, stops: Any
    ) -> tuple[Any, ...]:
        """Learn from batches [A, B, T]; return the fields of a Step, each [].

        Each replica has its own rows. The update is the same on all of them, from all rows.
        """
        result, gradients = self.replicas.run(self._learn, inputs, targets, mask, seeds, stops)
        result = self.replicas.first(result)
        if not gradients:  # they were applied in parts
            return result

        def apply() -> bool:
            self.replicas.run(self._apply, gradients, self.variables)
            return True

        if self.options.on_nonfinite == "skip":
            loss, _, norm, _ = result
            tf.cond(tf.math.is_finite(loss) & tf.math.is_finite(norm), apply, lambda: False)
        else:
            apply()
        return result

    def _learn(
        self, inputs: Any, targets: Any, mask: Any, seeds: Any, stops: Any
    ) -> tuple[tuple[Any, ...], Sequence[Any]]:
        """On one replica, compute a Step and the gradients of self.variables, summed over all.

        The gradients are () if they were applied in parts.
        """
        batches, clip_norm = self.options.accumulate_gradients, self.options.clip_norm
        total = tf.maximum(self.replicas.sum(tf.reduce_sum(mask)), 1.0)

        def collected(i: Any) -> tuple[Any, Any, list[Any]]:
            """Compute loss, hits and gradients of batch i, in the order of self.variables."""
            loss, hits, parts = self._parts(inputs[i], targets[i], mask[i] / total, seeds[i])
            found = {id(v): g for vs, gs in parts for v, g in zip(vs, gs, strict=True)}
            return loss, hits, [found[id(variable)] for variable in self.variables]

        def add(i: Any, loss: Any, hits: Any, gradients: list[Any]) -> tuple[Any, ...]:
            one = collected(i)
            sums = [a + b for a, b in zip(gradients, one[2], strict=True)]
            return i + 1, loss + one[0], hits + one[1], sums

        if batches == 1 and not clip_norm and self.options.on_nonfinite == "stop":
            loss, hits, parts = self._parts(inputs[0], targets[0], mask[0] / total, seeds[0])
            number = tf.identity(self.optimizer.iterations)
            squares: list[Any] = []
            gradients: Sequence[Any] = ()
            for variables, own in parts:  # each is applied and released at once
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

    def _parts(self, inputs: Any, targets: Any, weight: Any, seed: Any) -> tuple[Any, Any, Parts]:
        """Compute loss, hits and gradients of the trained variables from [B, T] each."""
        options, trained = self.options, {id(variable) for variable in self.variables}
        gradients_of = layer_by_layer if options.memory_saving_gradients else all_at_once
        first = None
        if self.replicas.count > 1:
            first = self.replicas.number() * tf.shape(inputs)[0]
        dropout = Dropout(options.dropout, seed, first) if options.dropout else None
        loss, hits, parts = gradients_of(self.model, inputs, targets, weight, dropout)
        return loss, hits, _only(parts, trained)

    def _apply(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Update variables after all these gradients are computed.

        A variable changes in place. A gradient still being computed would read a half-new weight.
        """
        with tf.control_dependencies(gradients):
            gradients = [tf.identity(gradient) for gradient in gradients]
        self.optimizer.apply(gradients, variables)

    def step(self, number: int, batch: Batch, stops: bool = False) -> Step:
        """Take step `number` (0, 1, ...) with a batch [A * R, T] of all replicas' rows.

        Args:
            number: selects the rate and the dropout.
            batch: the rows.
            stops: whether this host was asked to stop; the Step of every host reports it.
        """
        self.optimizer.learning_rate = learning_rate(self.options, number)
        parts = self.options.accumulate_gradients
        split = [np.reshape(field, [parts, -1, field.shape[1]]) for field in batch]
        numbers = (number * parts + np.arange(parts)) % 2**31
        seeds = np.stack([np.full(parts, (self.options.seed or 0) % 2**31), numbers], 1)
        split = self.replicas.spread(split, axis=1)
        result = self._step(*split, seeds.astype(np.int32), np.float32(stops))
        return Step._make(float(value) for value in result)

    def score(self, batches: Iterable[Batch], stop: Callable[[], bool] = bool) -> Score | None:
        """Score batches that are spread over the replicas; each is used once.

        Args:
            batches: the batches, the same on all hosts.
            stop: returns whether this host was asked to stop; if any was, all hosts return None.
        """
        many = self.replicas.count
        sums = [0.0, 0.0, 0.0]
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

    def _score(self, inputs: Any, targets: Any, mask: Any, stops: Any) -> list[Any]:
        """Sum losses, hits, tokens and `stops` over rows [R, T] of all replicas."""

        def own(inputs: Any, targets: Any, mask: Any, stops: Any) -> list[Any]:
            nats, hits = self.model.losses(self.model.hidden(inputs)[0], targets)
            sums = [tf.reduce_sum(nats * mask), tf.reduce_sum(hits * mask), tf.reduce_sum(mask)]
            return self.replicas.sum([*sums, tf.identity(stops)])

        return self.replicas.first(self.replicas.run(own, inputs, targets, mask, stops))

    def state(self) -> dict[str, Any]:
        """Return the optimizer's variables by name, without the learning rate."""
        return {v.path: v.value for v in self.optimizer.variables if "learning_rate" not in v.path}

    def adopt(self, tensors: Mapping[str, np.ndarray]) -> int:
        """Set the optimizer's variables that have an array of their name and shape; count them."""
        ours = self.state()
        fitting = [n for n in ours if n in tensors and tuple(ours[n].shape) == tensors[n].shape]
        with self.replicas.strategy.scope():
            for name in fitting:
                ours[name].assign(tensors[name])
        return len(fitting)

    def restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Set the optimizer's variables to the arrays of an earlier `state`.

        Raises:
            UserError: the arrays belong to another optimizer or to other weights.
        """
        ours = self.state()
        if {n: tuple(v.shape) for n, v in ours.items()} != {n: t.shape for n, t in tensors.items()}:
            raise UserError(
                "the run's optimizer state was saved with another --optimizer or another "
                "--only_train_transformer_layers. Resume with the same flags, or start the "
                "optimizer from scratch with --restore_from weights"
            )
        with self.replicas.strategy.scope():
            for name, value in tensors.items():
                ours[name].assign(value)


def _norm(squares: Sequence[Any]) -> Any:
    """Return the norm of tensors whose halved sums of squares these are."""
    return tf.sqrt(2 * tf.add_n(squares))


def _only(parts: Parts, trained: set[int]) -> Parts:
    """Keep the (variables, gradients) whose variables' ids are in `trained`."""
    for variables, gradients in parts:
        kept = [number for number, v in enumerate(variables) if id(v) in trained]
        if kept:
            yield [variables[n] for n in kept], [gradients[n] for n in kept]

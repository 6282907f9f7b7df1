"""GPT-2: token ids in, logits out. The only place that knows the network.

Read `Block` and `GPT2` first, then the boxes they are made of. GPT2_ML's layer, the cache (`Past`)
and dropout come last. The functions whose gradient is written out are in kernels.py.

Letters used in every shape comment of this package:
    B batch    T tokens in this call    S slots of a cache (one per position)
    L layers   H heads   D = E / H      E embedding width   V vocabulary

The equations, names and constants are those of openai/gpt-2 src/model.py, and with
`arch: gpt2_ml` those of imcaspar/gpt2-ml train/modeling.py, which orders a layer differently.
Weights are `tf.Variable`s with the names and shapes of the original, so that a checkpoint is read
and written by a loop over names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpt2cli.model import kernels
from gpt2cli.model.dropout import Dropout
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import Values, layer_name, weight_shapes
from gpt2cli.tensorflow import tf

Weight = Callable[[str], tf.Variable]  # a weight's name -> its variable
KeysAndValues = tuple[tf.Tensor, tf.Tensor]  # of one layer, each [B, H, T, D]

LOGIT_ROWS = 1024  # training has the logits of this many tokens in memory at once


class Block:
    """OpenAI's layer: attention, then MLP, each behind a layer norm and added to x."""

    def __init__(self, weight: Weight, name: str, config: ModelConfig) -> None:
        self.ln_1 = LayerNorm(weight, f"{name}/ln_1", config.ln_epsilon)
        inner = Linear(weight, f"{name}/attn/c_attn")
        outer = Linear(weight, f"{name}/attn/c_proj")
        self.attn = Attention(config.n_head, [inner], outer)
        self.ln_2 = LayerNorm(weight, f"{name}/ln_2", config.ln_epsilon)
        self.c_fc = Linear(weight, f"{name}/mlp/c_fc")
        self.activation = kernels.ACTIVATION[config.activation]
        self.c_proj = Linear(weight, f"{name}/mlp/c_proj")

    def __call__(
        self, x: tf.Tensor, past: Past | None = None, dropout: Dropout | None = None
    ) -> tuple[tf.Tensor, KeysAndValues]:
        """Compute the layer; see `Attention`. Dropout is where UER-py and transformers have it."""
        inside = dropout.at(0) if dropout else None
        drop = [dropout.at(place) if dropout else _keep for place in (1, 2)]
        a, new = self.attn(self.ln_1(x), past, inside)
        x = x + drop[0](a)  # [B, T, E]
        return x + drop[1](self.c_proj(self.activation(self.c_fc(self.ln_2(x))))), new


class GPT2:
    """The network and its weights.

    Args:
        config: the sizes.
        initial: returns a weight's first values.
        precision: "float32", or "bfloat16" for activations and, where that is fast, products (see
            `kernels.product_type`); norms, softmax and loss stay float32.
        weights_precision: precision of the stored weights; by default the same. Training keeps
            float32 weights under bfloat16 activations.
        hold: turns a weight's values and name into the object that is kept.

    Attributes:
        weights: the original's name -> variable.
        h: the layers, functions of (x, past, dropout).
    """

    def __init__(
        self,
        config: ModelConfig,
        initial: Values,
        precision: str = "float32",
        weights_precision: str | None = None,
        hold: Callable[..., Any] = tf.Variable,
    ) -> None:
        self.config = config
        self.dtype = tf.dtypes.as_dtype(precision)
        stored = tf.dtypes.as_dtype(weights_precision or precision)
        shapes = weight_shapes(config)
        self.weights: dict[str, tf.Variable] = {}

        def weight(name: str) -> tf.Variable:
            value = tf.cast(initial(name, shapes[name]), stored)
            self.weights[name] = hold(value, name=name)
            return self.weights[name]

        self.wte, self.wpe = (weight(name) for name in list(shapes)[:2])
        ml = config.arch == "gpt2_ml"
        norm_name = "newslm/embeddings/LayerNorm_embed_norm"
        leaves = ("gamma", "beta")
        self.ln_e = LayerNorm(weight, norm_name, config.ln_epsilon, leaves) if ml else _keep
        block = GPT2MLBlock if ml else Block
        names = [layer_name(config, layer) for layer in range(config.n_layer)]
        self.h = [block(weight, name, config) for name in names]
        self.ln_f = _keep if ml else LayerNorm(weight, "model/ln_f", config.ln_epsilon)

    def __call__(self, tokens: tf.Tensor) -> tf.Tensor:
        """Return logits float32 [B, T, V] of token ids int32 [B, T], for T up to n_ctx."""
        return self.head(self.hidden(tokens)[0])

    def layer_weights(self) -> list[list[tf.Variable]]:
        """Return each layer's variables."""
        starts = [layer_name(self.config, layer) + "/" for layer in range(self.config.n_layer)]
        return [[v for name, v in self.weights.items() if name.startswith(s)] for s in starts]

    def embed(
        self,
        tokens: tf.Tensor,
        position: tf.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """Return x [B, T, E], the input of the first layer.

        Args:
            tokens: int32 [B, T].
            position: int32 [T] or [B, T], each token's place in its text; 0, 1, ... by default.
            dropout: in training.
        """
        if position is None:
            position = tf.range(tf.shape(tokens)[1])
        x = self.normed(tf.gather(self.wte, tokens) + tf.gather(self.wpe, position))
        if dropout and self.config.arch == "gpt2":
            x = dropout.at(self.config.n_layer)(x)
        return x

    def normed(self, x: tf.Tensor) -> tf.Tensor:
        """Return the input of the first layer, from the sum of token and position embedding."""
        return tf.cast(self.ln_e(x), self.dtype)

    def hidden(
        self, tokens: tf.Tensor, dropout: Dropout | None = None
    ) -> tuple[tf.Tensor, list[KeysAndValues]]:
        """Return the result of `layers` for whole texts int32 [B, T]."""
        return self.layers(self.embed(tokens, dropout=dropout), dropout=dropout)

    def layers(
        self, x: tf.Tensor, past: list[Past] | None = None, dropout: Dropout | None = None
    ) -> tuple[tf.Tensor, list[KeysAndValues]]:
        """Run all layers and the last layer norm.

        Args:
            x: [B, T, E] from `embed`.
            past: a Past per layer; B must be 1. Without it each token looks at those before it.
            dropout: in training.

        Returns:
            x [B, T, E], and each layer's keys and values of x, [B, H, T, D].
        """
        kept = []
        for layer, block in enumerate(self.h):
            with tf.control_dependencies([x] if self.wte.dtype != self.dtype else []):
                # without it all weights are cast to bfloat16 before the first layer begins
                here = past[layer] if past else None
                x, new = block(x, here, dropout.at(layer) if dropout else None)
            kept.append(new)
        return self.ln_f(x), kept

    def head(self, x: tf.Tensor) -> tf.Tensor:
        """Return logits float32 [..., V] of [B, T, E] or [N, E]; wte is also the output matrix."""
        kind = kernels.product_type(x.dtype)
        flat = tf.cast(tf.reshape(x, [-1, self.config.n_embd]), kind)
        logits = tf.matmul(flat, tf.cast(self.wte, kind), transpose_b=True)
        logits = tf.cast(logits, tf.float32)
        rank = len(x.shape)
        return logits if rank == 2 else tf.reshape(logits, [_rows(x), -1, self.config.n_vocab])

    def losses(self, x: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return how well x [B, T, E] from `hidden` predicts targets [B, T]; see `losses`."""
        return losses(self.head(x), targets)

    def loss_gradients(
        self, x: tf.Tensor, targets: tf.Tensor, weight: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return `losses`, summed, and their gradients; only LOGIT_ROWS rows of logits at a time.

        Args:
            x: [B, T, E] from `hidden`.
            targets: ids [B, T].
            weight: float32 [B, T], by which each loss and hit counts.

        Returns:
            The weighted sums of losses and of hits, and the gradients of the loss by x and, as the
            output matrix, by wte (float32).
        """
        kind = kernels.product_type(x.dtype)
        flat = tf.cast(tf.reshape(x, [-1, x.shape[-1]]), kind)
        targets = tf.reshape(targets, [-1])
        weight = tf.reshape(weight, [-1])
        wte = tf.cast(self.wte, kind)

        def part(start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
            rows = slice(start, start + LOGIT_ROWS)
            logits = tf.matmul(flat[rows], wte, transpose_b=True)
            loss, hits, slope = kernels.cross_entropy(logits, targets[rows], weight[rows])
            dw = tf.matmul(slope, flat[rows], transpose_a=True)
            return loss, hits, tf.matmul(slope, wte), tf.cast(dw, tf.float32)

        def add(
            start: tf.Tensor, loss: tf.Tensor, hits: tf.Tensor, dx: tf.Tensor, dw: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            one = part(start)
            dx = tf.concat([dx, one[2]], axis=0)
            return start + LOGIT_ROWS, loss + one[0], hits + one[1], dx, dw + one[3]

        first = [tf.constant(LOGIT_ROWS), *part(0)]
        shapes = [[], [], [], [None, x.shape[-1]], self.wte.shape]
        _, loss, hits, dx, dw = tf.while_loop(
            lambda start, *_: start < tf.shape(flat)[0],
            add,
            first,
            [tf.TensorShape(shape) for shape in shapes],
            parallel_iterations=1,
        )
        return loss, hits, tf.cast(tf.reshape(dx, tf.shape(x)), x.dtype), dw


def losses(logits: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the nats by which each id was missed, and 1 where it was the likeliest, else 0.

    Args:
        logits: float32 [..., V].
        targets: ids [...].

    Returns:
        Two float32 [...].
    """
    hit = tf.argmax(logits, -1, output_type=tf.int32) == targets
    nats = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    return nats, tf.cast(hit, tf.float32)


class Attention:
    """Let each token look at itself and those before it, or at the tokens a Past allows.

    Args:
        n_head: heads.
        inner: the Linears that give queries, keys and values: one for all three, or one each.
        outer: the Linear that follows.
    """

    def __init__(self, n_head: int, inner: list[Linear], outer: Linear) -> None:
        self.n_head, self.inner, self.outer = n_head, inner, outer

    def __call__(
        self, x: tf.Tensor, past: Past | None = None, dropout: Dropout | None = None
    ) -> tuple[tf.Tensor, KeysAndValues]:
        """Return [B, T, E], and the keys and values of x [B, H, T, D].

        Args:
            x: [B, T, E].
            past: for B = 1 only.
            dropout: of the probabilities, in training.
        """
        parts = [linear(x) for linear in self.inner]
        parts = tf.split(parts[0], 3, axis=-1) if len(parts) == 1 else parts
        q, k, v = (self.split_heads(part) for part in parts)
        q = q * tf.cast(1 / np.sqrt(q.shape[-1]), q.dtype)
        a = _attend_to_past(q, k, v, past) if past else kernels.attend(q, k, v, dropout)
        a = tf.transpose(a, [0, 2, 1, 3])  # [B, T, H, D]
        return self.outer(tf.reshape(a, [_rows(x), -1, x.shape[-1]])), (k, v)

    def split_heads(self, x: tf.Tensor) -> tf.Tensor:
        """[B, T, E] -> [B, H, T, D]."""
        head = x.shape[-1] // self.n_head
        return tf.transpose(tf.reshape(x, [_rows(x), -1, self.n_head, head]), [0, 2, 1, 3])


class LayerNorm:
    """Shift and scale the last axis to mean 0, variance 1; then gain and bias. In float32."""

    def __init__(
        self, weight: Weight, name: str, epsilon: float, leaves: tuple[str, str] = ("g", "b")
    ) -> None:
        self.g, self.b = (weight(f"{name}/{leaf}") for leaf in leaves)
        self.normalize = kernels.layer_norm(epsilon)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """[..., E] -> [..., E]."""
        return self.normalize(x, tf.convert_to_tensor(self.g), tf.convert_to_tensor(self.b))


class Linear:
    """x w + b, where w may have OpenAI's leading axis of 1."""

    def __init__(self, weight: Weight, name: str, leaves: tuple[str, str] = ("w", "b")) -> None:
        self.w, self.b = (weight(f"{name}/{leaf}") for leaf in leaves)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """[B, T, n_in] -> [B, T, n_out]."""
        n_in, n_out = self.w.shape[-2:]
        w = tf.reshape(self.w, [n_in, n_out])
        flat = kernels.product(tf.reshape(x, [-1, n_in]), w) + tf.cast(self.b, x.dtype)
        return tf.reshape(flat, [_rows(x), -1, n_out])


def _keep(x: tf.Tensor) -> tf.Tensor:
    return x


def _rows(x: tf.Tensor) -> int | tf.Tensor:
    """Return the first size of x: a number where it is known when the graph is made."""
    return x.shape[0] or tf.shape(x)[0]


# GPT2_ML


class GPT2MLBlock:
    """GPT2_ML's layer: no norm before attention, one on each side of the MLP's sum."""

    def __init__(self, weight: Weight, name: str, config: ModelConfig) -> None:
        def linear(part: str) -> Linear:
            return Linear(weight, f"{name}/{part}", ("kernel", "bias"))

        def norm(part: str) -> LayerNorm:
            return LayerNorm(weight, f"{name}/{part}", config.ln_epsilon, ("gamma", "beta"))

        inner = [linear(f"{part}_layer") for part in ("query", "key", "value")]
        self.attn = Attention(config.n_head, inner, linear("context_projection_layer"))
        self.ln0 = norm("LayerNorm_mlp_ln0")
        self.intermediate = linear("intermediate")
        self.output = linear("output")
        self.ln1 = norm("LayerNorm_mlp_ln1")

    def __call__(
        self, x: tf.Tensor, past: Past | None = None, dropout: Dropout | None = None
    ) -> tuple[tf.Tensor, KeysAndValues]:
        """Compute the layer; see `Attention`. Dropout is where GPT2_ML has it."""
        drop = [dropout.at(place) if dropout else _keep for place in range(2)]
        a, new = self.attn(x, past)
        x = x + drop[0](a)  # [B, T, E]
        wide = kernels.exact_gelu(self.intermediate(self.ln0(x)))  # its config's "gelu"
        return self.ln1(x + drop[1](self.output(wide))), new


# The cache


class Shared(NamedTuple):
    """A beginning that all tokens of x look at.

    Args:
        keys: [1, H, S', D].
        values: [1, H, S', D].
        ones: float32 [1, 1, S' + T, 1]. A product with it adds numbers in the order of the slots,
            so that a token's sum is the same to the last bit wherever its text begins in x.
    """

    keys: tf.Tensor
    values: tf.Tensor
    ones: tf.Tensor


class Past(NamedTuple):
    """The tokens that each token of x, a single row, may look at: each has its own cache.

    Args:
        beside: float32 [T, S' + T], 0 where a token (row) looks at a slot of `shared` or at another
            token of x, MASKED elsewhere; S' is 0 without `shared`.
        seen: float32 [T, 1, 1, S], 0 for the slots of its cache that count, MASKED for the others.
        keys: [T, H, S, D]; or [1, H, S, D], the same for all.
        values: [T, H, D, S] or [1, H, D, S]: XNNPACK packs them faster than [S, D].
        shared: a beginning, or None.
    """

    beside: tf.Tensor
    seen: tf.Tensor
    keys: tf.Tensor
    values: tf.Tensor
    shared: Shared | None = None


def _attend_to_past(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, past: Past) -> tf.Tensor:
    """Take one softmax over the tokens beside each other and each one's cache.

    Not over both in one tensor, because to join them would copy the caches for each token.

    Args:
        q: [1, H, T, D], scaled.
        k: [1, H, T, D].
        v: [1, H, T, D].
        past: the caches.

    Returns:
        [1, H, T, D].
    """
    if past.shared:
        k = tf.concat([past.shared.keys, k], axis=2)
        v = tf.concat([past.shared.values, v], axis=2)
    scores = _scores(q, k) + past.beside  # [1, H, T, S' + T]
    older = _scores(_by_token(q), past.keys) + past.seen  # [T, H, 1, S]
    most = tf.reduce_max(older, -1, keepdims=True)
    most = tf.maximum(tf.reduce_max(scores, -1, keepdims=True), _by_token(most))  # [1, H, T, 1]
    scores, older = tf.exp(scores - most), tf.exp(older - _by_token(most))
    if past.shared:
        total = tf.matmul(scores, past.shared.ones)
    else:
        total = tf.reduce_sum(scores, -1, keepdims=True)
    total += _by_token(tf.reduce_sum(older, -1, keepdims=True))
    a = tf.matmul(tf.cast(scores, v.dtype), v)
    a += _by_token(tf.matmul(tf.cast(older, v.dtype), past.values, transpose_b=True))
    return a / tf.cast(total, v.dtype)


def _scores(q: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.matmul(q, k, transpose_b=True), tf.float32)


def _by_token(x: tf.Tensor) -> tf.Tensor:
    """[1, H, T, N] -> [T, H, 1, N], and back."""
    return tf.transpose(x, [2, 1, 0, 3])

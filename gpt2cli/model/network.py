"""GPT-2: token ids in, logits out. The only place that knows the network.

The functions whose gradient is written out are in kernels.py.

Letters used in every shape comment of this package:
    B batch    T tokens in this call    S slots of a cache (one a position)
    L layers   H heads   D = E / H      E embedding width   V vocabulary

The equations, names and constants are those of openai/gpt-2 src/model.py, and with
`arch: gpt2_ml` those of imcaspar/gpt2-ml train/modeling.py, which orders a layer differently.
Weights are held as `tf.Variable`s under the names and with the shapes of the original, so that a
checkpoint is read and written by a loop over names.
"""

import re
from typing import NamedTuple

import numpy as np

from gpt2cli.model import kernels
from gpt2cli.tensorflow import tf

LOGIT_ROWS = 1024  # of as many tokens training has the logits at once

WTE_STDDEV = 0.02  # openai/gpt-2 src/model.py, wte
WPE_STDDEV = 0.01  # openai/gpt-2 src/model.py, wpe: half of wte, easy to swap
W_STDDEV = 0.02  # openai/gpt-2 src/model.py, conv1d

PHILOX = 1  # the generator's number in TensorFlow's operations; on CPU and GPU it is the default

IN_LAYER = re.compile(r"model/h\d+/|newslm/layer\d+/")  # names of what is in a layer
MATRIX = re.compile(r"/(w|kernel)$")  # names of the matrices of linear maps
# The parts of a layer, for each arch: name, inputs and outputs in units of E; a norm has no inputs.
PARTS = {
    "gpt2": (
        ("ln_1", None, 1),
        ("attn/c_attn", 1, 3),
        ("attn/c_proj", 1, 1),
        ("ln_2", None, 1),
        ("mlp/c_fc", 1, 4),
        ("mlp/c_proj", 4, 1),
    ),
    "gpt2_ml": (
        ("query_layer", 1, 1),
        ("key_layer", 1, 1),
        ("value_layer", 1, 1),
        ("context_projection_layer", 1, 1),
        ("LayerNorm_mlp_ln0", None, 1),
        ("intermediate", 1, 4),
        ("output", 4, 1),
        ("LayerNorm_mlp_ln1", None, 1),
    ),
}


def layer_name(config, layer):
    """What the names of a layer's weights begin with."""
    return f"newslm/layer{layer:02d}" if config.arch == "gpt2_ml" else f"model/h{layer}"


def weight_shapes(config):
    """Every weight of the model: the original's name -> shape, in the order of the forward pass."""
    width, ml = config.n_embd, config.arch == "gpt2_ml"
    norm, linear = (("gamma", "beta"), ("kernel", "bias")) if ml else (("g", "b"), ("w", "b"))
    tables = ("embeddings/word_embed", "embeddings/pos_embed") if ml else ("wte", "wpe")
    top = "newslm/" if ml else "model/"
    shapes = {top + tables[0]: (config.n_vocab, width), top + tables[1]: (config.n_ctx, width)}

    def add(name, n_in, n_out):
        leaves = norm if n_in is None else linear
        # OpenAI's matrices are those of a convolution with a window of one
        matrix = (n_out,) if n_in is None else (n_in, n_out) if ml else (1, n_in, n_out)
        shapes.update({f"{name}/{leaves[0]}": matrix, f"{name}/{leaves[1]}": (n_out,)})

    if ml:
        add("newslm/embeddings/LayerNorm_embed_norm", None, width)
    for layer in range(config.n_layer):
        for part, n_in, n_out in PARTS[config.arch]:
            add(f"{layer_name(config, layer)}/{part}", n_in and n_in * width, n_out * width)
    if not ml:
        add("model/ln_f", None, width)
    return shapes


def random_weights(config, seed=0):
    """Initial values for training from nothing: a function of a weight's name and shape.

    Normal with OpenAI's deviations; the projections back into the residual stream are scaled by
    1 / sqrt(2 n_layer), as section 2.3 of the GPT-2 paper says (two of them a layer).
    """
    names = {name: number for number, name in enumerate(weight_shapes(config))}

    def initial(name, shape):
        leaf = name.rsplit("/", 1)[1]
        if len(shape) == 1:
            return np.full(shape, leaf in ("g", "gamma"), np.float32)
        stddev = {"wte": WTE_STDDEV, "wpe": WPE_STDDEV}.get(leaf, W_STDDEV)
        if name.endswith(("c_proj/w", "output/kernel", "context_projection_layer/kernel")):
            stddev /= np.sqrt(2 * config.n_layer)
        noise = np.random.default_rng([seed, names[name]])
        return noise.standard_normal(shape, np.float32) * np.float32(stddev)

    return initial


class Dropout:
    """Sets a share of a tensor to 0 and scales the rest up; the same seed drops the same.

    Args:
        rate: the share.
        seed: int32 [2], of this step.
        first: int32 [], the place of this tensor's first row among those of the whole batch, whose
            other rows are on other devices; None if it has all of them.
    """

    def __init__(self, rate, seed, first=None):
        self.rate, self.seed, self.first = rate, seed, first

    def __call__(self, x):
        if self.first is None:
            return tf.nn.experimental.stateless_dropout(x, self.rate, self.seed)
        return tf.nn.experimental.general_dropout(x, self.rate, self._uniform)

    def _uniform(self, shape, dtype):
        """What stateless_dropout draws for these rows: Philox can begin anywhere."""
        size = tf.reduce_prod(shape)
        start = tf.cast(self.first, tf.int64) * tf.cast(size // shape[0], tf.int64)
        key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=self.seed)
        skipped = tf.stack([tf.cast(start // 4, tf.uint64), tf.zeros([], tf.uint64)])
        rest = tf.cast(start % 4, tf.int32)  # a step of the counter gives four numbers
        drawn = tf.raw_ops.StatelessRandomUniformV2(
            shape=[size + rest], key=key, counter=counter + skipped, alg=PHILOX, dtype=dtype
        )
        return tf.reshape(drawn[rest:], shape)

    def at(self, place):
        """The Dropout of one place in the network."""
        return Dropout(self.rate, tf.random.fold_in(self.seed, place), self.first)


class LayerNorm:
    """Shift and scale the last axis to mean 0, variance 1; then gain and bias. In float32."""

    def __init__(self, weight, name, epsilon, leaves=("g", "b")):
        self.g, self.b = (weight(f"{name}/{leaf}") for leaf in leaves)
        self.normalize = kernels.layer_norm(epsilon)

    def __call__(self, x):  # [..., E] -> [..., E]
        return self.normalize(x, tf.convert_to_tensor(self.g), tf.convert_to_tensor(self.b))


class Linear:
    """x w + b, where w may have OpenAI's leading axis of 1."""

    def __init__(self, weight, name, leaves=("w", "b")):
        self.w, self.b = (weight(f"{name}/{leaf}") for leaf in leaves)

    def __call__(self, x):  # [B, T, n_in] -> [B, T, n_out]
        n_in, n_out = self.w.shape[-2:]
        w = tf.reshape(tf.cast(self.w, x.dtype), [n_in, n_out])
        flat = tf.matmul(tf.reshape(x, [-1, n_in]), w) + tf.cast(self.b, x.dtype)
        return tf.reshape(flat, [_rows(x), -1, n_out])


class Past(NamedTuple):
    """What the tokens of the only row of x may look at: each has a cache of its own.

    beside: float32 [T, T], 0 where a token (row) looks at another of x, MASKED elsewhere.
    seen: float32 [T, 1, 1, S], 0 for the slots of its cache that count, MASKED for the others.
    keys, values: [T, H, S, D], the caches; or [1, H, S, D], the same for all.
    """

    beside: tf.Tensor
    seen: tf.Tensor
    keys: tf.Tensor
    values: tf.Tensor


class Attention:
    """Each token looks at itself and those before it, or at what a Past says.

    Args:
        n_head: heads.
        inner: the Linears that give queries, keys and values: one for all, or one each.
        outer: the Linear that follows.
    """

    def __init__(self, n_head, inner, outer):
        self.n_head, self.inner, self.outer = n_head, inner, outer

    def __call__(self, x, past=None, dropout=None):
        """X [B, T, E] -> [B, T, E] and the keys and values of x [B, H, T, D].

        Args:
            past: a Past, for B = 1 only.
            dropout: of the probabilities, in training.
        """
        parts = [linear(x) for linear in self.inner]
        parts = tf.split(parts[0], 3, axis=-1) if len(parts) == 1 else parts
        q, k, v = (self.split_heads(part) for part in parts)
        q = q * tf.cast(1 / np.sqrt(q.shape[-1]), q.dtype)
        a = self.join(q, k, v, past) if past else kernels.attend(q, k, v, dropout)
        a = tf.transpose(a, [0, 2, 1, 3])  # [B, T, H, D]
        return self.outer(tf.reshape(a, [_rows(x), -1, x.shape[-1]])), (k, v)

    @staticmethod
    def join(q, k, v, past):
        """One softmax over the tokens beside each other [1, H, T, T] and each one's cache.

        Not over both in one tensor, because a cut at S is a shape that LiteRT cannot foresee.
        """
        scores = _scores(q, k) + past.beside  # [1, H, T, T]
        older = _scores(_by_token(q), past.keys) + past.seen  # [T, H, 1, S]
        most = tf.reduce_max(older, -1, keepdims=True)
        most = tf.maximum(tf.reduce_max(scores, -1, keepdims=True), _by_token(most))  # [1, H, T, 1]
        scores, older = tf.exp(scores - most), tf.exp(older - _by_token(most))
        total = tf.reduce_sum(older, -1, keepdims=True)
        total = tf.reduce_sum(scores, -1, keepdims=True) + _by_token(total)
        a = tf.matmul(tf.cast(scores, v.dtype), v)
        a += _by_token(tf.matmul(tf.cast(older, v.dtype), past.values))
        return a / tf.cast(total, v.dtype)

    def split_heads(self, x):
        """[B, T, E] -> [B, H, T, D]"""
        head = x.shape[-1] // self.n_head
        return tf.transpose(tf.reshape(x, [_rows(x), -1, self.n_head, head]), [0, 2, 1, 3])


def _rows(x):
    """The first size of x: a number where it is known when the graph is made."""
    return x.shape[0] or tf.shape(x)[0]


def _scores(q, k):
    return tf.cast(tf.matmul(q, k, transpose_b=True), tf.float32)


def _by_token(x):
    """[1, H, T, N] -> [T, H, 1, N], and back."""
    return tf.transpose(x, [2, 1, 0, 3])


class GPT2Block:
    """OpenAI's layer: attention, then MLP, each behind a layer norm and added to x."""

    def __init__(self, weight, name, config):
        self.ln_1 = LayerNorm(weight, f"{name}/ln_1", config.ln_epsilon)
        inner = Linear(weight, f"{name}/attn/c_attn")
        outer = Linear(weight, f"{name}/attn/c_proj")
        self.attn = Attention(config.n_head, [inner], outer)
        self.ln_2 = LayerNorm(weight, f"{name}/ln_2", config.ln_epsilon)
        self.c_fc = Linear(weight, f"{name}/mlp/c_fc")
        self.c_proj = Linear(weight, f"{name}/mlp/c_proj")

    def __call__(self, x, past=None, dropout=None):
        """As Attention; dropout where UER-py and transformers do."""
        drop = [dropout.at(place) if dropout else _keep for place in range(3)]
        a, new = self.attn(self.ln_1(x), past, dropout and drop[0])
        x = x + drop[1](a)
        return x + drop[2](self.c_proj(kernels.gelu(self.c_fc(self.ln_2(x))))), new


class GPT2MLBlock:
    """GPT2_ML's layer: no norm before attention, one on each side of the MLP's sum."""

    def __init__(self, weight, name, config):
        def linear(part):
            return Linear(weight, f"{name}/{part}", ("kernel", "bias"))

        def norm(part):
            return LayerNorm(weight, f"{name}/{part}", config.ln_epsilon, ("gamma", "beta"))

        inner = [linear(f"{part}_layer") for part in ("query", "key", "value")]
        self.attn = Attention(config.n_head, inner, linear("context_projection_layer"))
        self.ln0 = norm("LayerNorm_mlp_ln0")
        self.intermediate = linear("intermediate")
        self.output = linear("output")
        self.ln1 = norm("LayerNorm_mlp_ln1")

    def __call__(self, x, past=None, dropout=None):
        """As Attention; dropout where GPT2_ML does."""
        drop = [dropout.at(place) if dropout else _keep for place in range(2)]
        a, new = self.attn(x, past)
        x = x + drop[0](a)
        wide = kernels.exact_gelu(self.intermediate(self.ln0(x)))  # its config's "gelu"
        return self.ln1(x + drop[1](self.output(wide))), new


def _keep(x):
    return x


class GPT2:
    """The network and its weights.

    Args:
        config: the sizes, a ModelConfig.
        initial: function of a weight's name and shape that gives its first value (an array).
        precision: "float32", or "bfloat16" for activations and products; norms, softmax and loss
            stay float32.
        weights_precision: of the stored weights; by default that of the activations. Training
            keeps float32 weights under bfloat16 activations.
        hold: function of a value and a weight's name that gives what is kept of it.

    Attributes:
        weights: the original's name -> variable.
        h: the layers, functions of (x, past, dropout).
    """

    def __init__(
        self, config, initial, precision="float32", weights_precision=None, hold=tf.Variable
    ):
        self.config = config
        self.dtype = tf.dtypes.as_dtype(precision)
        stored = tf.dtypes.as_dtype(weights_precision or precision)
        shapes = weight_shapes(config)
        self.weights = {}

        def weight(name):
            value = tf.cast(initial(name, shapes[name]), stored)
            self.weights[name] = hold(value, name=name)
            return self.weights[name]

        self.wte, self.wpe = (weight(name) for name in list(shapes)[:2])
        ml = config.arch == "gpt2_ml"
        norm_name = "newslm/embeddings/LayerNorm_embed_norm"
        leaves = ("gamma", "beta")
        self.ln_e = LayerNorm(weight, norm_name, config.ln_epsilon, leaves) if ml else _keep
        block = GPT2MLBlock if ml else GPT2Block
        names = [layer_name(config, layer) for layer in range(config.n_layer)]
        self.h = [block(weight, name, config) for name in names]
        self.ln_f = _keep if ml else LayerNorm(weight, "model/ln_f", config.ln_epsilon)

    def __call__(self, tokens):
        """Token ids int32 [B, T] -> logits float32 [B, T, V], for T up to n_ctx."""
        return self.head(self.hidden(tokens)[0])

    def layer_weights(self):
        """For each layer the list of its variables."""
        starts = [layer_name(self.config, layer) + "/" for layer in range(self.config.n_layer)]
        return [[v for name, v in self.weights.items() if name.startswith(s)] for s in starts]

    def embed(self, tokens, position=None, dropout=None):
        """Token ids [B, T] -> x [B, T, E], the input of the first layer.

        Args:
            position: int32 [T] or [B, T], each token's place in its text; 0, 1, ... if not given.
        """
        if position is None:
            position = tf.range(tf.shape(tokens)[1])
        x = self.normed(tf.gather(self.wte, tokens) + tf.gather(self.wpe, position))
        if dropout and self.config.arch == "gpt2":
            x = dropout.at(self.config.n_layer)(x)
        return x

    def normed(self, x):
        """The sum of a token's and a position's rows -> the input of the first layer."""
        return tf.cast(self.ln_e(x), self.dtype)

    def hidden(self, tokens, dropout=None):
        """Everything but the last product, for rows of their own: int32 [B, T] -> as `layers`."""
        return self.layers(self.embed(tokens, dropout=dropout), dropout=dropout)

    def layers(self, x, past=None, dropout=None):
        """All layers and the last layer norm.

        Args:
            x: [B, T, E] of `embed`.
            past: for each layer a Past; B must be 1. Without, each token looks at those before it.
            dropout: a Dropout, in training.

        Returns:
            x [B, T, E], and for each layer the keys and values [B, H, T, D] of x.
        """
        kept = []
        for layer, block in enumerate(self.h):
            with tf.control_dependencies([x] if self.wte.dtype != self.dtype else []):
                # without it all weights are cast to bfloat16 before the first layer begins
                drop = dropout and dropout.at(layer)
                x, new = block(x, past and past[layer], drop)
            kept.append(new)
        return self.ln_f(x), kept

    def head(self, x):
        """[B, T, E] or [N, E] -> logits float32 [..., V]; wte is also the output matrix."""
        flat = tf.reshape(x, [-1, self.config.n_embd])
        logits = tf.matmul(flat, tf.cast(self.wte, x.dtype), transpose_b=True)
        logits = tf.cast(logits, tf.float32)
        rank = len(x.shape)
        return logits if rank == 2 else tf.reshape(logits, [_rows(x), -1, self.config.n_vocab])

    def losses(self, x, targets):
        """How well x [B, T, E] of `hidden` predicts targets [B, T]: two float32 [B, T].

        The nats by which each was missed, and 1 where it was the likeliest token.
        """
        return losses(self.head(x), targets)

    def loss_gradients(self, x, targets, weight):
        """What training needs of `losses`, of some rows of logits at a time.

        Args:
            x, targets: as in `losses`.
            weight: float32 [B, T], by which each loss and hit counts.

        Returns:
            The weighted sum of losses and that of hits, and the loss's gradients: that of x, and
            that of wte as the output matrix, float32.
        """
        flat = tf.reshape(x, [-1, x.shape[-1]])
        targets, weight = (tf.reshape(field, [-1]) for field in (targets, weight))
        wte = tf.cast(self.wte, x.dtype)

        def part(start):
            rows = slice(start, start + LOGIT_ROWS)
            logits = tf.matmul(flat[rows], wte, transpose_b=True)
            loss, hits, slope = kernels.cross_entropy(logits, targets[rows], weight[rows])
            dw = tf.matmul(slope, flat[rows], transpose_a=True)
            return loss, hits, tf.matmul(slope, wte), tf.cast(dw, tf.float32)

        def add(start, loss, hits, dx, dw):
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
        return loss, hits, tf.reshape(dx, tf.shape(x)), dw


def losses(logits, targets):
    """Logits [..., V] and ids [...] -> the nats by which each id was missed, and 1 for a hit."""
    hit = tf.argmax(logits, -1, output_type=tf.int32) == targets
    nats = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    return nats, tf.cast(hit, tf.float32)

"""GPT-2: token ids in, logits out. The only place that knows the network.

Letters used in every shape comment of this package:
    B batch    T tokens in this call    S slots of the cache (one a position)
    L layers   H heads   D = E / H      E embedding width   V vocabulary

The equations, names and constants are those of openai/gpt-2 src/model.py. Weights are held as
`tf.Variable`s under OpenAI's names and with OpenAI's shapes, so that a checkpoint is read and
written by a loop over names.
"""

import numpy as np

from gpt2cli.engine import tf

LN_EPSILON = 1e-5  # openai/gpt-2 src/model.py, norm
MASKED = -1e10  # openai/gpt-2 src/model.py, mask_attn_weights

WTE_STDDEV = 0.02  # openai/gpt-2 src/model.py, wte
WPE_STDDEV = 0.01  # openai/gpt-2 src/model.py, wpe: half of wte, easy to swap
W_STDDEV = 0.02  # openai/gpt-2 src/model.py, conv1d


def weight_shapes(config):
    """Every weight of the model: OpenAI's name -> shape, in the order of the forward pass."""
    width = config.n_embd
    shapes = {"model/wte": (config.n_vocab, width), "model/wpe": (config.n_ctx, width)}
    for layer in range(config.n_layer):
        for name, n_in, n_out in (
            ("ln_1", None, width),
            ("attn/c_attn", width, 3 * width),
            ("attn/c_proj", width, width),
            ("ln_2", None, width),
            ("mlp/c_fc", width, 4 * width),
            ("mlp/c_proj", 4 * width, width),
        ):
            main = {"g": (n_out,)} if n_in is None else {"w": (1, n_in, n_out)}
            for leaf, shape in {**main, "b": (n_out,)}.items():
                shapes[f"model/h{layer}/{name}/{leaf}"] = shape
    return {**shapes, "model/ln_f/g": (width,), "model/ln_f/b": (width,)}


def random_weights(config, seed=0):
    """Initial values for training from nothing: a function of a weight's name and shape.

    Normal with OpenAI's deviations; the projections back into the residual stream are scaled by
    1 / sqrt(2 n_layer), as section 2.3 of the GPT-2 paper says (two of them a layer).
    """
    names = list(weight_shapes(config))

    def initial(name, shape):
        leaf = name.rsplit("/", 1)[1]
        if leaf in "gb":
            return np.full(shape, leaf == "g", np.float32)
        stddev = {"wte": WTE_STDDEV, "wpe": WPE_STDDEV}.get(leaf, W_STDDEV)
        if name.endswith("c_proj/w"):
            stddev /= np.sqrt(2 * config.n_layer)
        noise = np.random.default_rng([seed, names.index(name)])
        return noise.standard_normal(shape, np.float32) * np.float32(stddev)

    return initial


def gelu(x):
    """GPT-2's GELU, the tanh form. The exact form differs by up to 5e-4: another model."""
    return tf.nn.gelu(x, approximate=True)


class LayerNorm:
    """Shift and scale the last axis to mean 0, variance 1; then gain and bias. In float32."""

    def __init__(self, weight, name):
        self.g = weight(f"{name}/g")
        self.b = weight(f"{name}/b")

    def __call__(self, x):  # [..., E] -> [..., E]
        wide = tf.cast(x, tf.float32)
        mean = tf.reduce_mean(wide, -1, keepdims=True)
        centred = wide - mean
        variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
        normal = centred * tf.math.rsqrt(variance + LN_EPSILON)
        return tf.cast(normal * tf.cast(self.g, tf.float32) + tf.cast(self.b, tf.float32), x.dtype)


class Linear:
    """x w + b; OpenAI's conv1d with a window of one, whose w has a leading axis of 1."""

    def __init__(self, weight, name):
        self.w = weight(f"{name}/w")
        self.b = weight(f"{name}/b")

    def __call__(self, x):  # [B, T, n_in] -> [B, T, n_out]
        _, n_in, n_out = self.w.shape
        w = tf.reshape(tf.cast(self.w, x.dtype), [n_in, n_out])
        flat = tf.matmul(tf.reshape(x, [-1, n_in]), w) + tf.cast(self.b, x.dtype)
        return tf.reshape(flat, [tf.shape(x)[0], tf.shape(x)[1], n_out])


class Attention:
    """Each token looks at the tokens up to itself."""

    def __init__(self, weight, name, n_head):
        self.n_head = n_head
        self.c_attn = Linear(weight, f"{name}/c_attn")
        self.c_proj = Linear(weight, f"{name}/c_proj")

    def __call__(self, x, cache, position):
        """x [B, T, E] -> [B, T, E] and the keys and values [B, S, H, D] that it looked at.

        Without a cache they are those of x, S = T. With one, those of x are written into it at
        the slots `position` [B, T], and x looks at all slots up to its own.
        """
        q, k, v = (self.split_heads(part) for part in tf.split(self.c_attn(x), 3, axis=-1))
        if cache is not None:
            rows = tf.broadcast_to(tf.range(tf.shape(x)[0])[:, None], tf.shape(position))
            slots = tf.stack([rows, position], axis=-1)  # [B, T, 2]
            k = tf.tensor_scatter_nd_update(cache[0], slots, k)
            v = tf.tensor_scatter_nd_update(cache[1], slots, v)
        scale = tf.cast(1 / np.sqrt(q.shape[-1]), q.dtype)
        scores = tf.cast(tf.einsum("bthd,bshd->bhts", q * scale, k), tf.float32)
        seen = tf.range(tf.shape(k)[1]) <= position[:, :, None]  # [B, T, S]
        probs = tf.nn.softmax(tf.where(seen[:, None], scores, MASKED))
        a = tf.einsum("bhts,bshd->bthd", tf.cast(probs, v.dtype), v)
        return self.c_proj(tf.reshape(a, tf.shape(x))), (k, v)

    def split_heads(self, x):
        """[B, T, E] -> [B, T, H, D]"""
        head = x.shape[-1] // self.n_head
        return tf.reshape(x, [tf.shape(x)[0], tf.shape(x)[1], self.n_head, head])


class MLP:
    """Widen four times, GELU, narrow again."""

    def __init__(self, weight, name):
        self.c_fc = Linear(weight, f"{name}/c_fc")
        self.c_proj = Linear(weight, f"{name}/c_proj")

    def __call__(self, x):  # [B, T, E] -> [B, T, E]
        return self.c_proj(gelu(self.c_fc(x)))


class Block:
    """One layer: attention, then MLP, each behind a layer norm and added to x."""

    def __init__(self, weight, name, n_head):
        self.ln_1 = LayerNorm(weight, f"{name}/ln_1")
        self.attn = Attention(weight, f"{name}/attn", n_head)
        self.ln_2 = LayerNorm(weight, f"{name}/ln_2")
        self.mlp = MLP(weight, f"{name}/mlp")

    def __call__(self, x, cache, position):  # [B, T, E] -> [B, T, E]
        attended, cache = self.attn(self.ln_1(x), cache, position)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), cache


class GPT2:
    """The network and its weights.

    Args:
        config: the sizes, a ModelConfig.
        initial: function of a weight's name and shape that gives its first value (an array).
        precision: "float32", or "bfloat16" for activations and products; norms, softmax and loss
            stay float32.
        weights_precision: of the stored weights; by default that of the activations. Training
            keeps float32 weights under bfloat16 activations.
    """

    def __init__(self, config, initial, precision="float32", weights_precision=None):
        self.config = config
        self.dtype = tf.dtypes.as_dtype(precision)
        stored = tf.dtypes.as_dtype(weights_precision or precision)
        shapes = weight_shapes(config)
        self.weights = {}  # OpenAI's name -> variable

        def weight(name):
            name = f"model/{name}"
            value = tf.cast(initial(name, shapes[name]), stored)
            self.weights[name] = tf.Variable(value, name=name, shape=shapes[name])
            return self.weights[name]

        self.wte = weight("wte")
        self.wpe = weight("wpe")
        self.h = [Block(weight, f"h{layer}", config.n_head) for layer in range(config.n_layer)]
        self.ln_f = LayerNorm(weight, "ln_f")

    def __call__(self, tokens):
        """Token ids int32 [B, T] -> logits float32 [B, T, V], for T up to n_ctx."""
        return self.head(self.hidden(tokens)[0])

    def hidden(self, tokens, cache=None, position=None, recompute=False):
        """Everything but the last product.

        Args:
            tokens: int32 [B, T].
            cache: for each layer keys and values [B, S, H, D] of the tokens before; None at first.
            position: int32 [B, T], each token's place in its row, which is also its slot in the
                cache; 0, 1, ... without a cache.
            recompute: keep only each layer's input for the backward pass and compute the rest
                again there (gradient checkpointing, arXiv 1604.06174).

        Returns:
            x [B, T, E] after the last layer norm, and the new cache.
        """
        if position is None:
            position = tf.broadcast_to(tf.range(tf.shape(tokens)[1]), tf.shape(tokens))
        x = tf.gather(self.wte, tokens) + tf.gather(self.wpe, position)  # [B, T, E]
        x = tf.cast(x, self.dtype)
        new_cache = []
        for layer, block in enumerate(self.h):
            if recompute:  # no keys and values are kept, that would undo the saving
                x = tf.recompute_grad(lambda x, block=block: block(x, None, position)[0])(x)
                continue
            x, kept = block(x, cache and cache[layer], position)
            new_cache.append(kept)
        return self.ln_f(x), new_cache

    def head(self, x):
        """[..., E] -> logits float32 [..., V]; wte is also the output matrix."""
        flat = tf.reshape(x, [-1, self.config.n_embd])
        logits = tf.matmul(flat, tf.cast(self.wte, x.dtype), transpose_b=True)
        shape = tf.concat([tf.shape(x)[:-1], [self.config.n_vocab]], axis=0)
        return tf.reshape(tf.cast(logits, tf.float32), shape)

    def losses(self, tokens, targets, recompute=False):
        """Nats by which each target [B, T] was missed after tokens [B, T] -> float32 [B, T]."""
        x, _ = self.hidden(tokens, recompute=recompute)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, self.head(x))

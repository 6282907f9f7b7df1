"""The weights: names, shapes, first values. Without TensorFlow, so that it is quick to import.

The names and shapes are those of openai/gpt-2 src/model.py and, with `arch: gpt2_ml`, those of
imcaspar/gpt2-ml train/modeling.py.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt2cli.model.sizes import ModelConfig

Values = Callable[[str, tuple[int, ...]], Any]  # a weight's name and shape -> its values

MASKED = -1e10  # openai/gpt-2 src/model.py, mask_attn_weights
WTE_STDDEV = 0.02  # openai/gpt-2 src/model.py, wte
WPE_STDDEV = 0.01  # openai/gpt-2 src/model.py, wpe: half of wte, easy to swap
W_STDDEV = 0.02  # openai/gpt-2 src/model.py, conv1d

IN_LAYER = re.compile(r"model/h\d+/|newslm/layer\d+/")  # names of the weights inside a layer
MATRIX = re.compile(r"/(w|kernel)$")  # names of the matrices of linear maps

INNER = 4  # stands for the width inside the MLP: 4 E, unless n_inner says otherwise
# The parts of a layer, for each arch: name, inputs and outputs in units of E; a norm has no inputs.
PARTS: dict[str, tuple[tuple[str, int | None, int], ...]] = {
    "gpt2": (
        ("ln_1", None, 1),
        ("attn/c_attn", 1, 3),
        ("attn/c_proj", 1, 1),
        ("ln_2", None, 1),
        ("mlp/c_fc", 1, INNER),
        ("mlp/c_proj", INNER, 1),
    ),
    "gpt2_ml": (
        ("query_layer", 1, 1),
        ("key_layer", 1, 1),
        ("value_layer", 1, 1),
        ("context_projection_layer", 1, 1),
        ("LayerNorm_mlp_ln0", None, 1),
        ("intermediate", 1, INNER),
        ("output", INNER, 1),
        ("LayerNorm_mlp_ln1", None, 1),
    ),
}


def layer_name(config: ModelConfig, layer: int) -> str:
    """Return the start of the names of a layer's weights."""
    return f"newslm/layer{layer:02d}" if config.arch == "gpt2_ml" else f"model/h{layer}"


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every weight's shape by the original's name, in the order of the forward pass."""
    width, ml = config.n_embd, config.arch == "gpt2_ml"
    norm, linear = (("gamma", "beta"), ("kernel", "bias")) if ml else (("g", "b"), ("w", "b"))
    tables = ("embeddings/word_embed", "embeddings/pos_embed") if ml else ("wte", "wpe")
    top = "newslm/" if ml else "model/"
    shapes: dict[str, tuple[int, ...]] = {
        top + tables[0]: (config.n_vocab, width),
        top + tables[1]: (config.n_ctx, width),
    }

    def size(units: int) -> int:
        return config.inner_width if units == INNER else units * width

    def add(name: str, n_in: int | None, n_out: int) -> None:
        leaves = norm if n_in is None else linear
        # OpenAI's matrices are those of a convolution with a window of one
        matrix = (n_out,) if n_in is None else (n_in, n_out) if ml else (1, n_in, n_out)
        shapes.update({f"{name}/{leaves[0]}": matrix, f"{name}/{leaves[1]}": (n_out,)})

    if ml:
        add("newslm/embeddings/LayerNorm_embed_norm", None, width)
    for layer in range(config.n_layer):
        for part, n_in, n_out in PARTS[config.arch]:
            add(f"{layer_name(config, layer)}/{part}", n_in and size(n_in), size(n_out))
    if not ml:
        add("model/ln_f", None, width)
    return shapes


def random_weights(config: ModelConfig, seed: int = 0) -> Values:
    """Return the initial values for training from scratch.

    Normal with OpenAI's deviations. The projections back into the residual stream, two per layer,
    are scaled by 1 / sqrt(2 n_layer), as section 2.3 of the GPT-2 paper says.
    """
    names = {name: number for number, name in enumerate(weight_shapes(config))}

    def initial(name: str, shape: tuple[int, ...]) -> np.ndarray:
        leaf = name.rsplit("/", 1)[1]
        if len(shape) == 1:
            return np.full(shape, leaf in ("g", "gamma"), np.float32)
        stddev = {"wte": WTE_STDDEV, "wpe": WPE_STDDEV}.get(leaf, W_STDDEV)
        if name.endswith(("c_proj/w", "output/kernel", "context_projection_layer/kernel")):
            stddev /= np.sqrt(2 * config.n_layer)
        noise = np.random.default_rng([seed, names[name]])
        return noise.standard_normal(shape, np.float32) * np.float32(stddev)

    return initial

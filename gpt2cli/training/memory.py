"""The memory that a training takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gpt2cli import machine
from gpt2cli.model.kernels import product_type
from gpt2cli.model.network import LOGIT_ROWS
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import IN_LAYER, weight_shapes
from gpt2cli.tensorflow import GPUS, tf

if TYPE_CHECKING:
    from gpt2cli.commands.train import TrainOptions


def memory_needed(sizes: ModelConfig, options: TrainOptions) -> dict[str, int]:
    """Estimate the bytes that training takes, by part.

    The constants are fitted to peaks measured on a CPU. The sum is within a fifth of the peak for
    124M (batch 1 x 1024, with and without recomputation, float32 and bfloat16) and for 1558M with
    AdaFactor.
    """
    width, length = sizes.n_embd, options.seq_length or sizes.n_ctx
    tokens = options.batch_size * length
    kind = tf.dtypes.as_dtype(options.precision)
    number, wide = kind.size, product_type(kind).size  # bytes of an activation, in a product
    shapes = weight_shapes(sizes)
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    trained = [n for n in count if IN_LAYER.match(n) or not options.only_train_transformer_layers]
    weights = 4 * sum(count.values())
    changed = 4 * sum(count[name] for name in trained)
    # 13 rows as wide as the model, 2 as wide as its MLPs, and the attention's probabilities
    row = 13 * width + 2 * sizes.inner_width
    layer = tokens * number * (row + sizes.n_head * length * 5 / 8)
    if options.memory_saving_gradients:
        kept = layer + tokens * sizes.n_layer * width * number
    else:
        kept = layer * sizes.n_layer
        if wide == 2:
            kept += weights // 2  # the weights in bfloat16
    one_by_one = options.memory_saving_gradients and not options.clip_norm
    one_by_one = one_by_one and options.on_nonfinite == "stop"
    if options.accumulate_gradients > 1:
        gradients = 2 * changed
    else:  # there are some copies of wte's gradient, the largest, while it is applied
        gradients = min(4 * 4 * sizes.n_vocab * width, changed) if one_by_one else changed
    return {
        "weights": weights,
        "optimizer": 2 * changed if options.optimizer in ("adam", "adamw") else 0,
        "gradients": gradients,
        "activations": int(kept) + 2 * wide * min(tokens, LOGIT_ROWS) * sizes.n_vocab,
        "TensorFlow": 800_000_000,  # with the memory of XLA's compiler
    }


def memory_line(parts: dict[str, int]) -> str:
    """Report the bytes of `memory_needed`, and a warning if the machine has less."""
    needed = sum(parts.values())
    free = None if GPUS else machine.free_memory()  # GPU memory is not measured
    named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size > 5e7)
    line = f"training takes about {needed / 1e9:.1f} GB of memory ({named})"
    if free is None or needed < free:
        return line
    return (
        f"{line}, but only {free / 1e9:.1f} GB are free, so the process may be killed. To use "
        "less: --memory_saving_gradients, --optimizer adafactor, --precision bfloat16, a smaller "
        "--batch_size or --seq_length, --only_train_transformer_layers"
    )

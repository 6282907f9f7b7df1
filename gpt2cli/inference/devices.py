"""The device that a model runs on: the CPU, or the GPUs that TensorFlow can use.

TensorFlow is imported only where there may be a GPU.
"""

from importlib import metadata, util
from typing import Any

from gpt2cli import machine


def gpus(precision: str) -> list[Any]:
    """Return the GPUs that a model of this precision runs on; int8 always runs on the CPU."""
    if precision == "int8" or not machine.may_have_gpu() or not _has_tensorflow():
        return []
    from gpt2cli import tensorflow  # takes seconds

    return tensorflow.GPUS


def describe(precision: str) -> str:
    """Return a line that names the library and the devices, and why it is only the CPU."""
    if gpus(precision):
        from gpt2cli import tensorflow

        return tensorflow.describe_devices()
    return f"LiteRT {metadata.version('ai-edge-litert')} on CPU ({_why_no_gpu(precision)})"


def _why_no_gpu(precision: str) -> str:
    if not machine.may_have_gpu():
        return "no GPU was found"
    if precision == "int8":
        return f"--precision {precision} always runs there"
    if not _has_tensorflow():
        return "to use a GPU, install tensorflow"
    from gpt2cli import tensorflow

    return tensorflow.why_no_gpu()


def _has_tensorflow() -> bool:
    return util.find_spec("tensorflow") is not None

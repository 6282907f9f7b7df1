"""TensorFlow, imported without its log noise and with memory growth set before its first use.

Every module that needs TensorFlow takes it from here: `from gpt2cli.tensorflow import tf`.
"""

import contextlib
import os

from gpt2cli import console, signals
from gpt2cli.errors import UserError

OLDEST = (2, 18)  # as in setup.py; older versions do not support NumPy 2
QUIET = (2, 21)  # older versions announce XLA's first compilation at any log level


if not console.verbose:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only, once it is loaded
os.environ["KERAS_BACKEND"] = "tensorflow"  # a setting for other programs would break this one
# a library would replace an exception that is raised while it is loaded
with signals.deferred(), console.without_noise():
    import tensorflow as tf

    if not console.verbose:
        tf.get_logger().setLevel("ERROR")  # hides warnings about retracing several models
    VERSION = tuple(int(part) for part in tf.__version__.split(".")[:2])
    GPUS = tf.config.list_physical_devices("GPU")
    for _gpu in GPUS:  # otherwise the first use takes all the memory of a GPU
        with contextlib.suppress(RuntimeError):  # already in use, as in a notebook
            tf.config.experimental.set_memory_growth(_gpu, True)
    # XLA's first compilation, while its announcement is held back; in a run on several hosts the
    # first operation has to wait until they are connected
    if OLDEST <= VERSION < QUIET and not os.environ.get("TF_CONFIG"):
        tf.function(lambda: tf.constant(0) + 1, jit_compile=True)()

if VERSION < OLDEST:
    raise UserError(
        f"TensorFlow {tf.__version__} is too old: gpt2cli needs {'.'.join(map(str, OLDEST))} or "
        "later. Install it with: pip install -U tensorflow"
    )


def describe_devices() -> str:
    """Return a line that names TensorFlow's version and the devices, and why it is only the CPU."""
    if GPUS:
        names = [tf.config.experimental.get_device_details(g).get("device_name") for g in GPUS]
        return f"TensorFlow {tf.__version__} on " + ", ".join(
            f"{gpu.name.removeprefix('/physical_device:')} ({name or 'unknown'})"
            for gpu, name in zip(GPUS, names, strict=True)
        )
    return f"TensorFlow {tf.__version__} on CPU ({why_no_gpu()})"


def why_no_gpu() -> str:
    """Return the reason why TensorFlow uses no GPU."""
    if tf.test.is_built_with_cuda():
        return "no GPU that TensorFlow can use was found"
    return "this TensorFlow is built without CUDA"

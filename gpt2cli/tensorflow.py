"""TensorFlow, imported without its log noise and with its memory settings made before first use.

Every module that needs TensorFlow takes it from here: `from gpt2cli.tensorflow import tf`.
"""

import contextlib
import os
import sys
import tempfile

from gpt2cli import console
from gpt2cli.errors import UserError

OLDEST = (2, 18)  # setup.py says the same; below it NumPy 2 is not supported
QUIET = (2, 21)  # before it XLA announced its first compilation whatever the log level


@contextlib.contextmanager
def without_noise():
    """Keep what native code writes to standard error, and show it only if the block fails.

    TensorFlow's libraries log while they are loaded, before any setting of theirs is read.
    """
    if console.verbose:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only, once they are loaded
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except BaseException:
            noise.seek(0)
            os.write(real, noise.read())
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)


os.environ["KERAS_BACKEND"] = "tensorflow"  # a user's setting for other programs would break us
with without_noise():
    import tensorflow as tf

    # the format of LiteRT's files, which TensorFlow's own flatbuffer_utils takes from here too
    from tensorflow.lite.python import schema_py_generated as lite_schema  # noqa: F401

    if not console.verbose:
        tf.get_logger().setLevel("ERROR")  # a notebook with several models is told of retracing
    VERSION = tuple(int(part) for part in tf.__version__.split(".")[:2])
    GPUS = tf.config.list_physical_devices("GPU")
    for _gpu in GPUS:  # otherwise the first use takes all of a card's memory
        with contextlib.suppress(RuntimeError):  # a notebook has used it already
            tf.config.experimental.set_memory_growth(_gpu, True)
    # the first operation, which several hosts may only take once they know each other
    if OLDEST <= VERSION < QUIET and not os.environ.get("TF_CONFIG"):
        tf.function(lambda: tf.constant(0) + 1, jit_compile=True)()

if VERSION < OLDEST:
    raise UserError(
        f"TensorFlow {tf.__version__} is too old, {'.'.join(map(str, OLDEST))} or later is needed. "
        "Install it with: pip install -U tensorflow"
    )


def gpus_for(precision):
    """The GPUs that a model of this precision runs on; eight bits are for the CPU."""
    return [] if precision == "int8" else GPUS


def describe_devices(precision="float32"):
    """One line for the start of a command: the devices used, and a fall-back said aloud."""
    if gpus := gpus_for(precision):
        names = [tf.config.experimental.get_device_details(g).get("device_name") for g in gpus]
        return f"TensorFlow {tf.__version__} on " + ", ".join(
            f"{gpu.name.removeprefix('/physical_device:')} ({name or 'unknown'})"
            for gpu, name in zip(gpus, names, strict=True)
        )
    if GPUS:
        return f"TensorFlow {tf.__version__} on CPU (where --precision {precision} runs)"
    built = "this TensorFlow is built without CUDA" if not tf.test.is_built_with_cuda() else ""
    reason = built or "no GPU that TensorFlow can use was found"
    return f"TensorFlow {tf.__version__} on CPU ({reason})"


def keep_no_memory():
    """Have TensorFlow give back what a tensor held, instead of keeping it for the next one.

    Where each weight is seen once that saves as much as the largest of them; in training it would
    cost time. It only has an effect before TensorFlow's first operation.
    """
    os.environ.setdefault("TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "1")

"""TensorFlow, imported without its log noise and with memory growth set before its first use.

Every module that needs TensorFlow takes it from here: `from gpt2cli.tensorflow import tf`.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from gpt2cli import console, signals
from gpt2cli.errors import UserError

OLDEST = (2, 18)  # as in setup.py; older versions do not support NumPy 2
QUIET = (2, 21)  # older versions announce XLA's first compilation at any log level


def _temporary_file() -> IO[bytes]:
    """Return an unnamed file; the null device if every disk is full."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Hold back everything written to standard error; show it only if the block fails.

    TensorFlow's libraries log while they are loaded, before they read any setting. With --verbose
    nothing is held back.
    """
    if console.verbose:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only, once they are loaded
    real = os.dup(2)
    with _temporary_file() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # a message must not hide the error
                noise.seek(0)
                os.write(real, noise.read())
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)


os.environ["KERAS_BACKEND"] = "tensorflow"  # a setting for other programs would break this one
# a library would replace an exception that is raised while it is loaded
with signals.deferred(), without_noise():
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


def gpus_for(precision: str) -> list[Any]:
    """Return the GPUs that a model of this precision runs on; int8 always runs on the CPU."""
    return [] if precision == "int8" else GPUS


def describe_devices(precision: str = "float32") -> str:
    """Return a line that names TensorFlow's version and the devices, and why it is only the CPU."""
    if gpus := gpus_for(precision):
        names = [tf.config.experimental.get_device_details(g).get("device_name") for g in gpus]
        return f"TensorFlow {tf.__version__} on " + ", ".join(
            f"{gpu.name.removeprefix('/physical_device:')} ({name or 'unknown'})"
            for gpu, name in zip(gpus, names, strict=True)
        )
    if GPUS:
        return f"TensorFlow {tf.__version__} on CPU (--precision {precision} always runs there)"
    if tf.test.is_built_with_cuda():
        reason = "no GPU that TensorFlow can use was found"
    else:
        reason = "this TensorFlow is built without CUDA"
    return f"TensorFlow {tf.__version__} on CPU ({reason})"


def keep_no_memory() -> None:
    """Make TensorFlow free the memory of a tensor at once, instead of keeping it for the next one.

    A command that only reads the weights needs less memory, by the size of the largest weight;
    training would be slower. This has an effect only before TensorFlow's first operation.
    """
    os.environ.setdefault("TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "1")

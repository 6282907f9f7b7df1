"""Measure the limits of this machine, as JSON: bytes/s read from memory, FLOP/s of products.

Reading is one pass over a large array per core. The products are of large square matrices by
TensorFlow, and in int8 by TensorFlow Lite (XNNPACK: int8 weights, activations quantized at run
time). The best of several tries counts, because the others were disturbed.
"""

import json
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gpt2cli.tensorflow import tf

PIECE = 512 * 2**20  # bytes of a core's array
WIDTH, ROWS = 4096, 1024


def fastest(work, tries=6):
    """Return the seconds of the fastest call, without the first."""
    seconds = []
    for _ in range(tries + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def bandwidth(cores):
    """Return the bytes per second that the cores read together."""
    pieces = [np.ones(PIECE // 4, np.int32) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        return cores * PIECE / fastest(lambda: list(pool.map(np.max, pieces)))


def products(dtype):
    """Return the FLOP/s of products of WIDTH x WIDTH matrices."""
    a, b = (tf.cast(tf.random.normal([WIDTH, WIDTH]), dtype) for _ in range(2))
    return 2 * WIDTH**3 / fastest(lambda: tf.matmul(a, b)[0, 0].numpy())


def products_int8(cores):
    """Return the FLOP/s of products of ROWS rows with an int8 matrix."""
    random = np.random.default_rng(0)
    module = tf.Module()
    module.matrix = tf.Variable(random.standard_normal((WIDTH, WIDTH), np.float32))
    rows = tf.TensorSpec([ROWS, WIDTH], tf.float32)
    product = tf.function(lambda x: tf.matmul(x, module.matrix), input_signature=[rows])
    made = product.get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([made], module)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    interpreter = tf.lite.Interpreter(model_content=converter.convert(), num_threads=cores)
    interpreter.allocate_tensors()
    place = interpreter.get_input_details()[0]["index"]
    interpreter.set_tensor(place, random.standard_normal((ROWS, WIDTH), np.float32))
    return 2 * ROWS * WIDTH**2 / fastest(interpreter.invoke)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # TensorFlow Lite announces its move to another package
    number = int(sys.argv[1])
    found = {"bandwidth": bandwidth(number)}
    found |= {name: products(name) for name in ("float32", "bfloat16")}
    print(json.dumps(found | {"int8": products_int8(number)}))

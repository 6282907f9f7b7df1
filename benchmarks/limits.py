"""Measure limits of this machine with one library: limits.py numpy|tensorflow|litert|torch CORES.

Prints JSON: [name, value, how it was reached] of each try. "read N" is bytes per second that all
cores together read from N megabytes; the other names are precisions, with the FLOP per second of
products of matrices. Runs with the Python of a tool that has the library. The best of all tries of
all libraries counts, because a library may be slow on a processor, and a try may be disturbed.
"""

import contextlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

READ = (64, 96, 192, 384, 768, 1536)  # megabytes of all cores together; the smallest fit in a cache
SHAPES = (  # rows, inner, columns: squares, and products of GPT-2
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (1024, 768, 3072),
    (1024, 4096, 4096),
)


def fastest(work, tries=5):
    """Return the seconds of the fastest call, without the first."""
    seconds = []
    for _ in range(tries + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def product(kind, library, shape, work):
    """Return a try: the FLOP per second of a product."""
    rows, inner, columns = shape
    rate = 2 * rows * inner * columns / fastest(work)
    return kind, rate, f"{library}, {rows} x {inner} x {columns}"


def with_numpy(cores):
    """Reading by np.max and by a product with a vector; products of its BLAS in float32."""
    with ThreadPoolExecutor(cores) as pool:
        for size in READ:
            pieces = [np.ones((size * 256 // cores, 1024), np.float32)]
            pieces += [pieces[0].copy() for _ in range(cores - 1)]
            read = cores * pieces[0].nbytes
            one = np.ones(1024, np.float32)
            for how, work in (("max", np.max), ("matrix x vector", lambda a, one=one: a @ one)):
                seconds = fastest(lambda work=work, pieces=pieces: list(pool.map(work, pieces)), 8)
                yield f"read {size}", read / seconds, f"NumPy, {how}"
    for shape in SHAPES:
        a, b = (np.ones(shape[i : i + 2], np.float32) for i in range(2))
        yield product("float32", "NumPy", shape, lambda a=a, b=b: a @ b)


def with_tensorflow(cores):
    """Products in float32 and bfloat16."""
    import tensorflow as tf

    for kind in ("float32", "bfloat16"):
        for shape in SHAPES:
            a, b = (tf.cast(tf.random.normal(shape[i : i + 2]), kind) for i in range(2))
            run = tf.function(tf.matmul)
            yield product(kind, "TensorFlow", shape, lambda: run(a, b)[0, 0].numpy())  # noqa: B023


def with_litert(cores):
    """Products by XNNPACK: float32, and int8 weights with activations quantized at run time."""
    import tensorflow as tf

    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        Interpreter = tf.lite.Interpreter
    for kind in ("float32", "int8"):
        for rows, inner, columns in SHAPES:
            module = tf.Module()
            module.matrix = tf.Variable(tf.random.normal([inner, columns]))
            made = tf.function(lambda x: tf.matmul(x, module.matrix))  # noqa: B023
            made = made.get_concrete_function(tf.TensorSpec([rows, inner], tf.float32))
            converter = tf.lite.TFLiteConverter.from_concrete_functions([made], module)
            converter.optimizations = [tf.lite.Optimize.DEFAULT] * (kind == "int8")
            interpreter = Interpreter(model_content=converter.convert(), num_threads=cores)
            interpreter.allocate_tensors()
            place = interpreter.get_input_details()[0]["index"]
            interpreter.set_tensor(place, np.random.rand(rows, inner).astype(np.float32))
            yield product(kind, "XNNPACK", (rows, inner, columns), interpreter.invoke)


def with_torch(cores):
    """Products in float32, bfloat16 and int8, and reading by a product with a vector."""
    import torch

    torch.set_num_threads(cores)
    for size in READ:
        matrix = torch.ones(size * 256, 1024)
        one = torch.ones(1024)
        seconds = fastest(lambda matrix=matrix, one=one: matrix @ one, 8)
        yield f"read {size}", matrix.numel() * 4 / seconds, "PyTorch, matrix x vector"
    for kind in ("float32", "bfloat16", "int8"):
        multiply = torch._int_mm if kind == "int8" else torch.matmul
        for shape in SHAPES:
            a, b = (torch.ones(shape[i : i + 2]).to(getattr(torch, kind)) for i in range(2))
            with contextlib.suppress(RuntimeError):  # not every version has int8 on a CPU
                yield product(kind, "PyTorch", shape, lambda: multiply(a, b))  # noqa: B023


if __name__ == "__main__":
    name, cores = sys.argv[1], int(sys.argv[2])
    tries = {f.__name__: f for f in (with_numpy, with_tensorflow, with_litert, with_torch)}
    print(json.dumps(list(tries[f"with_{name}"](cores))))

"""The network compiled for a CPU by LiteRT, which is a part of TensorFlow.

XNNPACK, LiteRT's kernels, packs weights that never change in the order in which the processor reads
them, and multiplies them as float32 or, in eight bits, as integers. On a CPU that generates two to
five times faster than XLA, and nothing is compiled for a batch or a length.

The graph is that of model.py, traced with its weights as arguments and converted once for each
ModelConfig: a skeleton of some hundred kilobytes, kept on disk. A program is a skeleton whose
arguments have become the weights of a checkpoint.
"""

import contextlib
import ctypes
import hashlib
import mmap
import os
import tempfile
import warnings
import weakref
from pathlib import Path

import flatbuffers
import numpy as np

from gpt2cli import files, model, sampling
from gpt2cli.engine import lite_schema, tf, without_noise
from gpt2cli.errors import UserError

SLOTS = 128  # a cache grows by so many
ALIGNMENT = 64  # bytes, of a weight in the file; a cache line
ROWS = 256  # tokens whose logits exist at once when a text is scored
BLOCK = 256  # rows of a matrix that are quantized at once
WEIGHT = "weight"  # what the names of the arguments that become weights begin with
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def trace(config, names, part):
    """The concrete function of a `part` of the network, with the weights `names` as arguments.

    A matrix is an argument of [n_out, n_in], XNNPACK's order.

    Args:
        part: "layers", what follows the embedding up to the last norm, or "head".
    """
    shapes = model.weight_shapes(config)
    head, depth = config.n_embd // config.n_head, range(config.n_layer)

    def network(weights):
        given = dict(zip(names, weights, strict=True))

        def weight(name, shape):
            if name not in given:
                return tf.zeros(shape)  # of another part
            return given[name] if name == names[0] and part == "head" else tf.transpose(given[name])

        return model.GPT2(config, weight, hold=lambda value, name: value)

    def layers(x, beside, seen, keys, values, weights):
        ours = network(weights)
        past = [model.Past(*pair, seen) for pair in zip(keys, values, strict=True)]
        x, new = ours.layers(ours.normed(x), beside, past)
        return x, *(half for pair in new for half in pair)

    def logits(x, weights):
        return network(weights).head(x)

    def argument(name, *shape):
        return tf.TensorSpec(shape, name=name)

    slots = (None, config.n_head, None, head)
    inputs = {
        "layers": [
            argument("x", 1, None, config.n_embd),
            argument("beside", None, None),
            argument("seen", None, 1, 1, None),
            [argument(f"keys{layer}", *slots) for layer in depth],
            [argument(f"values{layer}", *slots) for layer in depth],
        ],
        "head": [argument("x", None, config.n_embd)],
    }[part]
    turned = [shapes[n] if part == "head" else shapes[n][-2:][::-1] for n in names]
    inputs.append([argument(f"{WEIGHT}{i}", *shape) for i, shape in enumerate(turned)])
    function = tf.function(
        layers if part == "layers" else logits, input_signature=inputs, autograph=False
    )
    return function.get_concrete_function()


def skeleton(config, names, part):
    """`trace` converted, or taken from the disk where that was done before; bytes."""
    sources = [Path(model.__file__).read_bytes(), Path(__file__).read_bytes()]
    made_of = repr((config, names, part, tf.__version__)).encode()
    key = hashlib.sha256(b"\0".join([made_of, *sources])).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "gpt2cli" / f"{key[:32]}.tflite"
    with contextlib.suppress(OSError):
        digest, kept = path.read_bytes()[:32], path.read_bytes()[32:]
        if hashlib.sha256(kept).digest() == digest:
            return kept
    with without_noise():
        traced = trace(config, names, part)
        converter = tf.lite.TFLiteConverter.from_concrete_functions([traced], tf.Module())
        converter.experimental_lower_to_saved_model = False  # three times slower, same result
        made = converter.convert()
    with contextlib.suppress(UserError), files.replacing(path) as file:
        file.write(hashlib.sha256(made).digest() + made)
    return made


def quantize(matrix):
    """float32 [n_out, n_in] -> int8 of the same shape and the float32 [n_out] that it counts in."""
    scale = np.maximum(matrix.max(-1), -matrix.min(-1)) / 127
    scale[scale == 0] = 1
    numbers = np.empty(matrix.shape, np.int8)
    for start in range(0, len(matrix), BLOCK):  # no temporary as large as the matrix
        rows = slice(start, start + BLOCK)
        np.rint(matrix[rows] / scale[rows, None], out=numbers[rows], casting="unsafe")
    return numbers, scale


class Program:
    """A skeleton with its weights, ready to run.

    Args:
        skeleton: bytes.
        weights: arrays in the order of its arguments; matrices are float32 or a `quantize` pair.

    Attributes:
        weights: the same as they lie in the file, mapped.
    """

    def __init__(self, skeleton, weights):
        with tempfile.TemporaryDirectory(prefix="gpt2cli-") as folder:
            path = Path(folder) / "program.tflite"
            self.weights = _assemble(skeleton, weights, path)
            with warnings.catch_warnings(), without_noise():
                warnings.simplefilter("ignore")  # it is to move to a package of its own
                self._interpreter = tf.lite.Interpreter(str(path), num_threads=THREADS)
                self._interpreter.allocate_tensors()  # packs the weights
            _forget(path)
        self._inputs = {d["name"]: d["index"] for d in self._interpreter.get_input_details()}
        self._outputs = [d["index"] for d in self._interpreter.get_output_details()]
        self._shapes = {}

    def __call__(self, **inputs):
        """Run with these arrays; inputs that are not given are as they were. Returns arrays."""
        self.reshape(**{name: array.shape for name, array in inputs.items()})
        for name, array in inputs.items():
            self._interpreter.set_tensor(self._inputs[name], array)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]

    def reshape(self, **shapes):
        """Give inputs new shapes; what they held is lost unless the shapes are as they were."""
        changed = {name: s for name, s in shapes.items() if self._shapes.get(name) != s}
        if not changed:
            return
        for name, shape in changed.items():
            self._interpreter.resize_tensor_input(self._inputs[name], shape)
        with without_noise():
            self._interpreter.allocate_tensors()
        self._shapes |= changed

    def input(self, name):
        """The memory of an input, to change in place; nothing may run while it is held."""
        return self._interpreter.tensor(self._inputs[name])()


def _assemble(skeleton, weights, path):
    """Write the file of a Program: a skeleton whose arguments have become constants."""
    program = lite_schema.ModelT.InitFromPackedBuf(skeleton)
    graph = program.subgraphs[0]
    arguments = {graph.tensors[index].name.decode(): index for index in graph.inputs}
    constants = {name: i for name, i in arguments.items() if name.startswith(WEIGHT)}
    graph.inputs = np.array([i for i in graph.inputs if i not in constants.values()], np.int32)
    # the weights begin behind the room for what describes them
    place = len(skeleton) + sum(256 + 16 * graph.tensors[i].shape[0] for i in constants.values())
    mapped = []
    with open(path, "wb") as file:
        for number, (values, scale) in enumerate(weights):
            tensor = graph.tensors[constants[f"{WEIGHT}{number}"]]
            place += -place % ALIGNMENT
            file.seek(place)
            file.write(np.ascontiguousarray(values))
            mapped.append((place, values.dtype, values.shape, scale))
            buffer = lite_schema.BufferT()
            buffer.offset, buffer.size = place, values.nbytes
            place += values.nbytes
            tensor.buffer = len(program.buffers)
            program.buffers.append(buffer)
            if scale is not None:
                tensor.type = lite_schema.TensorType.INT8
                tensor.quantization = lite_schema.QuantizationParametersT()
                tensor.quantization.scale = scale
                tensor.quantization.zeroPoint = np.zeros(len(scale), np.int64)
        builder = flatbuffers.Builder(len(skeleton))
        builder.Finish(program.Pack(builder), b"TFL3")
        file.seek(0)
        file.write(builder.Output())
    return [
        (np.memmap(path, kind, "r", start, shape), scale) for start, kind, shape, scale in mapped
    ]


def _forget(path):
    """Drop the pages of a mapped file from memory; one that is read again comes back from it.

    XNNPACK has packed copies of the weights. Where this does nothing, the system drops the pages
    when it needs room.
    """
    with contextlib.suppress(OSError, AttributeError):  # no Linux
        libc = ctypes.CDLL(None)
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(str(path)):
                start, end = (int(place, 16) for place in line.split()[0].split("-"))
                libc.madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
                )


class Cache:
    """The keys and values of N rows; in arrays, or in the memory of a Program.

    Attributes:
        seen: float32 [N, 1, 1, S], 0 for the slots that hold a token, else model.MASKED.
        used: slots from which on no row holds a token.
        arrays: input's name -> [N, H, used, D]; None while the program holds them.
    """

    def __init__(self, seen, used, arrays):
        self.seen, self.used, self.arrays = seen, used, arrays


class Lite:
    """A network to read, to continue and to score texts with, on a CPU.

    Args:
        config: ModelConfig.
        stored: function of a weight's name and shape that gives its values.
        precision: "float32"; or "int8": matrices in eight bits with a scale a column, multiplied as
            integers with activations that get eight bits a token; all else float32.
    """

    def __init__(self, config, stored, precision="float32"):
        self.config = config
        shapes = model.weight_shapes(config)
        wte, wpe, *names = shapes

        def values(name):
            array = np.asarray(stored(name, shapes[name]), np.float32)
            if array.ndim == 1:
                return array, None
            matrix = array if name == wte else array.reshape(array.shape[-2:]).T
            return quantize(matrix) if precision == "int8" else (matrix, None)

        self._layers = Program(skeleton(config, tuple(names), "layers"), map(values, names))
        self._head = Program(skeleton(config, (wte,), "head"), map(values, [wte]))
        self._table = self._head.weights[0]
        self._positions = np.asarray(stored(wpe, shapes[wpe]), np.float32)
        depth = range(config.n_layer)
        # in the order of the outputs
        self._halves = [f"{half}{layer}" for layer in depth for half in ("keys", "values")]
        self._resident = _nothing  # gives the Cache that the program holds, while it is wanted

    def logits(self, tokens):
        """Ids of one row, up to n_ctx -> float32 [T, V]."""
        return self._head(x=self._read(np.asarray(tokens))[0])[0]

    def sums(self, inputs, targets, mask):
        """Ids [B, T] and their weights -> the sum of their losses in nats, and of their hits."""
        loss, hits = 0.0, 0.0
        for row, wanted, weight in zip(inputs, targets, mask, strict=True):
            x = self._read(row)[0]
            for start in range(0, len(x), ROWS):
                part = slice(start, start + ROWS)
                found = model.losses(self._head(x=x[part])[0], wanted[part])
                loss += float(np.sum(found[0] * weight[part]))
                hits += float(np.sum(found[1] * weight[part]))
        return loss, hits

    def read(self, rows, slots):
        """Rows of ids -> logits [N, V] after them, and their Cache.

        One after another, and equal ones once: so a row's numbers are the same to the last bit
        whatever its batch, and side by side they would be little faster.

        Args:
            slots: not used; a cache grows with its rows.
        """
        head, used = self.config.n_embd // self.config.n_head, max(map(len, rows))
        shape = len(rows), self.config.n_head, used, head
        arrays = {half: np.zeros(shape, np.float32) for half in self._halves}
        seen = np.full([len(rows), 1, 1, _room(used + 1)], model.MASKED, np.float32)
        equal = {}
        for number, row in enumerate(rows):
            equal.setdefault(tuple(row), []).append(number)
        last = np.empty([len(rows), self.config.n_embd], np.float32)
        for row, numbers in equal.items():
            x, new = self._read(np.array(row))
            last[numbers] = x[-1]
            for half, array in zip(self._halves, new, strict=True):
                arrays[half][numbers, :, : len(row)] = array
            seen[numbers, ..., : len(row)] = 0
        return self._head(x=last)[0], Cache(seen, used, arrays)

    def feed(self, cache, tokens, position):
        """One token [N] more a row, at its slot position [N]; logits [N, V] and the Cache."""
        self._enter(cache, int(position.max()) + 1)
        rows = np.arange(len(tokens))
        x, *new = self._layers(
            x=self._embed(tokens, position),
            beside=_mask(np.eye(len(tokens), dtype=bool)),
            seen=cache.seen,
        )
        for half, array in zip(self._halves, new, strict=True):
            self._layers.input(half)[rows, :, position] = array[0].swapaxes(0, 1)
        cache.seen[rows, 0, 0, position] = 0
        cache.used = max(cache.used, int(position.max()) + 1)
        return self._head(x=x[0])[0], cache

    def regroup(self, cache, parents):
        """The Cache of new rows, each a copy of the present one of that number [N]."""
        used, seen = cache.used, cache.seen[parents]
        if self._resident() is cache and len(parents) == len(cache.seen):
            for half in self._halves:
                memory = self._layers.input(half)
                memory[:, :, :used] = memory[parents, :, :used]
            cache.seen = seen
            return cache
        if self._resident() is cache:
            self._leave()
        return Cache(seen, used, {half: a[parents] for half, a in cache.arrays.items()})

    def run(self, *arguments):
        """As `sampling.run`."""
        return sampling.run(self, *arguments)

    def _embed(self, tokens, position):
        """[N], [N] -> [1, N, E], the sum of their rows."""
        (values, scale) = self._table
        x = values[tokens].astype(np.float32)
        if scale is not None:
            x *= scale[tokens, None]
        return (x + self._positions[position])[None]

    def _read(self, row):
        """Ids [T] of one row -> x [T, E], and its keys and values, each [1, H, T, D]."""
        self._leave()
        head = self.config.n_embd // self.config.n_head
        nothing = np.zeros([1, self.config.n_head, 1, head], np.float32)  # one for all tokens
        place = np.arange(len(row))
        x, *new = self._layers(
            x=self._embed(row, place),
            beside=_mask(place[:, None] >= place),
            seen=_mask(np.zeros([1, 1, 1, 1], bool)),
            **dict.fromkeys(self._halves, nothing),
        )
        return x[0], new

    def _enter(self, cache, needed):
        """Have the program hold this cache, with room for as many slots as are needed."""
        if self._resident() is cache and needed <= cache.seen.shape[-1]:
            return
        self._leave()
        more = _room(needed) - cache.seen.shape[-1]
        if more > 0:
            wider = [(0, 0), (0, 0), (0, 0), (0, more)]
            cache.seen = np.pad(cache.seen, wider, constant_values=model.MASKED)
        rows, *_, slots = cache.seen.shape
        shape = rows, self.config.n_head, slots, self.config.n_embd // self.config.n_head
        self._layers.reshape(
            x=(1, rows, self.config.n_embd),
            beside=(rows, rows),
            seen=cache.seen.shape,
            **dict.fromkeys(self._halves, shape),
        )
        for half in self._halves:
            memory = self._layers.input(half)
            memory[:, :, : cache.used] = cache.arrays.pop(half)
            memory[:, :, cache.used :] = 0  # what lies there may be no number
        cache.arrays, self._resident = None, weakref.ref(cache)

    def _leave(self):
        """Take the cache that the program holds out of it, before the program does other work."""
        cache = self._resident()
        if cache is not None:
            cache.arrays = {
                half: self._layers.input(half)[:, :, : cache.used].copy() for half in self._halves
            }
        self._resident = _nothing


def _nothing():
    return None


def _room(slots):
    """So many slots, or the next multiple of SLOTS."""
    return -(-slots // SLOTS) * SLOTS


def _mask(looks):
    """bool -> float32: 0 where one token looks at another, else MASKED."""
    return np.where(looks, 0, model.MASKED).astype(np.float32)

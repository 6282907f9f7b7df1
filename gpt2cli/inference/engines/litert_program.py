"""Parts of the network as LiteRT programs: the graph of model.py with its weights packed for a CPU.

LiteRT is a part of TensorFlow. XNNPACK, its kernels, packs weights that never change in the order
in which the processor reads them, and multiplies them as float32 or, in eight bits, as integers.

A part is traced with its weights as arguments and converted, once for each ModelConfig: that is its
skeleton, some hundred kilobytes, kept on disk. A Program is a skeleton whose arguments have become
the weights of a checkpoint.
"""

import contextlib
import ctypes
import hashlib
import mmap
import os
import tempfile
import warnings
from pathlib import Path

import flatbuffers
import numpy as np

from gpt2cli import files, machine
from gpt2cli.errors import UserError
from gpt2cli.model import kernels
from gpt2cli.model import network as model
from gpt2cli.tensorflow import lite_schema, tf, without_noise

ALIGNMENT = 64  # bytes, of a weight in the file; a cache line
BLOCK = 256  # rows of a matrix that are quantized at once
WEIGHT = "weight"  # what the names of the arguments that become weights begin with


def layers(network, x, beside, seen, keys, values):
    """What follows the embedding up to the last norm, of a GPT2: x, and new keys and values."""
    past = [model.Past(beside, seen, *pair) for pair in zip(keys, values, strict=True)]
    x, new = network.layers(network.normed(x), past)
    return x, *(half for pair in new for half in pair)


def head(network, x):
    """The product with wte."""
    return network.head(x)


def _inputs(part, config):
    """The TensorSpecs of a part's inputs.

    Sizes that are open here must not meet in one reshape: LiteRT hands a graph to XNNPACK whole
    only if no shape is computed while it runs.
    """
    if part is head:
        return [tf.TensorSpec([None, config.n_embd], name="x")]
    slots = [None, config.n_head, None, config.n_embd // config.n_head]
    return [
        tf.TensorSpec([1, None, config.n_embd], name="x"),
        tf.TensorSpec([None, None], name="beside"),
        tf.TensorSpec([None, 1, 1, None], name="seen"),
        *(
            [tf.TensorSpec(slots, name=f"{half}{layer}") for layer in range(config.n_layer)]
            for half in ("keys", "values")
        ),
    ]


def weights_of(part, config):
    """The names of the weights that a part takes, in the order of its arguments."""
    wte, _, *others = model.weight_shapes(config)
    return [wte] if part is head else others


def _is_turned(name, shape):
    """Whether a weight is a matrix [n_in, n_out], which XNNPACK wants as [n_out, n_in]."""
    return len(shape) > 1 and not name.endswith(("wte", "word_embed"))


def _trace(part, config):
    """The concrete function of a part, with its weights as the last arguments."""
    names, shapes = weights_of(part, config), model.weight_shapes(config)
    turned = {n: shapes[n][-2:][::-1] if _is_turned(n, shapes[n]) else shapes[n] for n in names}

    def traced(*inputs):
        *inputs, weights = inputs
        given = dict(zip(names, weights, strict=True))

        def weight(name, shape):
            if name not in given:
                return tf.zeros([])  # of another part
            given[name].set_shape(turned[name])
            return tf.transpose(given[name]) if _is_turned(name, shape) else given[name]

        return part(model.GPT2(config, weight, hold=lambda value, name: value), *inputs)

    # Without sizes, for which the converter would make arrays of zeros: the whole model's.
    arguments = [
        tf.TensorSpec([None] * len(turned[name]), name=f"{WEIGHT}{number}")
        for number, name in enumerate(names)
    ]
    signature = [*_inputs(part, config), arguments]
    return tf.function(traced, input_signature=signature, autograph=False).get_concrete_function()


def cache_folder():
    """Where skeletons are kept, and the nameless files of Programs lie; None without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "gpt2cli" if os.path.isabs(home) else None


def skeleton(part, config):
    """The bytes of a part, converted, or taken from the disk where that was done before."""
    sources = [Path(of.__file__).read_bytes() for of in (model, kernels)]
    sources.append(Path(__file__).read_bytes())
    made_of = repr((part.__name__, config, tf.__version__)).encode()
    key = hashlib.sha256(b"\0".join([made_of, *sources])).hexdigest()
    path = cache_folder() and cache_folder() / f"{key[:32]}.tflite"
    with contextlib.suppress(OSError):
        kept = path.read_bytes() if path else b""
        if hashlib.sha256(kept[32:]).digest() == kept[:32]:
            return kept[32:]
    with without_noise():
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [_trace(part, config)], tf.Module()
        )
        converter.experimental_lower_to_saved_model = False  # three times slower, same result
        made = converter.convert()
    with contextlib.suppress(UserError):
        if path:
            with files.replacing(path) as file:
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
    """A part with its weights, ready to run.

    Args:
        part: `layers` or `head`.
        config: ModelConfig.
        stored: function of a weight's name and shape that gives its values.
        precision: "float32", or "int8" for the matrices.

    Raises:
        UserError: there is no room for the file, which is as large as the weights.
    """

    def __init__(self, part, config, stored, precision):
        shapes = model.weight_shapes(config)

        def values(name):
            array = np.asarray(stored(name, shapes[name]), np.float32)
            if _is_turned(name, array.shape):
                array = array.reshape(array.shape[-2:]).T
            return quantize(array) if array.ndim > 1 and precision == "int8" else (array, None)

        names = weights_of(part, config)
        room = sum(256 + 16 * max(shapes[name]) for name in names)
        made = skeleton(part, config)
        try:
            self._file, path = _nameless_file()
            self._first = _assemble(made, room, map(values, names), self._file)
        except OSError as error:
            raise UserError(
                f"no room for a file as large as the weights ({error.strerror}) in "
                f"{cache_folder()} or, if that cannot be written to, {tempfile.gettempdir()}. "
                "Free some, or set XDG_CACHE_HOME to a folder on another disk"
            ) from error
        with warnings.catch_warnings(), without_noise():
            warnings.simplefilter("ignore")  # it is to move to a package of its own
            self._interpreter = tf.lite.Interpreter(path, num_threads=machine.cores())
            self._interpreter.allocate_tensors()  # packs the weights
        _forget(self._file)
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
            self._shapes.pop(name, None)  # Ctrl-C may come before it has its new one
            self._interpreter.resize_tensor_input(self._inputs[name], shape)
        self._interpreter.allocate_tensors()
        self._shapes |= changed

    def rows(self, indices):
        """These rows of the first weight, float32 [N, n_in], read from the file."""
        place, kind, (_, width), scale = self._first
        found = np.empty([len(indices), width], kind)
        for row, index in zip(found, indices, strict=True):
            self._file.seek(place + int(index) * row.nbytes)
            self._file.readinto(row)
        return found if scale is None else found * scale[indices, None]

    def input(self, name):
        """The memory of an input, to change in place; nothing may run while it is held."""
        return self._interpreter.tensor(self._inputs[name])()


def _nameless_file():
    """A file of which nothing is left when it is closed, however that happens, and a path to it."""
    linux = Path("/proc/self/fd").exists()
    make = tempfile.TemporaryFile if linux else tempfile.NamedTemporaryFile
    folder = cache_folder()
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        file = make(dir=folder)
    except OSError:  # a home that is read only: in the system's folder
        file = make()
    return file, f"/proc/self/fd/{file.fileno()}" if linux else file.name


def _assemble(skeleton, room, weights, file):
    """Write a skeleton whose arguments have become constants: pairs of values and scale or None.

    Args:
        room: bytes, at the least, for what describes the weights; they lie behind it.

    Returns:
        Of the first of them its place in the file, its type, its shape and its scale.
    """
    program = lite_schema.ModelT.InitFromPackedBuf(skeleton)
    graph = program.subgraphs[0]
    arguments = {graph.tensors[index].name.decode(): index for index in graph.inputs}
    constants = {name: i for name, i in arguments.items() if name.startswith(WEIGHT)}
    graph.inputs = np.array([i for i in graph.inputs if i not in constants.values()], np.int32)
    place = len(skeleton) + room
    first = None
    for number, (values, scale) in enumerate(weights):
        tensor, buffer = graph.tensors[constants[f"{WEIGHT}{number}"]], lite_schema.BufferT()
        place += -place % ALIGNMENT
        file.seek(place)
        file.write(np.ascontiguousarray(values))
        first = first or (place, values.dtype, values.shape, scale)
        buffer.offset, buffer.size = place, values.nbytes
        place += values.nbytes
        tensor.shape, tensor.shapeSignature = np.array(values.shape, np.int32), None
        tensor.buffer = len(program.buffers)
        program.buffers.append(buffer)
        if scale is not None:
            tensor.type = lite_schema.TensorType.INT8
            tensor.quantization = lite_schema.QuantizationParametersT()
            tensor.quantization.scale = scale
            tensor.quantization.zeroPoint = np.zeros(len(scale), np.int64)
    builder = flatbuffers.Builder(len(skeleton))
    builder.Finish(program.Pack(builder), b"TFL3")
    described = builder.Output()
    assert len(described) <= first[0], "the weights begin inside what describes them"
    file.seek(0)
    file.write(described)
    file.flush()
    return first


def _forget(file):
    """Drop the pages of a mapped file from memory; one that is read again comes back from it.

    XNNPACK has packed copies of the weights. Where this does nothing, the system drops the pages
    when it needs room.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no Linux
        libc, inode = ctypes.CDLL(None), str(os.fstat(file.fileno()).st_ino)
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, allowed, _, _, of, *_ = line.split()
            # the number may be that of another disk's file too: of a shared one that is only
            # read, dropping pages loses nothing
            if of == inode and allowed == "r--s":
                start, end = (int(address, 16) for address in addresses.split("-"))
                size = ctypes.c_size_t(end - start)
                libc.madvise(ctypes.c_void_p(start), size, mmap.MADV_DONTNEED)

"""Parts of the network as LiteRT programs: the graph of network.py with weights packed for a CPU.

LiteRT is a part of TensorFlow. Its kernels, XNNPACK, pack constant weights in the order in which
the processor reads them, and multiply them as float32 or, in eight bits, as integers.

A part is traced with its weights as arguments and converted, once for each ModelConfig. The result,
some hundred kilobytes, is its skeleton and is kept on disk. A Program is a skeleton whose arguments
were replaced by the weights of a checkpoint.

This is the only module that uses tf.lite. Two of its interfaces are private: the schema of the file
format (schema_py_generated) and the converter's experimental_lower_to_saved_model. They were tried
with TensorFlow 2.18 and 2.21.
"""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import flatbuffers
import numpy as np

from gpt2cli import files, machine, paths
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.model import kernels, network
from gpt2cli.model.network import GPT2, Past
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import Values, weight_shapes
from gpt2cli.tensorflow import tf, without_noise

with without_noise():
    from tensorflow.lite.python import schema_py_generated as lite_schema

ALIGNMENT = 64  # bytes, of a weight in the file; a cache line
BLOCK = 256  # rows of a matrix that are quantized at once
WEIGHT = "weight"  # start of the names of the arguments that become weights

Part = Callable[..., Any]  # `layers` or `head`


def layers(
    gpt2: GPT2,
    x: tf.Tensor,
    beside: tf.Tensor,
    seen: tf.Tensor,
    keys: list[tf.Tensor],
    values: list[tf.Tensor],
) -> tuple[tf.Tensor, ...]:
    """Run everything between the embedding and `head`.

    Args:
        gpt2: the network.
        x: [1, N, E], sums of token and position embeddings.
        beside: as in Past.
        seen: as in Past.
        keys: of each layer, as in Past.
        values: of each layer, as in Past.

    Returns:
        x [1, N, E], and the new keys and values of each layer, [1, H, N, D].
    """
    past = [Past(beside, seen, *pair) for pair in zip(keys, values, strict=True)]
    x, new = gpt2.layers(gpt2.normed(x), past)
    return x, *(half for pair in new for half in pair)


def head(gpt2: GPT2, x: tf.Tensor) -> tf.Tensor:
    """Return the product of x [N, E] with wte: logits [N, V]."""
    return gpt2.head(x)


def _inputs(part: Part, config: ModelConfig) -> list[Any]:
    """Return the TensorSpecs of a part's inputs.

    Two sizes that are None here must not meet in one reshape: LiteRT gives the whole graph to
    XNNPACK only if no shape is computed at run time.
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


def weights_of(part: Part, config: ModelConfig) -> list[str]:
    """Return the names of the weights that a part takes, in the order of its arguments."""
    wte, _, *others = weight_shapes(config)
    return [wte] if part is head else others


def _is_transposed(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a weight is a matrix [n_in, n_out], which XNNPACK wants as [n_out, n_in]."""
    return len(shape) > 1 and not name.endswith(("wte", "word_embed"))


def _trace(part: Part, config: ModelConfig) -> Any:
    """Return the concrete function of a part, with its weights as the last arguments."""
    names, shapes = weights_of(part, config), weight_shapes(config)
    packed = {n: shapes[n][-2:][::-1] if _is_transposed(n, shapes[n]) else shapes[n] for n in names}

    def traced(*inputs: Any) -> Any:
        *given, weights = inputs
        weight_of = dict(zip(names, weights, strict=True))

        def weight(name: str, shape: tuple[int, ...]) -> tf.Tensor:
            if name not in weight_of:
                return tf.zeros([])  # a weight of another part
            weight_of[name].set_shape(packed[name])
            is_transposed = _is_transposed(name, shape)
            return tf.transpose(weight_of[name]) if is_transposed else weight_of[name]

        return part(GPT2(config, weight, hold=lambda value, name: value), *given)

    # With sizes, the converter would make arrays of zeros as large as the whole model.
    arguments = [
        tf.TensorSpec([None] * len(packed[name]), name=f"{WEIGHT}{number}")
        for number, name in enumerate(names)
    ]
    signature = [*_inputs(part, config), arguments]
    return tf.function(traced, input_signature=signature, autograph=False).get_concrete_function()


def cache_folder() -> Path | None:
    """Return the folder for skeletons and the files of Programs.

    None without a home folder, or if the folder is not this user's own.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _checked(Path(home) / "gpt2cli") if os.path.isabs(home) else None


@functools.cache
def _checked(folder: Path) -> Path | None:
    """Create the folder if necessary; if others can write to it, print that once, return None."""
    try:
        paths.check_own_folder(folder)
    except UserError as error:
        say(f"{error}, so no graphs are kept there. Set XDG_CACHE_HOME to a folder of your own")
        return None
    except OSError:  # the home is read-only
        return folder if folder.is_dir() else None
    return folder


class Skeleton(NamedTuple):
    """A part as a program with its weights as arguments.

    Args:
        program: the program, in flatbuffers' classes.
        size: its bytes in a file.
    """

    program: Any
    size: int


def skeleton(part: Part, config: ModelConfig) -> Skeleton:
    """Convert a part; the result is kept on disk and read from there the next time."""
    files_used = (network.__file__, kernels.__file__, __file__)
    sources = [Path(name).read_bytes() for name in files_used]
    made_of = repr((part.__name__, config, tf.__version__)).encode()
    key = hashlib.sha256(b"\0".join([made_of, *sources]))
    folder = cache_folder()
    path = folder / f"{key.hexdigest()[:32]}.tflite" if folder else None
    if path and (kept := _kept(path, key.digest())):
        return kept
    with without_noise():
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [_trace(part, config)], tf.Module()
        )
        converter.experimental_lower_to_saved_model = False  # three times slower, same result
        made = converter.convert()
    with contextlib.suppress(UserError):
        if path:
            with files.replacing(path, access=0o644) as file:  # whatever the umask
                file.write(_sealed(made, key.digest()))
    return _parsed(made)


def _kept(path: Path, key: bytes) -> Skeleton | None:
    """Return the skeleton in a file of the cache; None where there is none that can be used."""
    try:
        with paths.open_own(path, "rb", is_code=True) as file:
            content = file.read()
        made = content[hashlib.sha256().digest_size :]
        if content != _sealed(made, key):
            raise ValueError("its checksum is wrong")
        return _parsed(made)
    except FileNotFoundError:
        return None
    except UserError as error:
        say(f"{error}. For this command, the graph is converted again")
    except OSError as error:
        say(f"cannot read {path}: {error.strerror}. The graph is converted again")
    except Exception as error:  # flatbuffers raises anything
        say(f"{path} is damaged ({error}). The graph is converted again")
    return None


def _sealed(made: bytes, key: bytes) -> bytes:
    """Return the file of a skeleton: a checksum of it and of its key, then the skeleton."""
    return hashlib.sha256(key + made).digest() + made


def _parsed(made: bytes) -> Skeleton:
    return Skeleton(lite_schema.ModelT.InitFromPackedBuf(made), len(made))


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 [n_out, n_in] as int8 of the same shape and float32 [n_out], its unit."""
    scale = np.maximum(matrix.max(-1), -matrix.min(-1)) / 127
    scale[scale == 0] = 1
    numbers = np.empty(matrix.shape, np.int8)
    for start in range(0, len(matrix), BLOCK):  # no temporary as large as the matrix
        rows = slice(start, start + BLOCK)
        np.rint(matrix[rows] / scale[rows, None], out=numbers[rows], casting="unsafe")
    return numbers, scale


class Matrix(NamedTuple):
    """A weight in a Program's file.

    Args:
        place: its first byte.
        dtype: the type of its numbers.
        shape: as in the file.
        scale: float32 [n_out], the unit of int8 numbers; None for float32.
    """

    place: int
    dtype: np.dtype
    shape: tuple[int, ...]
    scale: np.ndarray | None


class Program:
    """A part with its weights, ready to run.

    Args:
        part: `layers` or `head`.
        config: the model's sizes.
        stored: returns a weight's values.
        precision: "float32", or "int8" for the matrices.

    Raises:
        UserError: there is no room for the file, which is as large as the weights.
    """

    def __init__(self, part: Part, config: ModelConfig, stored: Values, precision: str) -> None:
        shapes = weight_shapes(config)

        def values(name: str) -> tuple[np.ndarray, np.ndarray | None]:
            array = np.asarray(stored(name, shapes[name]), np.float32)
            if _is_transposed(name, array.shape):
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
                f"{cache_folder() or tempfile.gettempdir()}. "
                "Free some space, or set XDG_CACHE_HOME to a folder on another disk"
            ) from error
        with warnings.catch_warnings(), without_noise():
            warnings.simplefilter("ignore")  # it announces its move to another package
            self._interpreter = tf.lite.Interpreter(path, num_threads=machine.cores())
            self._interpreter.allocate_tensors()  # packs the weights
        _forget(self._file)
        self._inputs = {d["name"]: d["index"] for d in self._interpreter.get_input_details()}
        self._outputs = [d["index"] for d in self._interpreter.get_output_details()]
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run with these arrays and return the outputs; other inputs keep their values."""
        self.reshape(**{name: array.shape for name, array in inputs.items()})
        for name, array in inputs.items():
            self._interpreter.set_tensor(self._inputs[name], array)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]

    def reshape(self, **shapes: tuple[int, ...]) -> None:
        """Give inputs new shapes; if any shape changes, their values are lost."""
        changed = {name: s for name, s in shapes.items() if self._shapes.get(name) != s}
        if not changed:
            return
        for name, shape in changed.items():
            self._shapes.pop(name, None)  # Ctrl-C may come before it has its new shape
            self._interpreter.resize_tensor_input(self._inputs[name], shape)
        self._interpreter.allocate_tensors()
        self._shapes |= changed

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return rows of the first weight, float32 [N, n_in], read from the file."""
        place, dtype, (_, width), scale = self._first
        found = np.empty([len(indices), width], dtype)
        for row, index in zip(found, indices, strict=True):
            self._file.seek(place + int(index) * row.nbytes)
            self._file.readinto(row)
        return found if scale is None else found * scale[indices, None]

    def input(self, name: str) -> np.ndarray:
        """Return the memory of an input, to change in place; drop it before the next run."""
        return self._interpreter.tensor(self._inputs[name])()


def _nameless_file() -> tuple[Any, str]:
    """Open a file that disappears when it is closed or the process dies; return it and a path."""
    linux = Path("/proc/self/fd").exists()
    make = tempfile.TemporaryFile if linux else tempfile.NamedTemporaryFile
    folder = cache_folder()
    try:
        file = make(dir=folder)
    except OSError:  # the home is read-only: use the system's folder
        file = make()
    return file, f"/proc/self/fd/{file.fileno()}" if linux else file.name


def _assemble(
    skeleton: Skeleton,
    room: int,
    weights: Iterable[tuple[np.ndarray, np.ndarray | None]],
    file: IO[bytes],
) -> Matrix:
    """Write a skeleton with its arguments replaced by constants.

    Args:
        skeleton: of a part.
        room: least number of bytes for the description of the weights, which precedes them.
        weights: the values of each argument, and the scale of int8 values.
        file: what to write to.

    Returns:
        The first weight.
    """
    program = skeleton.program
    graph = program.subgraphs[0]
    arguments = {graph.tensors[index].name.decode(): index for index in graph.inputs}
    constants = {name: i for name, i in arguments.items() if name.startswith(WEIGHT)}
    graph.inputs = np.array([i for i in graph.inputs if i not in constants.values()], np.int32)
    place = skeleton.size + room
    first = None
    for number, (values, scale) in enumerate(weights):
        tensor, buffer = graph.tensors[constants[f"{WEIGHT}{number}"]], lite_schema.BufferT()
        place += -place % ALIGNMENT
        file.seek(place)
        file.write(np.ascontiguousarray(values).data)
        first = first or Matrix(place, values.dtype, values.shape, scale)
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
    builder = flatbuffers.Builder(skeleton.size)
    builder.Finish(program.Pack(builder), b"TFL3")
    described = builder.Output()
    assert first is not None, "a part has weights"
    assert len(described) <= first.place, "the weights begin inside their description"
    file.seek(0)
    file.write(described)
    file.flush()
    return first


def _forget(file: IO[bytes]) -> None:
    """Drop the pages of a mapped file from memory; a page that is needed again is read again.

    XNNPACK has its own, packed copies of the weights. Outside Linux this does nothing, and the
    system drops the pages when it needs memory.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not Linux
        libc, inode = ctypes.CDLL(None), str(os.fstat(file.fileno()).st_ino)
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, allowed, _, _, of, *_ = line.split()
            # a file on another disk may have the same number; dropping pages of a shared mapping
            # that is only read loses nothing
            if of == inode and allowed == "r--s":
                start, end = (int(address, 16) for address in addresses.split("-"))
                size = ctypes.c_size_t(end - start)
                libc.madvise(ctypes.c_void_p(start), size, mmap.MADV_DONTNEED)

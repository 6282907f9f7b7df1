"""A part of the network as a LiteRT program with its weights, ready to run on a CPU.

LiteRT's kernels, XNNPACK, pack constant weights in the order in which the processor reads them, and
multiply them as float32 or, in eight bits, as integers. A Program is a Skeleton in which the
weights of a checkpoint were described; they follow it in the same file.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from gpt2cli import machine
from gpt2cli.errors import UserError
from gpt2cli.inference.engines import skeletons
from gpt2cli.inference.engines.litert_runtime import CompiledModel, Tensor
from gpt2cli.inference.engines.skeletons import Part, Skeleton, packed_shape
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import Values, weight_shapes

ALIGNMENT = 64  # bytes, of a weight in the file; a cache line
BLOCK = 256  # rows of a matrix that are quantized at once
FLOAT32, INT8 = 0, 9  # TensorType in tensorflow/lite/schema/schema.fbs


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 [n_out, n_in] as int8 of the same shape and float32 [n_out], its unit."""
    scale = np.maximum(matrix.max(-1), -matrix.min(-1)) / 127
    scale[scale == 0] = 1
    numbers = np.empty(matrix.shape, np.int8)
    for start in range(0, len(matrix), BLOCK):  # no temporary as large as the matrix
        rows = slice(start, start + BLOCK)
        np.rint(matrix[rows] / scale[rows, None], out=numbers[rows], casting="unsafe")
    return numbers, scale


class Packed(NamedTuple):
    """A weight as it lies in the file.

    Args:
        numbers: float32 or int8.
        scale: float32 [n_out], the unit of int8 numbers; None for float32.
    """

    numbers: np.ndarray
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

        def packed(name: str) -> Packed:
            array = np.asarray(stored(name, shapes[name]), np.float32)
            if packed_shape(name, array.shape) != array.shape:
                array = array.reshape(array.shape[-2:]).T
            is_small = array.ndim > 1 and precision == "int8"
            return Packed(*quantize(array)) if is_small else Packed(array, None)

        names = skeletons.weights_of(part, config)
        scales = [packed_shape(n, shapes[n])[0] for n in names if len(shapes[n]) > 1]
        made = skeletons.find(part, config)
        room = len(made.content) + sum(4 * n_out + 8 for n_out in scales)
        room += sum(8 * n_out + 16 for n_out in set(scales))
        file = _nameless_file()
        try:
            _assemble(made, config.n_vocab, room, map(packed, names), file)
            size = file.seek(0, os.SEEK_END)
            self._model = CompiledModel(file.fileno(), size, machine.cores())
            _forget(file)
        except OSError as error:
            raise UserError(
                f"no room for a file as large as the weights ({error.strerror}) in "
                f"{skeletons.cache_folder() or tempfile.gettempdir()}. "
                "Free some space, or set XDG_CACHE_HOME to a folder on another disk"
            ) from error
        finally:
            file.close()
        self._inputs = made.inputs

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> None:
        """Run: read the inputs, by name, and write the outputs, whose shapes must be right."""
        self._model.run([inputs[name] for name in self._inputs], outputs)


def _nameless_file() -> IO[bytes]:
    """Open a file that disappears when it is closed or the process dies."""
    try:
        return tempfile.TemporaryFile(dir=skeletons.cache_folder())
    except OSError:  # the home is read-only: use the system's folder
        return tempfile.TemporaryFile()


def _assemble(
    skeleton: Skeleton,
    n_vocab: int,
    room: int,
    weights: Iterable[Packed],
    file: IO[bytes],
) -> None:
    """Write a skeleton and its weights.

    Args:
        skeleton: of a part.
        n_vocab: number of tokens.
        room: least number of bytes for the description of the weights, which precedes them.
        weights: in the order of the skeleton's places.
        file: what to write to.
    """
    content = bytearray(skeleton.content)
    for at in skeleton.vocabulary:
        struct.pack_into("<i", content, at, n_vocab)
    zeros: dict[int, int] = {}  # a length -> the place of a vector of zero points
    end = room
    for place, (numbers, scale) in zip(skeleton.places, weights, strict=True):
        end += -end % ALIGNMENT
        file.seek(end)
        file.write(np.ascontiguousarray(numbers).data)
        struct.pack_into("<Q", content, place.offset, end)
        struct.pack_into("<Q", content, place.size, numbers.nbytes)
        end += numbers.nbytes
        if not place.kind:
            continue
        content[place.kind] = FLOAT32 if scale is None else INT8
        count = 0 if scale is None else len(scale)
        if count not in zeros:
            zeros[count] = _append(content, np.zeros(count, np.int64))
        at = _append(content, np.zeros(0, np.float32) if scale is None else scale)
        struct.pack_into("<I", content, place.scale, at - place.scale)
        struct.pack_into("<I", content, place.zero_point, zeros[count] - place.zero_point)
    assert len(content) <= room, "the weights begin inside their description"
    file.seek(0)
    file.write(content)
    file.flush()


def _append(content: bytearray, vector: np.ndarray) -> int:
    """Append a flatbuffer's vector, its length before its numbers; return its place."""
    content += bytes(-(len(content) + 4) % vector.itemsize)
    place = len(content)
    content += struct.pack("<I", len(vector)) + vector.tobytes()
    return place


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

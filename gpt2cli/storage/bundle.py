"""TensorFlow's V2 checkpoints (PREFIX.index, PREFIX.data-*), read without TensorFlow.

The index is a table of protobuf messages by name; the three that matter have a dozen fields, which
are read here: that takes fewer lines than the package protobuf, which would need TensorFlow's
generated classes, and no import. They are described in tensorflow/core/protobuf/tensor_bundle.proto
and tensorflow/core/framework/{tensor_shape,tensor_slice,versions}.proto.
"""

import errno
import math
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2cli.storage import table

Fields = dict[tuple[int, int], list[Any]]  # of a message: number and wire type -> values
Slice = tuple[tuple[int, int], ...]  # per axis: start and length, or WHOLE for all of it

WHOLE = (0, -1)  # TensorFlow's marks for an axis that is not sliced
VERSION = 1  # tensorflow/core/util/tensor_bundle, kTensorBundleVersion
MOST_AXES = 254  # of a tensor in TensorFlow

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protobuf

# tensorflow/core/framework/types.proto
KINDS = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 7: "string",
    8: "complex64", 9: "int64", 10: "bool", 14: "bfloat16", 17: "uint16", 18: "complex128",
    19: "float16", 22: "uint32", 23: "uint64", 24: "float8_e5m2", 25: "float8_e4m3fn",
}  # fmt: skip
EXTENSIONS = ("bfloat16", "float8_e5m2", "float8_e4m3fn")  # to NumPy, in ml_dtypes

POPULATE_READ = 22  # Linux's MADV_POPULATE_READ, which Python's mmap does not name


@dataclass(frozen=True)
class Entry:
    """A tensor in an index.

    Attributes:
        kind: NumPy's name of its type; "string", or "type N" where NumPy has none.
        shape: its sizes.
        shard: number of the file that contains it.
        offset: its first byte there.
        size: its bytes there; 0 for a tensor in slices.
        checksum: their masked CRC-32C.
        slices: the parts of a tensor that was saved in parts.
    """

    kind: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    slices: tuple[Slice, ...]

    @property
    def is_floating(self) -> bool:
        """Whether the numbers are fractions."""
        return self.kind.startswith(("float", "bfloat"))

    def dtype(self) -> np.dtype:
        """Return NumPy's type; ValueError where it has none."""
        if self.kind in EXTENSIONS:
            import ml_dtypes  # rarely needed

            return np.dtype(getattr(ml_dtypes, self.kind))
        if self.kind not in KINDS.values() or self.kind == "string":
            raise ValueError(f"it has a tensor of {self.kind}, which are not numbers")
        return np.dtype(self.kind)


class Bundle:
    """A checkpoint, opened.

    All of its index is checked at once, and each tensor when it is read: its checksum is compared.
    Tensors of numbers are views of the mapped file, so they take no memory of their own.

    Args:
        prefix: path of the checkpoint, without .index.

    Attributes:
        entries: name -> Entry.

    Raises:
        ValueError: a file is damaged or cut short; the text has the reason. `read` raises it too.
        OSError: a file is missing or cannot be read.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.entries: dict[str, Entry] = {}
        self._parts: dict[bytes, Entry] = {}  # slices, by the key that `_slice_key` gives
        self._maps: dict[int, mmap.mmap] = {}  # shard -> its file
        pairs = table.read(Path(f"{prefix}.index"))
        first, header = next(pairs, (None, b""))
        if first != b"":
            raise ValueError("its index has no header")
        self.shards = _shards(_fields(header))
        for key, value in pairs:
            entry = _entry(_fields(value))
            if key.startswith(b"\0"):
                self._parts[key] = entry
            else:
                self.entries[key.decode()] = entry
        self._check_sizes()

    def read(self, name: str) -> np.ndarray:
        """Return a tensor, read-only, after its checksum was compared."""
        entry = self.entries[name]
        return self._joined(name, entry) if entry.slices else self._values(name, entry)

    def _check_sizes(self) -> None:
        """Compare the index with the sizes of the files, before anything is mapped."""
        least: dict[int, int] = {}  # shard -> bytes of its file
        listed: dict[int, int] = {}  # where tensors shared bytes, reading could take days
        for entry in [*self.entries.values(), *self._parts.values()]:
            if not 0 <= entry.shard < self.shards:
                raise ValueError(f"its index names file {entry.shard} of {self.shards}")
            if not entry.slices:
                end = entry.offset + entry.size
                least[entry.shard] = max(end, least.get(entry.shard, 0))
                listed[entry.shard] = entry.size + listed.get(entry.shard, 0)
        for shard in least:
            needed = max(least[shard], listed[shard])
            if os.stat(self._path(shard)).st_size < needed:
                raise ValueError(f"its data is shorter than the {needed} bytes listed in its index")

    def _path(self, shard: int) -> str:
        return f"{self.prefix}.data-{shard:05d}-of-{self.shards:05d}"

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            with open(self._path(shard), "rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]

    def _values(self, name: str, entry: Entry) -> np.ndarray:
        """Return what an entry of the index describes: a whole tensor, or a slice of one."""
        dtype = entry.dtype()
        if not entry.size:
            return _locked(np.zeros(entry.shape, dtype))
        shared = self._map(entry.shard)
        if len(shared) < entry.offset + entry.size:
            raise ValueError("its data has become shorter")
        _fetch(shared, entry.offset, entry.size)
        data = np.frombuffer(shared, np.uint8, entry.size, entry.offset)
        if table.checksum(data) != entry.checksum:
            raise ValueError(f"{name} does not match its checksum")
        values = data.view(dtype).reshape(entry.shape)
        # it may follow a tensor of bytes
        return values if values.flags.aligned else _locked(values.copy())

    def _joined(self, name: str, entry: Entry) -> np.ndarray:
        """Return a tensor that was saved in slices, as variables on several servers are."""
        places, size = [], 0
        for axes in entry.slices:
            part = self._parts.get(_slice_key(name.encode(), axes))
            if part is None or part.kind != entry.kind or len(axes) != len(entry.shape):
                raise ValueError(f"a slice of {name} is missing")
            whole = zip(axes, entry.shape, strict=True)
            ends = [(s, s + n) if n >= 0 else (0, full) for (s, n), full in whole]
            shape = tuple(end - start for start, end in ends)
            fits = all(0 <= s <= e <= n for (s, e), n in zip(ends, entry.shape, strict=True))
            if not fits or shape != part.shape:
                raise ValueError(f"a slice of {name} does not fit")
            places.append((part, tuple(slice(*place) for place in ends)))
            size += part.size
        is_repeated = len(set(entry.slices)) < len(entry.slices)
        if is_repeated or size != math.prod(entry.shape) * entry.dtype().itemsize:
            raise ValueError(f"the slices of {name} do not make a whole")
        values = np.zeros(entry.shape, entry.dtype())
        known = np.zeros(entry.shape, bool)
        for part, where in places:
            values[where] = self._values(name, part)
            known[where] = True
        if not known.all():
            raise ValueError(f"the slices of {name} do not make a whole")
        return _locked(values)


def _locked(values: np.ndarray) -> np.ndarray:
    """Return an array, from now on read-only, as the views of a file are."""
    values.flags.writeable = False
    return values


def _fetch(shared: mmap.mmap, offset: int, size: int) -> None:
    """Have part of a file read now: if the disk fails, that is an error here, and SIGBUS later."""
    if sys.platform != "linux":
        return
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        shared.madvise(POPULATE_READ, start, offset + size - start)
    except OSError as error:
        if error.errno == errno.EFAULT:  # others are of Linux before 5.14, which reads later
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error


def _shards(header: Fields) -> int:
    """Return the number of data files."""
    if _number(header, 2) != 0:
        raise ValueError("it was written on a big-endian machine")
    least = _number(_message(header, 3), 2)
    if least > VERSION:
        raise ValueError(f"it has version {least} of the format, but only {VERSION} is known")
    return _number(header, 1)


def _entry(fields: Fields) -> Entry:
    """Return the Entry of a message, checked as far as it can be without the files."""
    number = _number(fields, 1)
    kind = KINDS.get(number, f"type {number}")
    described = _message(fields, 2)
    shape = tuple(_number(_fields(axis), 1) for axis in described.get((2, BYTES), []))
    slices = tuple(_slice(_fields(one)) for one in fields.get((7, BYTES), []))
    checksum = fields.get((6, FIXED32), [0])[-1]
    shard, offset, stored = (_number(fields, place) for place in (3, 4, 5))
    entry = Entry(kind, shape, shard, offset, stored, checksum, slices)
    if _number(described, 3) or len(shape) > MOST_AXES or min(shape, default=0) < 0:
        raise ValueError("its index has a shape that no tensor has")
    if entry.offset < 0 or entry.size < 0:
        raise ValueError("its index has a place before the start of the file")
    if kind in KINDS.values() and kind != "string":
        size = 0 if slices else math.prod(shape) * entry.dtype().itemsize
        if entry.size != size:
            raise ValueError(f"its index has a tensor of {entry.size} bytes that needs {size}")
    return entry


def _slice(fields: Fields) -> Slice:
    extents = (_fields(extent) for extent in fields.get((1, BYTES), []))
    return tuple((_number(e, 1), _number(e, 2)) if (2, VARINT) in e else WHOLE for e in extents)


def _fields(data: bytes) -> Fields:
    """Return the fields of a protobuf message; those of unknown numbers do no harm.

    Raises:
        ValueError: it is not a message.
    """
    found: Fields = {}
    at = 0
    while at < len(data):
        tag, at = table.varint(data, at)
        wire = tag & 7
        value: int | bytes | None = None
        if wire == VARINT:
            value, at = table.varint(data, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        elif wire == BYTES:
            size, at = table.varint(data, at)
            value, at = data[at : at + size], at + size
        if value is None or at > len(data):
            raise ValueError("its index has an entry that is not a message")
        found.setdefault((tag >> 3, wire), []).append(value)
    return found


def _number(fields: Fields, number: int) -> int:
    """Return a signed number; 0 if it is left out."""
    value = fields.get((number, VARINT), [0])[-1]
    return value - 2**64 if value >= 2**63 else value


def _message(fields: Fields, number: int) -> Fields:
    """Return the fields of a message in a message; none if it is left out."""
    return _fields(b"".join(fields.get((number, BYTES), [])))


def _slice_key(name: bytes, axes: Iterable[tuple[int, int]]) -> bytes:
    """Return the key of a slice: TensorFlow's EncodeTensorNameSlice, in saved_tensor_slice_util."""
    axes = list(axes)
    key = b"\0" + name.replace(b"\0", b"\0\xff") + b"\0\1"
    key += bytes([1, len(axes)]) if axes else b"\0"
    return key + b"".join(_ordered(number) for axis in axes for number in axis)


def _ordered(number: int) -> bytes:
    """Return a signed number in the bytes of tsl/lib/strings/ordered_code, which sort as it does.

    The first bits say how many bytes there are: 1, then one more 1 per further byte, then 0. All
    bits are inverted for a number below 0.
    """
    size = 1
    while not -(1 << 7 * size - 1) <= number < 1 << 7 * size - 1:
        size += 1
    bits = 8 * size
    header = ((1 << size) - 1) << (bits - size)
    return ((number & (1 << bits) - 1) ^ header).to_bytes(size, "big")

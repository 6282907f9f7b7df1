"""LiteRT's compiled models, through the C interface of its library.

The package's Python classes for them copy every input and output and cannot give inputs a shape.
This module declares the dozen functions that are needed, from the headers litert/c/*.h; the names
and constants are theirs. Arrays are used in place.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from importlib import util
from pathlib import Path

import numpy as np

from gpt2cli import console

ALIGNMENT = 64  # bytes; litert_tensor_buffer_types.h, LITERT_HOST_MEMORY_BUFFER_ALIGNMENT
LARGEST_RANK = 8  # litert_layout.h, LITERT_TENSOR_MAX_RANK
FLOAT32 = 1  # litert_model_types.h, kLiteRtElementTypeFloat32
CPU = 1  # litert_common.h, kLiteRtHwAcceleratorCpu
INT = 2  # litert_any.h, kLiteRtAnyTypeInt
# litert_environment_options.h: other accelerators are not loaded; only errors are logged
ACCELERATORS, SEVERITY = 24, 25
ERRORS = 4

LIBRARIES = {"linux": "libLiteRt.so", "darwin": "libLiteRt.dylib", "win32": "LiteRt.dll"}


class _Layout(ctypes.Structure):
    _fields_ = (
        ("rank", c_uint32),  # and a bit that says whether there are strides
        ("dimensions", c_int32 * LARGEST_RANK),
        ("strides", c_uint32 * LARGEST_RANK),
    )


class _TensorType(ctypes.Structure):
    _fields_ = (("element_type", c_int32), ("layout", _Layout))


class _Any(ctypes.Structure):
    _fields_ = (("type", c_int32), ("value", c_int64))


class _Option(ctypes.Structure):
    _fields_ = (("tag", c_int32), ("value", _Any))


# as the headers assert
assert ctypes.sizeof(_TensorType) == 72 and ctypes.sizeof(_Option) == 24

SIGNATURES = {
    "LiteRtCreateEnvironment": (c_int, c_void_p, c_void_p),
    "LiteRtCreateModelFromFd": (c_void_p, c_int, c_size_t, c_size_t, c_void_p),
    "LiteRtCreateOptions": (c_void_p,),
    "LiteRtSetOptionsHardwareAccelerators": (c_void_p, c_int),
    "LiteRtCreateOpaqueOptions": (c_char_p, c_void_p, c_void_p, c_void_p),
    "LiteRtAddOpaqueOptions": (c_void_p, c_void_p),
    "LiteRtCreateCompiledModel": (c_void_p, c_void_p, c_void_p, c_void_p),
    "LiteRtCreateTensorBufferFromHostMemory": (c_void_p, c_void_p, c_size_t, c_void_p, c_void_p),
    "LiteRtRunCompiledModel": (
        *(c_void_p, c_size_t, c_size_t, POINTER(c_void_p), c_size_t, POINTER(c_void_p)),
    ),
}
ENDS = ("CompiledModel", "Model", "Options", "TensorBuffer")  # LiteRtDestroy...


@functools.cache
def _library() -> ctypes.CDLL:
    """Load LiteRT's library, and declare what is used of it."""
    spec = util.find_spec("ai_edge_litert")
    assert spec and spec.origin, "setup.py requires it"
    library = ctypes.CDLL(str(Path(spec.origin).with_name(LIBRARIES[sys.platform])))
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    for end in ENDS:
        function = getattr(library, f"LiteRtDestroy{end}")
        function.argtypes, function.restype = (c_void_p,), None
    return library


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed with status {status}")


@functools.cache
def _environment() -> c_void_p:
    """Return the one environment of this process."""
    options = (_Option * 2)(
        _Option(ACCELERATORS, _Any(INT, CPU)), _Option(SEVERITY, _Any(INT, ERRORS))
    )
    environment = c_void_p()
    _call("LiteRtCreateEnvironment", len(options), options, byref(environment))
    return environment


class Tensor:
    """An array that a compiled model reads or writes in place.

    Args:
        shape: its sizes; it begins as zeros.

    Attributes:
        array: float32.
    """

    def __init__(self, *shape: int) -> None:
        self._handle = c_void_p()
        memory = np.zeros(4 * int(np.prod(shape)) + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        self.array = memory[start : start + memory.size - ALIGNMENT].view(np.float32).reshape(shape)
        kind = _TensorType(FLOAT32)
        kind.layout.rank = len(shape)
        kind.layout.dimensions[: len(shape)] = shape
        place, size = self.array.ctypes.data, self.array.nbytes
        arguments = (byref(kind), place, size, None, byref(self._handle))
        _call("LiteRtCreateTensorBufferFromHostMemory", *arguments)

    def __del__(self) -> None:
        """Release what LiteRT keeps about the array."""
        if self._handle:
            _library().LiteRtDestroyTensorBuffer(self._handle)


class CompiledModel:
    """A program that is ready to run.

    Args:
        file: descriptor of the program's file, which may be closed afterwards.
        size: its bytes.
        threads: number of threads.
        packed: file of the weights in XNNPACK's order, which is written if it does not exist.

    Raises:
        RuntimeError: the file is not a program.
    """

    def __init__(self, file: int, size: int, threads: int, packed: Path | None = None) -> None:
        self._model, self._compiled, options, own = (c_void_p() for _ in range(4))
        with console.without_noise():
            _call("LiteRtCreateModelFromFd", _environment(), file, 0, size, byref(self._model))
            _call("LiteRtCreateOptions", byref(options))
            try:
                _call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
                cache = f"weight_cache_file_path = {_quoted(packed)}\n" if packed else ""
                text = ctypes.create_string_buffer(f"num_threads = {threads}\n{cache}".encode())
                _call("LiteRtCreateOpaqueOptions", b"xnnpack", text, _KEEP, byref(own))
                _call("LiteRtAddOpaqueOptions", options, own)
                arguments = (self._model, options, byref(self._compiled))
                _call("LiteRtCreateCompiledModel", _environment(), *arguments)
            finally:
                _library().LiteRtDestroyOptions(options)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Run once; inputs may have other shapes than the last time."""
        given, made = (
            (c_void_p * len(tensors))(*(tensor._handle for tensor in tensors))
            for tensors in (inputs, outputs)
        )
        counts = len(inputs), len(outputs)
        _call("LiteRtRunCompiledModel", self._compiled, 0, counts[0], given, counts[1], made)

    def __del__(self) -> None:
        """Release the program and its packed weights."""
        if self._compiled:
            _library().LiteRtDestroyCompiledModel(self._compiled)
        if self._model:
            _library().LiteRtDestroyModel(self._model)


_KEEP = ctypes.CFUNCTYPE(None, c_void_p)(lambda text: None)  # Python frees the options' text


def _quoted(path: Path) -> str:
    """Return a path as a basic string of TOML."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'

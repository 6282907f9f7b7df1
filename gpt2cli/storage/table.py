"""The index of a TensorFlow checkpoint: a sorted table of bytes -> bytes, in LevelDB's format.

A table is a row of blocks of pairs, a block that lists them, and a footer that leads to this list.
Each key leaves out the beginning that it shares with the key before it, and each block has a
checksum. The format is described in LevelDB's doc/table_format.md; TensorFlow's copy of it, in
tsl/lib/io, differs in nothing that is read here.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c

MAGIC = 0xDB4775248B80FB57  # tsl/lib/io/format.h, kTableMagicNumber
FOOTER = 48  # bytes: two handles, padding, MAGIC
MASK = 0xA282EAD8  # tsl/lib/hash/crc32c.h, kMaskDelta

# Bytes of an index, and of its keys. The largest GPT-2 needs 50,000; a damaged or malicious index
# must not fill the memory.
MOST = 1 << 26


def read(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield a table's keys and values; each key is greater than the one before.

    Raises:
        ValueError: the table is damaged; the text has the reason.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MOST + 1)
    if len(data) > MOST:
        raise ValueError(f"its index has more than {MOST:,} bytes")
    if len(data) < FOOTER or data[-8:] != struct.pack("<Q", MAGIC):
        raise ValueError("its index is not one of TensorFlow's, or has lost its end")
    footer = data[-FOOTER:]
    _, at = _handle(footer, 0)  # of a block that TensorFlow leaves empty
    place, _ = _handle(footer, at)
    last, length = None, 0
    for _, value in _pairs(_block(data, place)):
        found = False
        for key, content in _pairs(_block(data, _handle(value, 0)[0])):
            if last is not None and key <= last:
                raise ValueError("the names in its index are not in order")
            last, length, found = key, length + len(key), True
            if length > MOST:
                raise ValueError(f"the names in its index have more than {MOST:,} bytes")
            yield key, content
        if not found:
            raise ValueError("its index has an empty block")


def checksum(data: Any) -> int:
    """Return the masked CRC-32C of bytes or of a read-only array of bytes."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number of 7-bit groups that starts at a place, below 2**64, and the next place."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value & (2**64 - 1), at
    raise ValueError("its index has a number that does not end")


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Return the start and size of a block, as written at a place, and the next place."""
    start, at = varint(data, at)
    size, at = varint(data, at)
    return (start, size), at


def _block(data: bytes, place: tuple[int, int]) -> bytes:
    """Return a block's content, compared with its checksum."""
    start, size = place
    end = start + size
    if end + 5 > len(data):
        raise ValueError("a block of its index lies beyond the end of the file")
    if checksum(data[start : end + 1]) != struct.unpack_from("<I", data, end + 1)[0]:
        raise ValueError("a block of its index does not match its checksum")
    if data[end] != 0:
        raise ValueError("its index is compressed, but TensorFlow writes it without compression")
    return data[start:end]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield a block's keys and values."""
    if len(block) < 4:
        raise ValueError("a block of its index is too short")
    restarts = struct.unpack_from("<I", block, len(block) - 4)[0]  # places of whole keys, not used
    end = len(block) - 4 - 4 * restarts
    at, key = 0, b""
    while at < end:
        shared, at = varint(block, at)
        own, at = varint(block, at)
        size, at = varint(block, at)
        if shared > len(key) or at + own + size > end:
            raise ValueError("a block of its index has a key or value that does not fit")
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + size]
        at += size
    if at != max(end, 0) or end < 0:
        raise ValueError("a block of its index ends in the wrong place")

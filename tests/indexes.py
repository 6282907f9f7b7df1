"""Indexes of TensorFlow checkpoints, written here so that any field can be wrong."""

import struct

from gpt2cli.storage import table


def varint(number):
    """Return a number, negative ones in ten bytes."""
    number %= 2**64
    groups = []
    while True:
        groups.append(number & 127 | (128 if number > 127 else 0))
        number >>= 7
        if not number:
            return bytes(groups)


def field(number, value):
    """Return a field of a protobuf message: an int, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(kind=1, shape=(2,), shard=0, offset=0, size=8, checksum=0):
    """Return the message about a tensor; kind 1 is float32."""
    axes = b"".join(field(2, field(1, n)) for n in shape)
    message = field(1, kind) + field(2, axes) + field(3, shard) + field(4, offset)
    return message + field(5, size) + b"\x35" + struct.pack("<I", checksum)


def header(shards=1, endianness=0, least=0):
    return field(1, shards) + field(2, endianness) + field(3, field(1, 1) + field(2, least))


def block(pairs):
    """Return a block of keys and values in their given order, each key whole."""
    body = b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
    return body + struct.pack("<II", 0, 1)


def sealed(*blocks):
    """Return a table of these blocks, with right checksums."""
    data, places = b"", []
    for content in blocks:
        places.append((b"k%d" % len(places), varint(len(data)) + varint(len(content))))
        data += _with_checksum(content)
    top = block(places)
    footer = varint(0) + varint(0) + varint(len(data)) + varint(len(top))
    return data + _with_checksum(top) + footer.ljust(40, b"\0") + struct.pack("<Q", table.MAGIC)


def _with_checksum(content, compression=0):
    whole = content + bytes([compression])
    return whole + struct.pack("<I", table.checksum(whole))


def model(weights):
    """Return the only block, not yet `sealed`, and the data of a checkpoint of float32 arrays."""
    pairs, data = [(b"", header())], b""
    for name, values in sorted(weights.items()):
        content = values.tobytes()
        checksum = table.checksum(content)
        place = {"offset": len(data), "size": len(content), "checksum": checksum}
        pairs.append((name.encode(), entry(1, values.shape, **place)))
        data += content
    return block(pairs), data

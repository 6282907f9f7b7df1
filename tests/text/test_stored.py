"""Arrays of ids and lines of text that were made to fill the memory."""

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from conftest import TINY

from gpt2cli import machine
from gpt2cli.errors import UserError
from gpt2cli.jobs import prompts
from gpt2cli.options import TextOptions
from gpt2cli.text import corpus, encoder, jsontext, stored

LONG = 1000  # characters of the longest value, in these tests


def array(shape, dtype="<u2", data=b"", version=1, size=None):
    """The bytes of a .npy with any header; `size` is the header's size that it states."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(header) if size is None else size)
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def archive(path, *members):
    """Write a zip archive, and return its path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def overlapping(path, count, size):
    """Write an archive whose members are all the same compressed bytes."""
    body = array(f"({size},)", "|u1") + bytes(size)
    packer = zlib.compressobj(9, wbits=-15)
    data = packer.compress(body) + packer.flush()
    sizes = (zlib.crc32(body), len(data), len(body))
    names = [b"arr_%d.npy" % n for n in range(count)]
    first = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 8, 0, 0, *sizes, len(names[0]), 0)
    local = first + names[0] + data
    listed = b"".join(
        struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 8, 0, 0, *sizes, len(name), *[0] * 6
        )
        + name
        for name in names
    )
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(listed), len(local), 0)
    path.write_bytes(local + listed + end)


def read(path):
    return [chunk.tolist() for chunk in stored.read(path, 2048)]


GOOD = array("(3,)", data=b"\1\0\2\0\3\0")


def test_an_archive_of_many_small_arrays_is_read(tmp_path):
    path = archive(tmp_path / "a.npz", *((f"arr_{n}.npy", GOOD) for n in range(200)))
    assert read(path) == [[1, 2, 3]] * 200


@pytest.mark.parametrize("ending", ["npy", "npz"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (array("(1000000000000000,)"), "shorter than its header|greater than file size"),
        (array("(-5,)"), "negative dimensions"),
        (array("(-1, -1)", data=b"ab"), "dimension|greater than file size"),
        (array(f"({'9' * 5000},)"), "is damaged"),
        (array("(1,)", "|O", b"ab"), "Object arrays|Python objects"),
        (array("()", data=b"\1\0"), "not a 1-D array"),
        (array("(1, 3)", data=b"\1\0\2\0\3\0"), "not a 1-D array"),
        (array("(1000000000000000,)", "|V0"), "not a 1-D array"),
        (array("(3,)", version=2, size=2**32 - 1), "its header has 4,294,967,295 bytes"),
        (array("(3,)", version=3, size=2**31), "its header has 2,147,483,648 bytes"),
        (array("(3,)", version=9), "is damaged"),
        (b"", "is damaged"),
        (b"GGUF" + bytes(100), "is damaged"),
    ],
)
def test_an_array_that_is_not_what_its_header_says_is_rejected(tmp_path, ending, content, fault):
    path = tmp_path / f"a.{ending}"
    if ending == "npy":
        path.write_bytes(content)
    else:
        archive(path, ("arr_0.npy", content))
    with pytest.raises(UserError, match=fault) as caught:
        read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def test_two_arrays_of_one_name_and_an_archive_in_an_archive_are_rejected(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = archive(tmp_path / "a.npz", ("arr_0.npy", GOOD), ("arr_0.npy", GOOD))
    with pytest.raises(UserError, match="have the same name"):
        read(path)
    inner = archive(io.BytesIO(), ("arr_0.npy", GOOD)).getvalue()
    with pytest.raises(UserError, match="magic string is not correct"):
        read(archive(tmp_path / "b.npz", ("arr_0.npy", inner)))


def test_members_that_are_the_same_bytes_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "BOMB", 10**6)
    overlapping(tmp_path / "a.npz", 30, 10**5)
    with pytest.raises(UserError, match=r"would unpack from .* to 3,00\d,\d{3} bytes"):
        read(tmp_path / "a.npz")


def test_a_false_compressed_size_does_not_hide_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "BOMB", 10**5)
    path = archive(tmp_path / "a.npz", ("arr_0.npy", array("(500000,)") + bytes(10**6)))
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\x01\x02") + 20
    content[place : place + 4] = struct.pack("<I", 2**31)
    path.write_bytes(content)
    with pytest.raises(UserError, match="looks like an attack"):
        read(path)


def test_an_archive_that_does_not_fit_into_memory_is_rejected(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.npz", ("arr_0.npy", GOOD), ("arr_1.npy", GOOD))
    size = 2 * len(GOOD)
    monkeypatch.setattr(machine, "free_memory", lambda: size)
    assert read(path) == [[1, 2, 3]] * 2
    monkeypatch.setattr(machine, "free_memory", lambda: size - 1)
    with pytest.raises(UserError, match=rf"unpacks to {size} bytes, but only {size - 1} bytes"):
        read(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '"' + "a" * 2 * LONG),
        ("a.csv", 'text\n"' + "a" * 2 * LONG),
        ("a.csv", 'text\n"' + "a\n" * LONG),
        ("a.tsv", 'text\n"' + "a\n" * LONG),
        ("a.txt", "a" * 2 * LONG),
    ],
)
def test_a_value_that_would_fill_the_memory_is_rejected(tmp_path, monkeypatch, name, text):
    for module in (jsontext, corpus.records):
        monkeypatch.setattr(module, "LONGEST", LONG)
    monkeypatch.setattr(corpus, "BLOCK", 64)
    path = tmp_path / name
    path.write_text(text)
    cut = encoder.load(TINY).CUT
    with pytest.raises(UserError, match=rf"{name}.* more than 1,000 characters"):
        list(corpus.parts_of(path, cut, TextOptions(), lambda size: None))
    with pytest.raises(UserError, match=rf"{name}.* more than 1,000 characters"):
        prompts.read(None, None, str(path), TextOptions())


def test_prompts_that_would_fill_the_memory_are_rejected(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("a b\n" * 5000)
    monkeypatch.setattr(prompts, "LEAST_ROOM", 10**5)
    monkeypatch.setattr(machine, "free_memory", lambda: 4 * 10**7)  # a quarter is enough
    assert len(prompts.read(None, None, str(path), TextOptions())) == 5000
    for free in (None, 4 * 10**5):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        with pytest.raises(UserError, match=r"a.txt has too many prompts: .* need 100,000 bytes"):
            prompts.read(None, None, str(path), TextOptions())
    monkeypatch.setattr(jsontext, "LONGEST", LONG)
    with pytest.raises(UserError, match=r"a.txt has more than .* characters"):
        prompts.read(None, str(path), None, TextOptions())
    with open(path, "rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
        with pytest.raises(UserError, match=r"standard input has more than .* characters"):
            prompts.read("-", None, None, TextOptions())


def test_copies_of_files_do_not_fill_the_memory_of_a_container(tmp_path, monkeypatch):
    """Linux counts them as used, and keeps them until memory is needed."""
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "sys/fs/cgroup/memory.max": "5000000\n",
        "sys/fs/cgroup/memory.current": "4900000\n",
        "sys/fs/cgroup/memory.stat": "anon 900000\nactive_file 1000000\ninactive_file 3000000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert machine.free_memory() == 4_100_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine.free_memory() == 8000 * 1024


def test_plain_arrays_are_still_mapped(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5, dtype=np.uint16))
    (found,) = stored.read(tmp_path / "a.npy", 2048)
    assert isinstance(found, np.memmap) and found.tolist() == [0, 1, 2, 3, 4]

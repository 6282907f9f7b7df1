"""Checkpoints read without TensorFlow, compared with TensorFlow's own reader."""

import contextlib
import itertools
import mmap
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import indexes
import numpy as np
import pytest
from conftest import GOLDEN, ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cli.errors import UserError
from gpt2cli.storage import bundle, folders, reading, table
from gpt2cli.storage.bundle import Bundle
from gpt2cli.tensorflow import tf

SHARD = ".data-00000-of-00001"
FIXTURES = sorted([*TINY.glob("*.index"), *GOLDEN.rglob("*.index")])
NUMBERS = [tf.as_dtype(kind) for kind in bundle.KINDS.values() if kind != "string"]


def save(prefix, tensors, slices=None):
    names = list(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=[name.partition("@")[0] for name in names],
        shape_and_slices=slices or [""] * len(names),
        tensors=list(tensors.values()),
    )
    return prefix


def of(kind, values):
    """Return a tensor; TensorFlow cannot cast to all types."""
    return tf.constant(values.astype(kind.as_numpy_dtype))


def check_same(prefix):
    """Compare all tensors of numbers and the list of all; return the Bundle."""
    found, expected = Bundle(prefix), tf.train.load_checkpoint(str(prefix))
    shapes = expected.get_variable_to_shape_map()
    kinds = expected.get_variable_to_dtype_map()
    assert {name: list(entry.shape) for name, entry in found.entries.items()} == shapes
    assert {name: entry.kind for name, entry in found.entries.items()} == {
        name: kind.name for name, kind in kinds.items()
    }
    for name, kind in kinds.items():
        if kind != tf.string:
            wanted, value = np.asarray(expected.get_tensor(name)), found.read(name)
            assert value.dtype == wanted.dtype and value.shape == wanted.shape
            assert value.tobytes() == wanted.tobytes()
            assert value.flags.aligned and not value.flags.writeable
    return found


def values_of(prefix):
    """Return all values of a checkpoint as bytes, or None where it is rejected."""
    try:
        found = Bundle(prefix)
        return {n: found.read(n).tobytes() for n in found.entries}
    except (ValueError, OSError):
        return None


@pytest.mark.parametrize("index", FIXTURES, ids=lambda path: path.parent.name)
def test_each_checkpoint_of_the_repository_is_read_as_tensorflow_reads_it(index):
    assert len(FIXTURES) >= 3
    assert len(check_same(index.with_suffix("")).entries) > 20


def test_every_type_scalars_and_empty_tensors_are_read(tmp_path):
    made = {"b": np.arange(6).reshape(2, 3), "c": np.array(1), "d": np.zeros([0, 3])}
    tensors = {f"{n}/{kind.name}": of(kind, v) for n, v in made.items() for kind in NUMBERS}
    tensors["a"] = tf.constant([True, False, True])  # so that those behind it are not aligned
    tensors["e"] = tf.constant(["text", "of two lengths"])
    found = check_same(save(tmp_path / "x", tensors))
    with pytest.raises(ValueError, match="string"):
        found.read("e")
    assert [name for name, entry in found.entries.items() if entry.is_floating] == [
        name for name in sorted(tensors) if name[0] in "bcd" and tensors[name].dtype.is_floating
    ]


def test_types_that_numpy_lacks_are_listed(tmp_path):
    tensors = {"a": tf.quantization.quantize([1.0], 0, 1, tf.qint8)[0], "b": tf.constant([5.0])}
    found = Bundle(save(tmp_path / "x", tensors))
    assert found.entries["a"].kind == "type 11" and found.read("b") == [5.0]
    with pytest.raises(ValueError, match="type 11"):
        found.read("a")


def test_an_index_of_several_blocks_is_read(tmp_path):
    chance = random.Random(1)
    names = [f"model/h{n % 9}/{chance.randbytes(300).hex()[n % 60 :]}" for n in range(1200)]
    save(tmp_path / "x", {name: tf.constant(float(n)) for n, name in enumerate(names)})
    assert (tmp_path / "x.index").stat().st_size > 2 * 256 * 1024  # TensorFlow's size of a block
    found = Bundle(tmp_path / "x")
    assert {name: float(found.read(name)) for name in names} == {
        name: n for n, name in enumerate(names)
    }
    assert len(found.entries) == len(names)


def test_several_shards_are_read(tmp_path):
    parts = [str(tmp_path / f"part{n}") for n in range(3)]
    for n, part in enumerate(parts):
        save(part, {f"{n}/a": tf.range(5.0) + n, f"{n}/b": tf.constant(n)})
    merged = tmp_path / "merged"
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(merged))
    assert {entry.shard for entry in check_same(merged).entries.values()} == {0, 1, 2}
    (tmp_path / "merged.data-00001-of-00003").unlink()
    with pytest.raises(OSError, match="00001-of-00003"):
        Bundle(merged)


def test_files_of_both_of_tensorflows_savers_are_read(tmp_path):
    variables = {f"v{n}": tf.Variable(tf.random.stateless_normal([n, 3], [1, n])) for n in range(4)}
    saver = tf.compat.v1.train.Saver(variables)
    check_same(Path(saver.save(None, str(tmp_path / "old"), global_step=5)))
    path = tf.train.Checkpoint(step=tf.Variable(1), **variables).save(str(tmp_path / "new"))
    found = check_same(Path(path))
    assert "_CHECKPOINTABLE_OBJECT_GRAPH" in found.entries and "save_counter" in str(found.entries)


@pytest.mark.parametrize("columns", [[(0, 4)], [(0, 1), (1, 3)]])
def test_a_variable_in_slices_is_joined(tmp_path, columns):
    whole = np.arange(200 * 4, dtype=np.float32).reshape(200, 4)
    tensors, slices = {}, []
    for start, count in ((0, 70), (70, 1), (71, 129)):
        for left, width in columns:
            tensors[f"w@{start},{left}"] = whole[start : start + count, left : left + width]
            axis = "-" if width == 4 else f"{left},{width}"
            slices.append(f"200 4 {start},{count}:{axis}")
    prefix = save(tmp_path / "x", {**tensors, "v": tf.zeros([2])}, [*slices, ""])
    found = check_same(prefix)
    assert list(found.entries) == ["v", "w"] and np.array_equal(found.read("w"), whole)


def test_slices_that_do_not_make_a_whole_are_rejected(tmp_path):
    for slices in (["4 0,1", "4 2,2"], ["4 0,1", "4 1,2"]):
        tensors = {"w@0": tf.zeros([1]), "w@1": tf.zeros([2])}
        found = Bundle(save(tmp_path / "x", tensors, slices))
        with pytest.raises(ValueError, match="the slices of w do not make a whole"):
            found.read("w")


@pytest.mark.parametrize("number", [0, 1, -1, 63, 64, -64, -65, 8191, 8192, -8193, 2**40, 2**62])
def test_numbers_in_keys_of_slices_sort_as_they_do(number):
    near = [n for n in range(number - 3, number + 4) if -(2**63) <= n < 2**63]
    keys = [bundle._ordered(n) for n in near]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)


@pytest.fixture
def small(tmp_path):
    """A checkpoint of a few hundred bytes, with slices, and its values."""
    tensors = {"a/b": tf.range(5.0), "a/c": tf.constant([1, 2], tf.bfloat16), "n": tf.constant(7)}
    tensors |= {"w@0": tf.zeros([1]), "w@1": tf.ones([2])}
    prefix = save(tmp_path / "x", tensors, ["", "", "", "3 0,1", "3 1,2"])
    return prefix, values_of(prefix)


@pytest.mark.parametrize("bits", [[3], pytest.param(range(8), marks=pytest.mark.slow)])
def test_no_flipped_bit_gives_a_wrong_value(small, bits):
    prefix, expected = small
    outcomes = set()
    for ending in (".index", SHARD):
        path = Path(f"{prefix}{ending}")
        whole = path.read_bytes()
        for place, bit in itertools.product(range(len(whole)), bits):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << (place + bit) % 8
            path.write_bytes(damaged)
            outcomes.add(str(found := values_of(prefix))[:4])
            assert found in (None, expected), place
        path.write_bytes(whole)
    assert outcomes == {"None", "{'a/"}  # the footer has bytes that mean nothing


def test_a_file_cut_anywhere_is_rejected(small):
    prefix, expected = small
    for ending in (".index", SHARD):
        path = Path(f"{prefix}{ending}")
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            assert values_of(prefix) is None
        path.write_bytes(whole)
    assert values_of(prefix) == expected


ARRAYS = st.tuples(
    st.sampled_from(NUMBERS), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**32 - 1)
)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.text(min_size=1, max_size=9), ARRAYS, min_size=1, max_size=5))
def test_any_names_and_shapes_are_read(tmp_path_factory, tensors):
    made = {}
    for name, (kind, shape, seed) in tensors.items():
        with contextlib.suppress(UnicodeEncodeError):
            name.encode()
            noise = np.random.default_rng(seed).integers(0, 9, shape)
            if not name.startswith("\0"):
                made[name.replace("@", "a")] = of(kind, noise)
    if made:
        check_same(save(tmp_path_factory.mktemp("any") / "x", made))


def write_index(folder, pairs, **head):
    (folder / f"x{SHARD}").write_bytes(bytes(8))
    content = indexes.block([(b"", indexes.header(**head)), *pairs])
    (folder / "x.index").write_bytes(indexes.sealed(content))
    return folder / "x"


ZEROS = table.checksum(bytes(8))
GOOD = indexes.entry(checksum=ZEROS)
HOSTILE = {
    "order": [(b"b", GOOD), (b"a", GOOD)],
    "twice": [(b"a", GOOD), (b"a", GOOD)],
    "not a message": [(b"a", b"\xff" * 9)],
    "group": [(b"a", b"\x0b")],
    "cut message": [(b"a", GOOD[:-1])],
    "utf-8": [(b"\xff", GOOD)],
    "file 1": [(b"a", indexes.entry(shard=1))],
    "file -1": [(b"a", indexes.entry(shard=-1))],
    "negative axis": [(b"a", indexes.entry(shape=(-2,)))],
    "two negative axes": [(b"a", indexes.entry(shape=(-2, -1)))],
    "huge": [(b"a", indexes.entry(shape=(2**40,), size=2**42))],
    "overflowing": [(b"a", indexes.entry(shape=(2**62 + 2,)))],
    "overflowing to 0": [(b"a", indexes.entry(shape=(2**32, 2**32), size=0))],
    "many axes": [(b"a", indexes.entry(shape=(1,) * 255, size=4))],
    "more than numpy's axes": [(b"a", indexes.entry(shape=(1,) * 70, size=4))],
    "size": [(b"a", indexes.entry(size=4))],
    "negative size": [(b"a", indexes.entry(size=-8))],
    "negative offset": [(b"a", indexes.entry(offset=-8))],
    "offset": [(b"a", indexes.entry(offset=1, checksum=ZEROS))],
    "overflowing offset": [(b"a", indexes.entry(offset=2**63 - 4))],
    "checksum": [(b"a", indexes.entry(checksum=1))],
    "bytes of two": [(b"a", GOOD), (b"b", GOOD)],
    "slice": [(b"a", indexes.entry(size=0) + indexes.field(7, b""))],
    "unknown type": [(b"a", indexes.entry(kind=99))],
    "type 0": [(b"a", indexes.entry(kind=0))],
    "unknown rank": [(b"a", GOOD + indexes.field(2, indexes.field(3, 1)))],
}  # fmt: skip


def test_a_written_index_is_read(tmp_path):
    assert values_of(write_index(tmp_path, [(b"a", GOOD)])) == {"a": bytes(8)}
    check_same(tmp_path / "x")


@pytest.mark.parametrize("fault", HOSTILE)
def test_an_index_with_right_checksums_and_wrong_fields_is_rejected(tmp_path, fault):
    assert values_of(write_index(tmp_path, HOSTILE[fault])) is None


@pytest.mark.parametrize("head, words", [
    ({"shards": 0}, "file 0 of 0"), ({"endianness": 1}, "big-endian"), ({"least": 2}, "version 2"),
])  # fmt: skip
def test_a_header_of_another_format_is_rejected_by_name(tmp_path, head, words):
    with pytest.raises(ValueError, match=words):
        Bundle(write_index(tmp_path, [(b"a", GOOD)], **head))


def test_a_compressed_index_is_rejected_by_name(tmp_path):
    write_index(tmp_path, [])
    data = indexes._with_checksum(indexes.block([]), compression=1)
    end = indexes.varint(0) * 2 + indexes.varint(0) + indexes.varint(len(data) - 5)
    (tmp_path / "x.index").write_bytes(data + end.ljust(40, b"\0") + struct.pack("<Q", table.MAGIC))
    with pytest.raises(ValueError, match="compressed"):
        Bundle(tmp_path / "x")


def test_names_that_would_fill_the_memory_are_rejected(tmp_path):
    """Each of 3,000 names of 100 kB costs ten bytes of the index."""
    first = b"a" * 100_000 + b"0000"
    body = b"\0\0" + indexes.varint(len(indexes.header())) + indexes.header()
    body += b"\0" + indexes.varint(len(first)) + b"\2" + first + b"\x28\0"
    for n in range(1, 3000):
        body += indexes.varint(len(first) - 4) + b"\4\2" + b"%04d" % n + b"\x28\0"
    write_index(tmp_path, [])
    (tmp_path / "x.index").write_bytes(indexes.sealed(body + struct.pack("<II", 0, 1)))
    with pytest.raises(ValueError, match="the names in its index"):
        Bundle(tmp_path / "x")


def test_a_block_that_is_listed_twice_is_rejected(tmp_path):
    head = indexes.block([(b"", indexes.header())])
    write_index(tmp_path, [])
    for blocks in ((head, head), (head, indexes.block([]))):
        (tmp_path / "x.index").write_bytes(indexes.sealed(*blocks))
        assert values_of(tmp_path / "x") is None


@pytest.fixture
def tiny(tmp_path):
    """A copy of models/tiny that may be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def test_damage_is_reported_with_file_reason_and_advice(tiny):
    path = tiny / f"model.ckpt{SHARD}"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        reading.verify(tiny)
    assert str(error.value).startswith(f"cannot read {tiny}/model.ckpt.*: it is damaged or cut")
    assert "does not match its checksum). Fetch it again with gpt2cli download" in str(error.value)


def lacks_populate():
    with mmap.mmap(-1, mmap.PAGESIZE) as memory, contextlib.suppress(OSError, AttributeError):
        memory.madvise(22)
        return False
    return True


@pytest.mark.skipif(lacks_populate(), reason="needs Linux 5.14")
def test_a_part_of_the_file_that_cannot_be_read_is_an_error_and_not_a_signal(tiny):
    """As on a failing disk: the file ends after it was mapped."""
    code = (
        "import errno, os, pathlib\n"
        "from gpt2cli.storage.bundle import Bundle\n"
        f"found = Bundle(pathlib.Path({str(tiny / 'model.ckpt')!r}))\n"
        "first, *_, last = sorted(found.entries, key=lambda name: found.entries[name].offset)\n"
        "found.read(first)\n"
        f"os.truncate({str(tiny / f'model.ckpt{SHARD}')!r}, found.entries[last].offset - 9000)\n"
        "try:\n"
        "    found.read(last)\n"
        "except OSError as error:\n"
        "    assert error.errno == errno.EIO\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_old_kernel_reads_too(tiny, monkeypatch):
    monkeypatch.setattr(bundle, "POPULATE_READ", 9999)  # EINVAL
    reading.verify(tiny)


def test_weights_of_other_precisions_are_read(tiny):
    weights = Bundle(tiny / "model.ckpt")
    for kind in ("float64", "float16", "bfloat16"):
        tensors = {n: tf.cast(weights.read(n), kind) for n in weights.entries}
        for path in tiny.glob("model.ckpt.*"):
            path.unlink()
        save(tiny / "model.ckpt", tensors)
        reading.verify(tiny)
        tensors["model/ln_f/g"] = tf.cast(tensors["model/ln_f/g"] * np.inf, kind)
        save(tiny / "model.ckpt", tensors)
        with pytest.raises(UserError, match="model/ln_f/g has values that are not finite"):
            reading.verify(tiny)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_found_in_every_place(kind, odd):
    dtype = tf.as_dtype(kind).as_numpy_dtype
    for size in (1, 5, reading.BLOCK, 2 * reading.BLOCK + 3):
        values = np.ones(size, dtype)
        assert reading.is_finite(values)
        for place in {0, size // 2, size - 1, min(size - 1, reading.BLOCK)}:
            values[place] = odd
            assert not reading.is_finite(values), place
            values[place] = 1
    assert reading.is_finite(np.full(9, np.finfo(np.float32).max)) and reading.is_finite(
        np.zeros([0, 3], dtype)
    )


def test_a_slow_checksum_is_announced(tiny, monkeypatch, capsys):
    monkeypatch.setattr(reading.google_crc32c, "implementation", "python")
    reading.open_weights(folders.open_model(tiny))
    assert "checking the weights takes minutes" in capsys.readouterr().err


def test_reading_imports_no_tensorflow_and_takes_no_memory_of_its_own():
    code = (
        "import sys\n"
        "from gpt2cli.storage import folders, reading\n"
        f"config, stored = reading.open_weights(folders.open_model({str(TINY)!r}))\n"
        "value = stored('model/wte', (config.n_vocab, config.n_embd))\n"
        "assert not value.flags.owndata and value.shape == (config.n_vocab, config.n_embd)\n"
        f"reading.verify(__import__('pathlib').Path({str(TINY)!r}))\n"
        "assert not {'tensorflow', 'google.protobuf', 'ml_dtypes'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

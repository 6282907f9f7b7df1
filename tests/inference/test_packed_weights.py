"""Packed weights on disk: used only if they are whole and ours; everything else packs again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, TINY, small_disk

from gpt2cli.errors import UserError
from gpt2cli.inference.engines import packed_weights, skeletons
from gpt2cli.inference.generator import load_model
from gpt2cli.storage import folders, reading

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="weights are kept on Linux only"
)
TEXT = [5, 6, 700, 30]

# Load a small model in a process of its own, and print its logits.
LOAD = """
import hashlib, os, resource, signal, sys
from gpt2cli import files
from gpt2cli.inference.engines import packed_weights
from gpt2cli.inference.generator import load_model

packed_weights.LEAST = 0
{0}
logits = load_model(sys.argv[1]).logits([5, 6, 700, 30])
print(hashlib.sha256(logits.tobytes()).hexdigest())
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the cache, empty; small models are kept too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packed_weights, "LEAST", 0)
    return tmp_path / "home" / "gpt2cli"


def logits(precision="float32", folder=TINY, **more):
    return load_model(folder, precision, **more).logits(TEXT)


def names(cache):
    """The endings of the files, sorted."""
    return sorted(path.name.partition(".")[2] for path in cache.iterdir())


def start(code="", **options):
    command = [sys.executable, "-c", LOAD.format(code), str(TINY)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_the_second_use_keeps_packed_weights_and_the_third_reads_only_tables(
    cache, monkeypatch, capsys, precision
):
    first = logits(precision)
    assert names(cache) == ["seen", "seen"] and not capsys.readouterr().err
    np.testing.assert_array_equal(logits(precision), first)
    assert names(cache) == sorted(["head", "packed", "seen"] * 2)
    assert capsys.readouterr().err.count("kept the packed weights (") == 1
    read, once = [], reading.StoredWeights.__call__
    monkeypatch.setattr(
        reading.StoredWeights, "__call__", lambda self, n, s: read.append(n) or once(self, n, s)
    )
    np.testing.assert_array_equal(logits(precision), first)
    assert read == ["model/wte", "model/wpe"] and not capsys.readouterr().err


def test_without_room_for_them_or_for_small_models_nothing_is_written(cache, monkeypatch):
    for _ in range(3):
        logits(weight_cache=0)
    monkeypatch.setattr(packed_weights, "LEAST", 2**24)
    for _ in range(3):
        logits()
    assert not cache.exists() or not names(cache)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def another(path):
    """Replace a file by that of the other part."""
    (other,) = (each for each in path.parent.glob(f"*{path.suffix}") if each != path)
    path.unlink()
    shutil.copy(other, path)


def link(path):
    real = path.with_name("elsewhere")
    path.rename(real)
    path.symlink_to(real)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def given_away(path):
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, 12345)


def of_another_library(path):
    """Change the version of the format, and all checksums with it."""
    kept = packed_weights._Kept(path.parent, KEYS[path.stem])
    size, *_ = packed_weights.json.loads(
        kept._unsealed(kept.path("head").read_bytes()).split(b"\n")[0]
    )
    head = kept._unsealed(kept.path("head").read_bytes()).partition(b"\n")[2]
    content = bytearray(kept.path("packed").read_bytes())
    content[0] += 1
    file = os.memfd_create("changed")
    os.write(file, content)
    kept.write(packed_weights.Built(None, head, size), file)
    os.close(file)


KEYS = {}
FAULTS = [flip, lambda path: os.truncate(path, 1000), lambda path: os.truncate(path, 0), another]
FAULTS += [link, fifo, given_away, lambda path: path.chmod(0o666), Path.unlink, of_another_library]
FAULT_NAMES = ["flipped", "short", "empty", "another's", "link", "fifo", "another user's"]
FAULT_NAMES += ["writable by others", "missing", "another library's"]


@pytest.mark.parametrize("fault", FAULTS, ids=FAULT_NAMES)
@pytest.mark.parametrize("kind", ["packed", "head"])
def test_files_that_cannot_be_trusted_are_made_again(cache, monkeypatch, capfd, kind, fault):
    init = packed_weights._Kept.__init__

    def noted(self, folder, key):
        init(self, folder, key)
        KEYS[self.name] = key

    monkeypatch.setattr(packed_weights._Kept, "__init__", noted)
    for _ in range(2):
        expected = logits()
    capfd.readouterr()
    place = max(cache.glob(f"*.{kind}"), key=lambda path: path.stat().st_size)
    fault(place)
    np.testing.assert_array_equal(logits(), expected)
    said = capfd.readouterr().err
    assert said.count("packs the weights again") == (fault is not Path.unlink), said
    assert said.count("kept the packed weights") == (fault is not fifo), said
    np.testing.assert_array_equal(logits(), expected)
    said = capfd.readouterr().err
    assert said.count("is a pipe") if fault is fifo else not said


def test_another_checkpoint_of_the_same_sizes_is_not_mixed_up(tmp_path):
    """The name has the checksums of all tensors: a copy is the same, another content is not."""
    copy = shutil.copytree(TINY, tmp_path / "copy")
    identity = reading.open_weights(folders.open_model(TINY))[1].identity
    assert reading.open_weights(folders.open_model(copy))[1].identity == identity
    data = next(copy.glob("model.ckpt.data*"))
    with data.open("ab") as file:
        file.write(b"\0")
    assert reading.open_weights(folders.open_model(copy))[1].identity != identity
    other = GOLDEN / "gpt2-openai" / "a-l2-h4-e16-c96"
    assert reading.open_weights(folders.open_model(other))[1].identity != identity


def test_the_least_recently_used_are_removed_to_make_room(cache, monkeypatch, capsys):
    for _ in range(2):
        expected = logits()
    size = sum(path.stat().st_size for path in cache.glob("*.packed"))
    monkeypatch.setattr(packed_weights, "_library", lambda: "an update")
    make = packed_weights.PackedWeights.__init__
    monkeypatch.setattr(
        packed_weights.PackedWeights, "__init__", lambda self, i, most: make(self, i, size + 1000)
    )
    old = sorted(cache.glob("*.packed"))
    for _ in range(2):  # they were used a moment ago
        np.testing.assert_array_equal(logits(), expected)
    assert sorted(cache.glob("*.packed")) == old
    before = time.time() - 7200  # the same for both: of these, the smaller file goes first
    for path in cache.glob("*.head"):
        os.utime(path, (before, before))
    capsys.readouterr()
    np.testing.assert_array_equal(logits(), expected)
    assert capsys.readouterr().err.count("removed 2 files of packed weights from") == 1
    assert len(list(cache.glob("*.packed"))) == 2 and not any(path.exists() for path in old)
    assert names(cache) == sorted(["head", "packed", "seen"] * 2)


def test_old_marks_and_unfinished_files_are_removed(cache):
    cache.mkdir(parents=True)
    for name, age in (("a.seen", 31 * 86400), ("b.seen", 86400), ("c.packed.1-2.part", 7200)):
        (cache / name).touch()
        os.utime(cache / name, (time.time() - age,) * 2)
    (cache / "d.packed.1-2.part").touch()
    logits()
    assert names(cache) == ["packed.1-2.part", "seen", "seen", "seen"]


def test_a_disk_that_fills_up_costs_only_the_files(tmp_path, cache, monkeypatch, capsys):
    for _ in range(2):
        expected = logits()
    size = sum(path.stat().st_size for path in cache.glob("*.packed"))
    with small_disk(tmp_path / "small", 1 + size * 4 // 2**20) as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        logits()
        usage = shutil.disk_usage(disk)._replace(free=10**12)  # it was free when we looked
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with (disk / "other").open("wb") as file:
            largest = max(path.stat().st_size for path in cache.glob("*.packed"))
            file.write(bytes(os.statvfs(disk).f_bavail * 4096 - largest * 8 // 5))
        np.testing.assert_array_equal(logits(), expected)
        assert not list(disk.glob("gpt2cli/*.part"))


def test_a_limit_on_the_size_of_files_costs_only_the_files(cache):
    for _ in range(2):
        logits()
    largest = max(path.stat().st_size for path in cache.glob("*.packed"))
    for path in [*cache.glob("*.packed"), *cache.glob("*.head")]:
        path.unlink()
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest * 3 // 2},) * 2)"
    process = start(limit)
    out, err = process.communicate()
    assert process.returncode == 0 and out and "(1 MB)" in err  # the smaller one
    assert names(cache) == ["head", "packed", "seen", "seen"]


@pytest.mark.parametrize("number", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_processes_that_start_at_once_make_one_file(cache, number):
    logits()
    processes = [start() for _ in range(number)]
    found = [process.communicate() for process in processes]
    assert len({out for out, _ in found}) == 1 and found[0][0]
    assert "".join(err for _, err in found).count("kept the packed weights") in (1, 2)  # two parts
    assert names(cache) == sorted(["head", "packed", "seen"] * 2)


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_used(cache):
    expected = logits()
    process = start("files.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert any(name.endswith(".part") for name in names(cache))
    np.testing.assert_array_equal(logits(), expected)
    assert names(cache) == sorted(["head", "packed", "seen"] * 2)


def test_a_cache_that_cannot_be_written_to_is_only_read(cache, monkeypatch, capsys):
    def denied(*arguments, **more):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", denied)
        for _ in range(2):
            expected = logits()
        assert not names(cache)
    for _ in range(2):
        logits()
    capsys.readouterr()
    for path in cache.glob("*.seen"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", denied)
        patch.setattr(os, "utime", denied)
        patch.setattr(packed_weights.PackedWeights, "_built", None)  # not called
        np.testing.assert_array_equal(logits(), expected)
    assert not capsys.readouterr().err


def test_a_damaged_checkpoint_is_still_found(cache, tmp_path):
    """What is still read of it, the tables of embeddings, is compared with its checksums."""
    copy = shutil.copytree(TINY, tmp_path / "copy")
    for _ in range(2):
        logits(folder=copy)
    stored = reading.open_weights(folders.open_model(copy))[1]
    entry = stored._bundle.entries["model/wte"]
    with next(copy.glob("model.ckpt.data*")).open("r+b") as file:
        file.seek(entry.offset + 100)
        file.write(b"\1\2\3\4")
    with pytest.raises(UserError, match="does not match its checksum"):
        logits(folder=copy)


def test_the_folder_is_that_of_the_skeletons(cache):
    logits()
    assert skeletons.cache_folder() == cache

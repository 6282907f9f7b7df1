"""Paths are checked before anything is written: those that users name, and the program's own."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY

from gpt2cli import files, locks, paths
from gpt2cli.errors import UserError
from gpt2cli.inference.engines import litert_program, skeletons
from gpt2cli.model.network import GPT2
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import random_weights
from gpt2cli.remote import transfer
from gpt2cli.storage import checkpoint, destinations, folders, runs
from gpt2cli.storage.held import HeldFolder
from gpt2cli.text import encoder
from gpt2cli.training.journal import Journal
from gpt2cli.training.step import Trainer

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
SAMPLE = ("sample", "--model_name", "tiny", "--prompt", "a", "--length", 2, "--seed", 1)
JOB = (*SAMPLE, "--format", "jsonl")
TRAIN = ("train", "t.txt", "--model_name", "mini", "--seq_length", 16, "--sample_every", 0)
NULL, FULL, ZERO = 3, 7, 5  # minor numbers of Linux's memory devices
IS_ROOT = getattr(os, "geteuid", lambda: 1)() == 0
posix = pytest.mark.skipif(os.name != "posix", reason="needs links, pipes and owners")
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root gives files to other users")


@pytest.fixture
def texts(workdir):
    """The current folder, with models/tiny and a text."""
    Path("t.txt").write_text(TEXT)
    return workdir


@pytest.fixture
def mini(texts):
    """The same, with models/mini, which has one layer."""
    folders.copy_vocabulary(TINY, Path("models/mini"))
    sizes = ModelConfig(n_vocab=2048, n_ctx=32, n_embd=16, n_head=2, n_layer=1)
    checkpoint.save(GPT2(sizes, random_weights(sizes)), Path("models/mini"))
    return texts


@pytest.fixture
def a_run(texts):
    """The same, with a run that was never trained."""
    shutil.copytree("models/tiny", "checkpoint/r")
    for path in Path("checkpoint/r").glob("model.ckpt.*"):
        path.rename(path.with_name(path.name.replace("model.ckpt", "model-1")))
    Path("checkpoint/r/checkpoint").unlink()
    return texts


def device(path, minor):
    """Make a device; skip the test if this user may not."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        open(path, "wb").close()
    except OSError:
        pytest.skip("no device can be made or used here")
    return Path(path)


def identity(path):
    """What must stay the same about a path."""
    found = os.lstat(path)
    target = os.readlink(path) if stat.S_ISLNK(found.st_mode) else None
    return stat.S_IFMT(found.st_mode), found.st_ino, found.st_rdev, target


@contextlib.contextmanager
def reader(path):
    """Read a pipe or what is sent to a socket; gives a list that gets the bytes at the end."""
    got = []
    if path.is_socket():
        path.unlink()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

    def read():
        if path.is_fifo():
            got.append(path.read_bytes())
        else:
            with listener, listener.accept()[0] as connection:
                got.append(b"".join(iter(lambda: connection.recv(4096), b"")))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield got
    thread.join(60)
    assert not thread.is_alive()


# The outputs that a user names


def one_line(result, words):
    """The command rejected something in one line, before it did any work."""
    assert result.returncode in (1, 2) and words in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result.stderr


OUTPUTS = {
    "sample": (lambda out: (*SAMPLE, "--out", out), "o.txt", b"SAMPLE 1"),
    "job": (lambda out: (*JOB, "--out", out), "o.jsonl", b'{"index": 0'),
    "npz": (lambda out: ("encode", "t.txt", out, "--model_name", "tiny"), "o.npz", b"PK"),
    "npy": (lambda out: ("encode", "t.txt", out, "--model_name", "tiny"), "o.npy", b"\x93NUMPY"),
}
each_output = pytest.mark.parametrize(
    ("words", "name", "begin"), list(OUTPUTS.values()), ids=list(OUTPUTS)
)


@posix
@each_output
def test_an_output_is_written_through_a_pipe_a_socket_and_a_link(cli, texts, words, name, begin):
    os.mkfifo(f"pipe-{name}")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"socket-{name}")
    for path in (Path(f"pipe-{name}"), Path(f"socket-{name}")):
        with reader(path) as got:
            before = identity(path)
            result = cli(*words(path))
        assert result.returncode == 0, result.stderr
        assert identity(path) == before and begin in got[0]
    if name.endswith(".npz"):
        assert np.load(io.BytesIO(got[0]))["arr_0"].size > 100
    if name.endswith(".npy"):
        assert np.load(io.BytesIO(got[0])).size > 100
    Path(f"target-{name}").write_text("old")
    for link, target in ((f"link-{name}", f"target-{name}"), (f"dangling-{name}", f"new-{name}")):
        Path(link).symlink_to(target)
        result = cli(*words(link))
        assert result.returncode == 0, result.stderr
        assert os.readlink(link) == target and begin in Path(target).read_bytes()


@posix
@each_output
def test_an_output_is_written_into_a_device_of_our_own(cli, texts, words, name, begin):
    for minor, status in ((NULL, 0), (ZERO, 0), (FULL, 1)):
        path = device(f"{minor}-{name}", minor)
        before = identity(path)
        result = cli(*words(path))
        assert result.returncode == status, result.stderr
        assert ("No space left on device" in result.stderr) == (minor == FULL)
        assert identity(path) == before and path.stat().st_size == 0


@posix
@each_output
def test_an_output_that_cannot_be_a_file_is_rejected_before_any_work(
    cli, texts, words, name, begin
):
    Path("folder.npy").mkdir()
    Path(f"full-{name}").mkdir()
    Path(f"full-{name}/precious").write_text("PRECIOUS")
    Path(f"link-{name}").symlink_to(f"full-{name}")
    Path(f"loop-{name}").symlink_to(f"loop2-{name}")
    Path(f"loop2-{name}").symlink_to(f"loop-{name}")
    Path("file").write_text("PRECIOUS")
    before = {path: identity(path) for path in Path().rglob("*")}
    for out, said in (
        (f"full-{name}", "is a folder"),
        (f"link-{name}", "is a folder"),
        (f"loop-{name}", "its links form a loop"),
        (f"file/{name}", "Not a directory"),
        (f"loop-{name}/{name}", "its links form a loop"),
        (f"gs://bucket/{name}", "is an address"),
        (f"{'x' * 300}{name}", "File name too long"),
    ):
        one_line(cli(*words(out)), said)
    assert {path: identity(path) for path in Path().rglob("*")} == before
    assert Path(f"full-{name}/precious").read_text() == Path("file").read_text() == "PRECIOUS"


def test_an_empty_output_and_one_that_ends_in_a_slash_are_rejected(cli, texts):
    for words in ((), ("--nfiles", 2), ("--format", "jsonl")):
        one_line(cli(*SAMPLE, *words, "--out", ""), "--out must name a file, got ''")
        for out in ("new/", ".", "..", "new/."):
            one_line(cli(*SAMPLE, *words, "--out", out), "is a folder")
    assert not Path("new").exists()


@posix
def test_several_outputs_are_not_written_beside_a_device(cli, texts):
    os.mkfifo("pipe")
    one_line(cli(*SAMPLE, "--nfiles", 2, "--out", "pipe"), "pipe is not a file")
    assert not list(Path().glob("pipe-*"))


@posix
def test_a_job_into_a_pipe_reports_that_one_process_writes_it(cli, prompts):
    os.mkfifo("pipe")
    words = ("sample", "--model_name", "tiny", "--prompts", "prompts.txt", "--length", 2)
    with reader(Path("pipe")) as got:
        result = cli(*words, "--format", "jsonl", "--processes", 2, "--out", "pipe")
    assert result.returncode == 0 and "--processes has no effect" in result.stderr
    assert len(got[0].splitlines()) == 5
    assert [path.name for path in Path().glob("pipe*")] == ["pipe"]


@posix
@pytest.mark.parametrize("how", ["append", pytest.param("replace", marks=pytest.mark.slow)])
def test_an_open_file_of_the_shell_is_written_at_its_position(cli, texts, how):
    """For example `--out /dev/stdout >> log`: the log keeps its lines and stays the same file."""
    Path("log").write_text("OLD\n")
    before = identity("log")
    with open("log", "ab" if how == "append" else "wb") as log:
        number = log.fileno()
        os.set_inheritable(number, True)  # as the shell opens it
        Path("link").symlink_to(f"/dev/fd/{number}")
        for out in (f"/dev/fd/{number}", f"/proc/self/fd/{number}", "link"):
            if os.path.lexists(out):
                result = cli(*SAMPLE, "--out", out)
                assert result.returncode == 0, result.stderr
    text = Path("log").read_text()
    assert text.startswith("OLD\n") == (how == "append") and text.count("SAMPLE 1") >= 2
    assert identity("log") == before and os.readlink("link") == f"/dev/fd/{number}"
    one_line(cli(*SAMPLE, "--out", f"/dev/fd/{number}"), "no file was opened with this number")
    with open("own", "w") as own:  # a file of the process itself, whatever its number
        one_line(cli(*SAMPLE, "--out", f"/dev/fd/{own.fileno()}"), "no file was opened")


@posix
def test_paths_of_open_files_are_recognized():
    names = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2, "/dev/fd/63": 63}
    names |= {"/proc/self/fd/7": 7, "/dev/null": None, "/dev/fd/": None, "/dev/fd/x": None}
    assert {name: paths.descriptor_of(name) for name in names} == names


@posix
@pytest.mark.slow
def test_standard_streams_and_substituted_processes_are_written_as_in_a_shell(texts):
    words = " ".join(map(str, SAMPLE))
    script = f"""
    run() {{ {sys.executable} -m gpt2cli {words} "$@"; }}
    stat -c '%F %t:%T %i' /dev/null /dev/stdout /dev/stderr > before
    echo OLD > log; run --out /dev/stdout >> log 2> /dev/null || echo failed
    run --out /dev/stderr 2> err || echo failed
    run --out >(cat > sub) 2> /dev/null || echo failed
    run --out /dev/null 2> /dev/null || echo failed
    stat -c '%F %t:%T %i' /dev/null /dev/stdout /dev/stderr | diff - before
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environment, text=True, capture_output=True)
    assert done.stdout == "", done.stderr
    assert (
        Path("log").read_text().startswith("OLD\n=====") and "SAMPLE 1" in Path("err").read_text()
    )
    deadline = time.monotonic() + 60
    while "SAMPLE 1" not in Path("sub").read_text():
        assert time.monotonic() < deadline


def folder_commands():
    """The commands that write a folder, with the words that name it."""
    sizes = ("--vocab", "models/tiny", "--n_layer", 1, "--n_embd", 12, "--n_head", 2)
    return {
        "vocab": lambda dst: ("vocab", "t.txt", dst, "--size", 300),
        "export": lambda dst: ("export", "r", dst),
        "convert": lambda dst: ("convert", "models/tiny", dst),
        "init": lambda dst: ("init", dst, "--models_dir", ".", *sizes),
        "train": lambda dst: (*TRAIN, "--checkpoint_dir", ".", "--run_name", dst),
        "samples": lambda dst: (*TRAIN[:-1], 9, "--sample_dir", ".", "--run_name", dst),
        "copies": lambda dst: (*copies(dst), "--sample_dir", "."),
    }


def copies(run):
    if not Path("checkpoint", run).exists():
        shutil.copytree("checkpoint/r", f"checkpoint/{run}")
    return ("sample", "--run_name", run, "--length", 1)


@posix
@pytest.mark.parametrize("command", list(folder_commands()))
def test_a_folder_that_is_something_else_is_rejected_before_any_work(cli, a_run, command):
    words = folder_commands()[command]
    os.mkfifo("pipe")
    Path("file").write_text("PRECIOUS")
    Path("link").symlink_to("file")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop2")
    Path("loop2").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    kinds = [("pipe", "is a pipe"), ("socket", "is a socket"), ("file", "is a file")]
    kinds += [("link", "is a file"), ("loop", "form a loop"), ("dangling", "does not exist")]
    kinds += [("x" * 300, "File name too long")]
    if IS_ROOT:
        device("null", NULL)
        kinds.append(("null", "is a device"))
    if command in ("vocab", "export", "convert"):
        kinds += [("file/x", "Not a directory"), ("", "must name a folder"), ("s3://x", "address")]
    if command == "copies":
        kinds.pop(6)  # no run can have that name
    before = {kind: identity(kind) for kind, _ in kinds if os.path.lexists(kind)}
    for kind, said in kinds:
        one_line(cli(*words(kind)), said)
    assert {kind: identity(kind) for kind in before} == before and not Path("nowhere").exists()
    assert Path("file").read_text() == "PRECIOUS"


@posix
@pytest.mark.parametrize(
    "commands",
    [("init", "vocab"), pytest.param(("convert", "export", "init"), marks=pytest.mark.slow)],
)
def test_a_link_to_a_model_folder_stays_and_its_target_is_replaced(cli, a_run, commands):
    Path("disk").mkdir()
    Path("link").symlink_to("disk/model")
    Path("disk/model").mkdir()
    for number, command in enumerate(commands):
        words = folder_commands()[command]
        if number and command != "vocab":
            assert cli(*words("link")).returncode == 1  # it is not replaced by accident
        result = cli(*words("link"), "--overwrite")
        assert result.returncode == 0, result.stderr
        assert os.readlink("link") == "disk/model"
        assert (encoder.load(Path("disk/model")).n_vocab == 2048) == (command != "vocab")
        if command == "init":
            shutil.rmtree("disk/model")
            Path("disk/model").mkdir()


def test_a_file_keeps_its_permissions_when_it_is_replaced(cli, texts):
    Path("secret.txt").write_text("old")
    Path("secret.txt").chmod(0o600)
    assert cli(*SAMPLE, "--out", "secret.txt").returncode == 0
    assert stat.S_IMODE(Path("secret.txt").stat().st_mode) == (0o600 if os.name == "posix" else 438)
    assert "SAMPLE 1" in Path("secret.txt").read_text()


@posix
def test_a_private_file_is_private_from_the_start(tmp_path, monkeypatch):
    """Whoever opened it before its permissions were set could read what is written later."""
    (tmp_path / "secret").write_text("old")
    (tmp_path / "secret").chmod(0o600)
    monkeypatch.setattr(os, "chmod", lambda *_: None)
    with files.replacing(tmp_path / "secret") as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600


# Files that others may have put there


def prepared(path, how, target):
    """Put something at a path that is not the program's own file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "link":
        path.symlink_to(target)
    elif how == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif how == "second name":
        os.link(target, path)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "writable by all":
        path.write_text("")
        path.chmod(0o666)
    elif how == "another user's":
        path.write_text("")
        os.chown(path, 12345, 12345)
    elif how == "device":
        device(path, NULL)


HOW = {
    "link": "is a link",
    "dangling link": "is a link",
    "second name": "has a second name",
    "pipe": "is a pipe",
    "folder": "is a folder",
    "writable by all": "can be changed by other users",
    "another user's": "belongs to user 12345",
    "device": "is a device",
}
OWN = {
    "lock of a run": (".lock", lambda: (*TRAIN, "--run_name", "own", "--steps", 1)),
    "log of a run": ("log.jsonl", lambda: (*TRAIN, "--run_name", "own", "--steps", 1)),
    "lock of a job": (".o.jsonl.lock", lambda: (*JOB, "--out", "checkpoint/own/o.jsonl")),
    "part of a job": ("o.jsonl.part", lambda: (*JOB, "--out", "checkpoint/own/o.jsonl")),
    "note of a job": ("o.jsonl.part.json", lambda: (*JOB, "--out", "checkpoint/own/o.jsonl")),
}
CHEAP = {("lock of a run", how) for how in HOW} | {("log of a run", "link")}
CHEAP |= {(own, "pipe") for own in OWN if own != "log of a run"}


@posix
@pytest.mark.parametrize(
    ("own", "how"),
    [
        pytest.param(own, how, marks=[] if (own, how) in CHEAP else [pytest.mark.slow])
        for own in OWN
        for how in HOW
    ],
)
def test_a_file_of_ours_that_others_prepared_is_rejected(cli, mini, own, how):
    name, words = OWN[own]
    if how in ("another user's", "device") and not IS_ROOT:
        pytest.skip("only root makes such files")
    Path("precious").write_text("PRECIOUS")
    path = mini / "checkpoint" / "own" / name
    prepared(path, how, mini / "precious")
    if own == "note of a job":
        Path("checkpoint/own/o.jsonl.part").write_text("")
    before = identity(path)
    result = cli(*words())
    harmless = own == "part of a job" and how in ("link", "second name", "writable by all")
    harmless |= own == "part of a job" and how == "another user's"  # of another job: moved away
    # of a log, a copy is written first; a note is only read
    harmless |= own in ("log of a run", "note of a job") and how == "second name"
    if harmless:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode == 1 and HOW[how] in result.stderr, result.stderr
        assert str(name) in result.stderr and "Traceback" not in result.stderr
        assert identity(path) == before
    assert (
        Path("precious").read_text() == "PRECIOUS" and not Path("checkpoint/own/nowhere").exists()
    )


@posix
@pytest.mark.parametrize("how", HOW)
def test_open_own_rejects_files_that_others_may_have_prepared(tmp_path, how):
    if how in ("another user's", "device") and not IS_ROOT:
        pytest.skip("only root makes such files")
    (tmp_path / "precious").write_text("PRECIOUS")
    prepared(tmp_path / "own", how, tmp_path / "precious")
    for mode in ("wb", "ab", "a+b", "r+b") if how == "second name" else ("rb", "wb", "a+b", "r+b"):
        with pytest.raises(UserError, match=HOW[how]):
            paths.open_own(tmp_path / "own", mode)
    assert (tmp_path / "precious").read_text() == "PRECIOUS"


@posix
def test_the_files_of_ordinary_users_are_opened(tmp_path):
    """With any umask, with a shared group, and on a disk without permissions."""
    for umask in (0o000, 0o002, 0o022, 0o077):
        before = os.umask(umask)
        try:
            for _ in range(2):
                with paths.open_own(tmp_path / f"{umask}", "a+") as file:
                    file.write("x")
        finally:
            os.umask(before)
        assert (tmp_path / f"{umask}").read_text() == "xx"
    disk = tmp_path / "disk"
    disk.mkdir()
    disk.chmod(0o777)
    (disk / "own").write_text("x")
    (disk / "own").chmod(0o777)
    with paths.open_own(disk / "own", "r+") as file:
        assert file.read() == "x"
    disk.chmod(0o1777)  # as /tmp: others cannot replace the file
    with pytest.raises(UserError, match="can be changed by other users"):
        paths.open_own(disk / "own", "r+")


@posix
@needs_root
def test_the_owner_of_a_folder_may_own_the_files_in_it(tmp_path):
    """Root works in the folder of a user, who could replace the file in any case."""
    for place, owner in ((tmp_path / "home", 12345), (tmp_path / "home/own", 12345)):
        place.mkdir() if place.name == "home" else place.write_text("x")
        os.chown(place, owner, owner)
    with paths.open_own(tmp_path / "home/own", "r+") as file:
        assert file.read() == "x"
    with pytest.raises(UserError, match="belongs to user 12345"):
        paths.open_own(tmp_path / "home/own", "rb", is_code=True)


@posix
@needs_root
def test_a_group_shares_the_files_in_its_folder(tmp_path):
    """One of them resumes what another one began, as with a umask of 002."""
    place = tmp_path / "group"
    place.mkdir()
    (place / "own").write_text("x")
    os.chown(place, 0, 777)
    os.chown(place / "own", 12345, 777)
    modes = {0o2775: True, 0o770: True, 0o2755: False, 0o3775: False, 0o2777: False}
    for mode, is_shared in modes.items():
        place.chmod(mode)
        with contextlib.nullcontext() if is_shared else pytest.raises(UserError, match="12345"):
            paths.open_own(place / "own", "r+").close()
        with pytest.raises(UserError, match="belongs to user 12345"):
            paths.open_own(place / "own", "rb", is_code=True)
    place.chmod(0o2775)
    os.chown(place / "own", 12345, 778)
    with pytest.raises(UserError, match="belongs to user 12345"):
        paths.open_own(place / "own", "r+")


def test_a_lock_is_removed_only_by_its_holder(tmp_path):
    """Its folder was renamed, and another command works in a new folder of the same name."""
    folder = tmp_path / "run"
    with locks.locked(folder / ".lock", "train"):
        folder.rename(tmp_path / "moved")
        with locks.locked(folder / ".lock", "train"):
            pass
        folder.joinpath(".lock").write_text("of another command")
    assert (folder / ".lock").exists() and not (tmp_path / "moved/.lock").exists()


def test_a_folder_that_was_there_stays_when_nothing_is_written(cli, texts):
    Path("checkpoint/mine").mkdir(parents=True)
    assert cli("train", "nothing.txt", "--model_name", "tiny", "--run_name", "mine").returncode == 1
    assert cli("train", "nothing.txt", "--model_name", "tiny", "--run_name", "new").returncode == 1
    assert os.listdir("checkpoint") == ["mine"] and not os.listdir("checkpoint/mine")


def test_an_older_file_that_was_moved_away_is_never_replaced(tmp_path):
    for text in ("one", "two", "three"):
        (tmp_path / "weights").write_text(text)
        files.move_away(tmp_path / "weights")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"weights.old": "one", "weights.old-2": "two", "weights.old-3": "three"}


@posix
@pytest.mark.parametrize("how", ["link", "pipe"])
def test_the_part_and_the_note_of_a_download_are_looked_at(tmp_path, how):
    (tmp_path / "precious").write_text("PRECIOUS")
    part, note = transfer.part_of(tmp_path / "file")
    prepared(note, how, tmp_path / "precious")
    with pytest.raises(UserError, match=rf"file\.part\.json {HOW[how]}"):
        files.read_own(note, 1)
    prepared(part, how, tmp_path / "precious")
    with pytest.raises(UserError, match=rf"file\.part {HOW[how]}"):
        paths.open_own(part, "wb")
    assert (tmp_path / "precious").read_text() == "PRECIOUS"


def test_a_file_that_is_replaced_is_never_written_through_a_link(tmp_path, monkeypatch):
    """The temporary name was guessed."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "ab" * size)
    (tmp_path / "precious").write_text("PRECIOUS")
    (tmp_path / f"out.{os.getpid()}-ababab.part").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="File exists"), files.replacing(tmp_path / "out") as file:
        file.write(b"x")
    assert (tmp_path / "precious").read_text() == "PRECIOUS" and not (tmp_path / "out").exists()


@posix
def test_a_device_among_the_files_of_a_folder_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "hparams.json")
    with pytest.raises(UserError, match=r"hparams\.json is a pipe, not a file"):
        folders.copy_description(TINY, tmp_path)
    assert (tmp_path / "hparams.json").is_fifo()


def test_a_link_among_the_files_of_a_folder_is_replaced_not_followed(tmp_path):
    """A model's files may be links into a store that other folders share."""
    (tmp_path / "store").write_text("PRECIOUS")
    (tmp_path / "model").mkdir()
    for name in ("hparams.json", "vocab.bpe"):
        (tmp_path / "model" / name).symlink_to(tmp_path / "store")
    folders.copy_description(TINY, tmp_path / "model")
    assert (tmp_path / "store").read_text() == "PRECIOUS"
    assert encoder.load(tmp_path / "model").n_vocab == 2048


@posix
def test_a_log_that_becomes_a_link_during_a_run_is_reported_and_not_followed(tmp_path, capsys):
    (tmp_path / "precious").write_text("PRECIOUS")
    (tmp_path / "run").mkdir()
    written = Journal(HeldFolder(tmp_path / "run"), 0, {})
    written.write(1, loss=1.0)
    log = tmp_path / "run/log.jsonl"
    log.unlink()
    log.symlink_to(tmp_path / "precious")
    for step in (2, 3, 4):
        written.write(step, loss=1.0)
    assert capsys.readouterr().err.count("log.jsonl is a link") == 1
    log.unlink()
    written.write(5, loss=1.0)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 3, 4, 5]
    assert (tmp_path / "precious").read_text() == "PRECIOUS"


def test_nobody_can_guess_the_name_of_an_event_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Journal(HeldFolder(tmp_path / name), 0, {}).close()
    endings = {path.name.split(".")[-2] for path in tmp_path.glob("*/events*")}
    assert len(endings) == 2 and all(len(ending) == 16 for ending in endings)


# The cache of compiled programs


SIZES = ModelConfig(n_vocab=40, n_ctx=16, n_embd=8, n_head=2, n_layer=1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for compiled programs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "gpt2cli"


def make(config=SIZES):
    """Read the skeleton of a part from the cache, or make it."""
    return skeletons.find("head", config)


def garbage(content, other):
    """Damaged forms of a cached program, by name."""
    made = content[32:]
    return {
        "empty": b"",
        "cut short": content[:-100],
        "a few bytes": content[:20],
        "another model's": other,
        "random": np.random.default_rng(0).bytes(len(content)),
        "a flipped bit": content[:50] + bytes([content[50] ^ 1]) + content[51:],
        "an old version's": hashlib.sha256(made).digest() + made,
    }


def test_a_damaged_cached_graph_is_converted_again(cache, capsys):
    good, _ = make(), make(ModelConfig(40, 16, 12, 2, 1))
    assert capsys.readouterr().err == ""
    mine, other = sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = mine.read_bytes()
    for what, damaged in garbage(content, other.read_bytes()).items():
        mine.write_bytes(damaged)
        again = make()
        assert again == good, what
        assert capsys.readouterr().err.count(". The graph is converted again\n") == 1, what
        assert mine.read_bytes() == content, what
    make()
    assert capsys.readouterr().err == ""


def test_a_cached_graph_that_cannot_be_parsed_is_converted_again(cache, capsys, monkeypatch):
    make()
    (path,) = cache.iterdir()
    content = path.read_bytes()
    with monkeypatch.context() as patch:  # a valid checksum of something else
        patch.setattr(skeletons, "sealed", lambda made, key: made)
        path.write_bytes(b"\xff" * 64)
        assert make().content and "is damaged" in capsys.readouterr().err
    path.write_bytes(content)


@posix
@pytest.mark.parametrize("how", [how for how in HOW if how != "second name"])
def test_a_cached_graph_that_others_prepared_is_not_used(cache, capsys, how, tmp_path):
    if how in ("another user's", "device") and not IS_ROOT:
        pytest.skip("only root makes such files")
    make()
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.rename(tmp_path / "precious")
    prepared(path, how, tmp_path / "precious")
    if path.is_file() and not path.is_symlink():
        path.write_bytes(content)
    made = make()
    said = capsys.readouterr().err
    assert f"{path.name} {HOW[how]}" in said and "graph is converted again" in said
    assert made == skeletons.Skeleton.unpacked(content[32:])
    assert (tmp_path / "precious").read_bytes() == content


@posix
def test_only_its_owner_can_write_to_the_cache(cache, capsys):
    before = os.umask(0o002)
    try:
        make()
    finally:
        os.umask(before)
    (path,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o755
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # as in an image that root has built
    path.chmod(0o664)  # of a version that did not close it to others
    cache.chmod(0o775)
    skeletons._checked.cache_clear()
    make()
    assert "can be changed by other users" in capsys.readouterr().err
    assert stat.S_IMODE(cache.stat().st_mode) == 0o755
    make()
    assert capsys.readouterr().err == ""


def test_a_cached_program_that_cannot_be_read_is_not_called_damaged(cache, capsys, monkeypatch):
    def open_own(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    make()
    monkeypatch.setattr(paths, "open_own", open_own)
    assert make().content
    said = capsys.readouterr().err
    assert "cannot read" in said and ": Permission denied. The graph is converted again" in said


@posix
@pytest.mark.parametrize("how", ["another user's", "a link of another user's", "a file"])
def test_a_cache_folder_that_is_not_ours_is_not_used(cache, capsys, how, tmp_path):
    if how != "a file" and not IS_ROOT:
        pytest.skip("only root gives folders to other users")
    cache.parent.mkdir()
    if how == "a file":
        cache.write_text("x")
    elif how == "another user's":
        cache.mkdir()
        os.chown(cache, 12345, 12345)
    else:
        (tmp_path / "elsewhere").mkdir()
        cache.symlink_to(tmp_path / "elsewhere")
        os.chown(cache, 12345, 12345, follow_symlinks=False)
    for _ in range(2):
        assert make().content
        litert_program._nameless_file().close()
    said = capsys.readouterr().err
    assert said.count("so no graphs are kept there. Set XDG_CACHE_HOME") == (how != "a file")
    assert how == "a file" or not list(cache.iterdir())


# A run's folder that is moved while it is trained


def at_step(monkeypatch, acts):
    """Let something happen to the disk before a step: step -> function."""
    real = Trainer.step

    def step(self, number, *rest):
        acts.get(number, lambda: None)()
        return real(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", step)


def steps_of_log(folder):
    return [json.loads(line)["step"] for line in Path(folder, "log.jsonl").read_text().splitlines()]


MOVED = (*TRAIN, "--run_name", "a", "--save_every", 2, "--seed", 1)


@posix
def test_a_run_follows_its_folder(cli, mini, monkeypatch):
    """It is renamed, another folder takes its name, and the folder above it is renamed."""

    def rename():
        os.rename("checkpoint/a", "checkpoint/b")

    def replace():
        os.rename("checkpoint/b", "checkpoint/c")
        os.mkdir("checkpoint/b")  # another one in its place
        Path("checkpoint/a").symlink_to("b")

    def rename_parent():
        os.rename("checkpoint", "runs")
        os.mkdir("checkpoint")
        Path("checkpoint/precious").write_text("PRECIOUS")

    at_step(monkeypatch, {1: rename, 3: replace, 5: rename_parent})
    result = cli(*MOVED, "--steps", 7)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("was moved to") == 3 and "events" not in result.stderr
    assert f"saved {mini}/runs/c at step 7" in result.stderr
    assert f"--run_name=c --checkpoint_dir={mini}/runs" in result.stderr
    assert runs.steps("runs/c") == [2, 4, 6, 7] and steps_of_log("runs/c") == [1, 2, 3, 4, 5, 6, 7]
    assert os.listdir("checkpoint") == ["precious"] and not os.listdir("runs/b")
    assert not Path("runs/c/.lock").exists() and len(list(Path("runs/c").glob("events*"))) == 1
    assert cli(*SAMPLE[:1], "--run_name=c", "--checkpoint_dir=runs", "--length=1").returncode == 0


@posix
@pytest.mark.parametrize(
    "how",
    [
        "replaced",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("removed", "parent", "unusable")),
    ],
)
def test_a_run_whose_folder_is_gone_is_saved_elsewhere_and_stops(cli, mini, monkeypatch, how):
    new = "checkpoint/a-2" if how == "replaced" else "checkpoint/a"

    def act():
        if how == "unusable":
            os.rename("checkpoint/a", "checkpoint/a[1]")
            return
        shutil.rmtree("checkpoint" if how == "parent" else "checkpoint/a")
        shutil.rmtree("models")  # what the run needs is in memory
        if how == "replaced":
            os.mkdir("elsewhere")
            Path("elsewhere/precious").write_text("PRECIOUS")
            Path("checkpoint/a").symlink_to(mini / "elsewhere")

    at_step(monkeypatch, {3: act})
    result = cli(*MOVED, "--steps", 9)
    assert result.returncode == 1, result.stderr
    last = result.stderr.splitlines()[-1]
    assert "was moved, removed or replaced during training" in last
    assert f"{new} at step 4, and training has stopped" in last.replace(f"{mini}/", "")
    assert "[5 |" not in result.stderr and runs.steps(new) == [4]
    assert runs.fault(new, 4) is None
    if how == "replaced":
        assert os.listdir("elsewhere") == ["precious"]
        return
    again = cli(*TRAIN, "--run_name", Path(new).name, "--steps", 5)
    assert again.returncode == 0 and "[5 |" in again.stderr, again.stderr


@posix
@pytest.mark.slow
@pytest.mark.parametrize("how", ["renamed", "replaced", "removed", "parent renamed"])
def test_a_process_in_training_notices_what_happens_to_its_folder(mini, how):
    words = [*MOVED, "--steps", 100_000]
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2cli", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("[3 |"):
            if how == "parent renamed":
                os.rename("checkpoint", "runs")
            elif how == "removed":
                # a save may add files meanwhile
                while Path("checkpoint/a").exists():
                    shutil.rmtree("checkpoint/a", ignore_errors=True)
            else:
                os.rename("checkpoint/a", "checkpoint/b")
            if how == "replaced":
                os.mkdir("checkpoint/a")
        if "was moved to" in line:
            process.send_signal(signal.SIGTERM)
    status = process.wait(60)
    if how == "removed":
        assert status == 1 and "training has stopped" in said and runs.steps("checkpoint/a")
        return
    where = {"parent renamed": "runs/a"}.get(how, "checkpoint/b")
    assert status == 143 and f"saved {mini}/{where} at step" in said
    assert runs.fault(where, runs.newest(where)) is None
    assert how != "replaced" or not os.listdir("checkpoint/a")


# Names that TensorFlow takes for patterns


READABLE = ["a]", "x[", "{a,b}", "*", "?", "a\nb", "%s", "-x", "ä 日本", "~", "$HOME", "a:b", "'\""]
UNREADABLE = ["ba\\ck", "b[1]", "[!a]", "b\udcff"]


@posix
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_path_that_cannot_be_read_back_is_rejected_before_training(cli, a_run, name):
    sizes = ("--vocab", "models/tiny", "--n_layer", 1, "--n_embd", 12, "--n_head", 2)
    Path("1").mkdir()  # which the pattern fits
    for words in (
        (*TRAIN, "--checkpoint_dir", name, "--steps", 1),
        (*TRAIN, "--run_name", name, "--steps", 1),
        ("convert", "models/tiny", f"{name}/m"),
        ("export", "r", f"{name}/m"),
        ("init", "m", "--models_dir", name, *sizes),
        ("init", name, *sizes),
        ("download", "124M", "--models_dir", name, "--url", "http://127.0.0.1:9"),
        ("download", "hf:a/b", "--models_dir", name),
    ):
        result = cli(*words)
        is_name = words[:2] == ("init", name) or ("--run_name", name) in itertools.pairwise(words)
        said = "must be a single name" if is_name and "\\" in name else "TensorFlow cannot read"
        assert result.returncode in (1, 2) and said in result.stderr, (words, result.stderr)
        assert result.stderr.count("\n") == 1
    assert not os.path.lexists(name) and not os.path.lexists(f"checkpoint/{name}")


@posix
@pytest.mark.parametrize("name", READABLE)
def test_a_path_that_only_looks_odd_is_used(tmp_path, name):
    assert destinations.can_read_back([name, "model-1"])
    destinations.check_path(tmp_path / name)


@posix
@pytest.mark.slow
def test_a_run_with_an_odd_name_can_be_resumed_and_sampled(cli, mini):
    odd = "{a,b} ?*]\n%s"
    words = (*TRAIN, "--checkpoint_dir", "c*", f"--run_name={odd}", "--steps")
    assert cli(*words, 1).returncode == 0
    result = cli(*words, 2)
    assert result.returncode == 0 and "[2 |" in result.stderr, result.stderr
    more = ("--checkpoint_dir", "c*", f"--run_name={odd}", "--length", 1, "--sample_dir", "s")
    assert cli("sample", *more).returncode == 0


def test_an_address_is_not_taken_for_a_folder(cli, texts):
    for address in ("gs://bucket/x", "ram://x", "s3://b", "hdfs://h/x"):
        one_line(cli(*TRAIN, "--checkpoint_dir", address), "is an address")
        one_line(cli("convert", "models/tiny", address), "is an address")
        one_line(cli("download", "124M", "--models_dir", address), "is an address")
    assert {path.name for path in Path().iterdir()} == {"models", "t.txt"}

"""`sample --processes N`: N processes answer a shard each, and their files are merged."""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PROMPTS, ROOT
from test_jobs import FLAGS, Stopped, job, lines

from gpt2cli import cli as command_line
from gpt2cli import files, locks, machine
from gpt2cli.commands.sample import SampleOptions
from gpt2cli.inference import generator as inference
from gpt2cli.jobs import workers as processes


def test_several_processes_write_the_same_bytes_as_one(cli, prompts):
    with open("prompts.txt", "a") as file:
        file.write("\n".join(f"The import {n}" for n in range(9)) + "\n")
    assert job(cli, "whole.jsonl", "--nsamples", 2, "--batch_size", 2).returncode == 0
    words = ("--nsamples", 2, "--batch_size", 2, "--processes", 3)
    result = job(cli, "out.jsonl", *words)
    assert result.returncode == 0 and " by 3 processes, 0 failed\n" in result.stderr
    count = len({line["index"] // 2 for line in lines(Path("out.jsonl"))})
    assert f"out.jsonl: {count} prompts, " in result.stderr
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not list(Path().glob("out.jsonl.*"))


class Children:
    """Stands in for processes.run: runs the commands in this process, one after the other.

    Attributes:
        failing: numbers of the parts whose process ends at once.
        started: numbers of the parts whose process was started.
        checkpoints: the --checkpoint of each of them.
        prompts: the --prompts of all of them.
        meanwhile: called when they start.
    """

    def __init__(self):
        self.failing = set()
        self.started = []
        self.checkpoints = []
        self.prompts = None
        self.meanwhile = lambda: None

    def run(self, command, configs):
        self.started = []
        self.checkpoints = [config.checkpoint for config in configs.values()]
        self.prompts = next((config.prompts for config in configs.values()), None)
        self.meanwhile()
        for key, config in configs.items():
            part = int(config.out.rpartition(".")[2].partition("-")[0])
            self.started.append(part)
            if part in self.failing:
                yield key, "by signal 9", "out of memory"
                continue
            with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
                command_line.main([command, *processes.words_of(config)])
            yield key, "with status 0", ""


@pytest.fixture
def children(monkeypatch, prompts):
    children = Children()
    monkeypatch.setattr(processes, "run", children.run)
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.chdir(prompts)
    return children


def left():
    """Return the names of the files that belong to out.jsonl, without itself."""
    return sorted(p.name for p in Path().iterdir() if p.name.startswith(("out.jsonl.", ".out")))


def check_finished(cli, *more):
    """out.jsonl is what one process writes, and nothing else is left."""
    more = [w for i, w in enumerate(more) if "--processes" not in more[max(i - 1, 0) : i + 1]]
    assert job(cli, "whole.jsonl", *more, "--processes", 1).returncode == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert left() == []


def test_finished_parts_are_kept_when_a_process_fails(cli, children):
    children.failing = {2}
    result = job(cli, "out.jsonl", "--processes", 3)
    assert result.returncode == 1 and children.started == [1, 2, 3]
    assert "out.jsonl: 3 of 3 parts left, one process each; GPUs: none\n" in result.stderr
    assert "out.jsonl.2-of-3: its process ended by signal 9: out of memory\n" in result.stderr
    assert "1 of 3 processes failed" in result.stderr
    assert result.stderr.endswith("rerun the same command to resume\n")
    assert not Path("out.jsonl").exists()
    assert left() == [f"out.jsonl.{end}" for end in ("1-of-3", "3-of-3", "part", "part.json")]

    children.failing = set()
    Path(".out.jsonl.1-of-3.lock").write_text("process 1 on a host that is gone")
    result = job(cli, "out.jsonl", "--processes", 3)
    assert result.returncode == 0 and children.started == [2]
    assert "out.jsonl: 1 of 3 parts left" in result.stderr
    assert "5 prompts, 12 tokens, " in result.stderr  # those of this command: 6 per sample
    assert " by 3 processes, 0 failed, 3 samples from an earlier run\n" in result.stderr
    check_finished(cli)


def test_all_processes_use_the_seed_that_was_drawn_also_after_a_stop(cli, children):
    children.failing = {2}
    assert job(cli, "out.jsonl", "--processes", 2, seed=()).returncode == 1
    (seed,) = {line["seed"] for line in lines(Path("out.jsonl.1-of-2"))}
    assert json.loads(Path("out.jsonl.part.json").read_text())["seed"] == seed
    children.failing = set()
    assert job(cli, "out.jsonl", "--processes", 2, seed=()).returncode == 0
    assert children.started == [2]
    assert job(cli, "whole.jsonl", seed=("--seed", seed)).returncode == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_prompts_without_an_answer_are_counted_over_all_parts(cli, children):
    texts = ['"The kettle"', "[99999]", '"A letter"', "[1, 2]", '"\\ud800"', "[88888]"]
    Path("prompts.jsonl").write_text("\n".join(texts))
    words = ("sample", *FLAGS, "--seed", 5, "--prompts", "prompts.jsonl", "--errors", "replace")
    result = cli(*words, "--processes", 2, "--out", "out.jsonl")
    assert result.returncode == 1 and " by 2 processes, 2 failed. The lines with" in result.stderr
    assert left() == []
    result = cli(*words, "--out", "whole.jsonl")
    assert result.returncode == 1 and ", 2 failed. The lines with" in result.stderr
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_the_prompts_of_the_processes_replace_no_file_and_are_closed_to_others(cli, children):
    modes = []
    children.meanwhile = lambda: modes.append(Path(children.prompts).parent.stat().st_mode & 0o777)
    Path("out.jsonl.prompts.jsonl").write_text("PRECIOUS")
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 0
    assert Path("out.jsonl.prompts.jsonl").read_text() == "PRECIOUS"
    assert modes == [0o700] and not Path(children.prompts).exists()


@pytest.mark.parametrize("seed", [(), ("--seed", 5)])
def test_a_finished_job_is_done_again_from_scratch(cli, children, seed):
    assert job(cli, "out.jsonl", "--processes", 2, seed=seed).returncode == 0
    first = Path("out.jsonl").read_bytes()
    assert job(cli, "out.jsonl", "--processes", 3, seed=seed).returncode == 0
    assert children.started == [1, 2, 3] and left() == []
    assert (Path("out.jsonl").read_bytes() == first) == bool(seed)


@pytest.mark.parametrize("change", ["shorter", "text"])
def test_parts_that_answer_other_prompts_are_not_merged(cli, children, change):
    """As when the file of prompts changes after the first process has read it."""
    words = ("--processes", 2)
    children.failing = {2}
    assert job(cli, "out.jsonl", *words).returncode == 1
    part = Path("out.jsonl.1-of-2")
    if change == "shorter":
        part.write_text("".join(part.read_text().splitlines(True)[:-1]))
    else:
        part.write_text(part.read_text().replace(PROMPTS[2], "Another one"))
    children.failing = set()
    for _ in range(2):
        result = job(cli, "out.jsonl", *words)
        assert result.returncode == 1 and "do not fit the prompts of this job" in result.stderr
        assert "Delete out.jsonl.part.json to start from scratch" in result.stderr
        assert not Path("out.jsonl").exists()
    Path("out.jsonl.part.json").unlink()
    result = job(cli, "out.jsonl", *words)
    assert result.returncode == 0 and children.started == [1, 2]
    assert left() == [f"out.jsonl.{name}.old" for name in ("1-of-2", "2-of-2", "part")]
    for path in Path().glob("*.old"):
        path.unlink()
    check_finished(cli)


@pytest.mark.parametrize("difference", ["seed", "prompts"])
def test_the_parts_of_a_different_job_are_moved_away(cli, children, difference):
    children.failing = {2}
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 1
    first = Path("out.jsonl.1-of-2").read_bytes()
    unfinished = '{"index": 1, "text": "old"}\n'
    Path("out.jsonl.2-of-2.part").write_text(unfinished)
    children.failing = set()
    if difference == "prompts":
        Path("prompts.txt").write_text("".join(f"{text}\n" for text in reversed(PROMPTS)))
    seed = 6 if difference == "seed" else 5
    result = job(cli, "out.jsonl", "--processes", 2, seed=("--seed", seed))
    assert result.returncode == 0 and children.started == [1, 2]
    for name in ("out.jsonl.1-of-2", "out.jsonl.2-of-2.part"):
        assert f"{name} belongs to a different job; moved to {name}.old\n" in result.stderr
    assert left() == ["out.jsonl.1-of-2.old", "out.jsonl.2-of-2.part.old"]
    assert [Path(name).read_bytes() for name in left()] == [first, unfinished.encode()]
    assert job(cli, "whole.jsonl", seed=("--seed", seed)).returncode == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_a_file_that_happens_to_have_the_name_of_a_part_is_not_merged(cli, children):
    Path("out.jsonl.1-of-2").write_text('{"index": 0, "text": "mine"}\n')
    Path("out.jsonl.2-of-2").write_text("")
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 0
    assert "mine" in Path("out.jsonl.1-of-2.old").read_text()
    Path("out.jsonl.1-of-2.old").unlink()
    check_finished(cli)


KILLED = """
import os, sys
from gpt2cli import cli
from gpt2cli.jobs import lines as jobs

real = jobs.Lines.add

def add(lines, values):
    real(lines, values)
    if len(open("out.jsonl.part").readlines()) == 2:
        os.kill(os.getpid(), 9)

jobs.Lines.add = add
cli.main(sys.argv[1:])
"""


def test_a_merge_that_is_killed_is_done_again(cli, children):
    children.failing = {2}
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 1
    children.failing = set()
    words = [*FLAGS, "--seed", 5, "--prompts", "prompts.txt", "--out"]
    name = "out.jsonl.2-of-2"
    assert cli("sample", *words, name, "--shard", "2/2").returncode == 0

    words = [sys.executable, "-c", KILLED, "sample", *words, "out.jsonl", "--processes", 2]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    children.started = []
    ended = subprocess.run([*map(str, words)], env=environment)
    assert ended.returncode == -signal.SIGKILL
    assert len(lines(Path("out.jsonl.part"))) == 2 and ".out.jsonl.lock" in left()
    result = job(cli, "out.jsonl", "--processes", 2)
    assert result.returncode == 0 and children.started == []
    assert "5 prompts, 0 tokens, " in result.stderr
    assert result.stderr.endswith(" 5 samples from an earlier run\n")
    check_finished(cli)


def test_a_job_that_is_stopped_before_the_rename_is_merged_again(cli, children, monkeypatch):
    real = os.replace

    def dying(source, target):
        if str(target) == "out.jsonl":
            raise Stopped
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Stopped):
        job(cli, "out.jsonl", "--processes", 2)
    monkeypatch.setattr(os, "replace", real)
    children.started = []
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 0
    assert children.started == []
    check_finished(cli)


def test_a_job_that_is_stopped_after_the_rename_is_finished(cli, children, monkeypatch):
    """Parts that it could not remove are not merged into the next job."""
    real = files.sync_folder

    def dying(folder):
        real(folder)
        if Path("out.jsonl").exists():
            raise Stopped

    monkeypatch.setattr(files, "sync_folder", dying)
    with pytest.raises(Stopped):
        job(cli, "out.jsonl", "--processes", 2)
    monkeypatch.setattr(files, "sync_folder", real)
    assert len(lines(Path("out.jsonl"))) == 5 and not Path("out.jsonl.part").exists()
    result = job(cli, "out.jsonl", "--processes", 2)
    assert result.returncode == 0 and children.started == [1, 2]
    assert left() == ["out.jsonl.1-of-2.old", "out.jsonl.2-of-2.old"]


@pytest.mark.parametrize("count, again, begun", [(2, 3, 2), (2, 1, 2), (2, 0, 2), (1, 2, 1)])
def test_resuming_with_another_number_of_processes_is_rejected(
    cli, children, monkeypatch, count, again, begun
):
    children.failing = {1}
    words = ("--processes", count)
    with monkeypatch.context() as patch:
        if count == 1:
            patch.setattr(inference.LanguageModel, "check_prompt", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                job(cli, "out.jsonl", *words)
        else:
            assert job(cli, "out.jsonl", *words).returncode == 1
    children.failing = set()
    before = left()
    others = " and out.jsonl.*-of-2*" if begun == 2 else ""
    result = job(cli, "out.jsonl", "--processes", again)
    assert result.returncode == 1 and result.stderr == (
        f"gpt2cli: out.jsonl was begun with --processes {begun}, not {again or 1}. Use that number "
        f"to resume, or delete out.jsonl.part.json{others} to start from scratch\n"
    )
    assert left() == before
    assert job(cli, "out.jsonl", *words).returncode == 0
    check_finished(cli)


def test_a_job_can_be_started_from_scratch_with_another_number_of_processes(cli, children):
    """As after --processes 2 took more memory than there is."""
    children.failing = {1, 2}
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 1
    Path("out.jsonl.part.json").unlink()
    children.failing = set()
    result = job(cli, "out.jsonl", "--processes", 3)
    assert result.returncode == 0 and children.started == [1, 2, 3]
    check_finished(cli)


@pytest.mark.parametrize("shard, count", [("1/2", 2), ("2/2", 3), ("3/3", 5)])
def test_the_processes_of_a_shard_write_the_same_as_one(cli, children, shard, count):
    Path("prompts.txt").write_text("".join(f"{PROMPTS[i % 5]} {i}\n" for i in range(11)))
    more = ("--shard", shard, "--nsamples", 2, "--processes", count)
    result = job(cli, "out.jsonl", *more)
    number = len(range(int(shard[0]) - 1, 11, int(shard[2])))
    count = min(count, number)
    assert result.returncode == 0 and len(children.started) == count
    assert f"out.jsonl: {number} prompts" in result.stderr
    assert f" by {count} processes, " in result.stderr
    check_finished(cli, *more)


def test_a_job_uses_one_process_per_gpu_by_default(cli, children, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: ["4", "GPU-x"])
    monkeypatch.setattr(processes, "usable_gpus", lambda: 2)
    result = job(cli, "out.jsonl", "--shard", "2/2")
    assert result.returncode == 0 and children.started == [1, 2]
    assert "2 of 2 parts left, one process each; GPUs: 4, GPU-x\n" in result.stderr
    check_finished(cli, "--shard", "2/2")
    children.started = []
    assert job(cli, "int8.jsonl", "--precision", "int8").returncode == 0  # for the CPU
    assert children.started == []


def test_a_job_uses_one_process_if_tensorflow_cannot_use_the_gpus(cli, prompts, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-none-1,GPU-none-2,GPU-none-3")
    result = job(cli, "out.jsonl")
    assert result.returncode == 0 and result.stderr.startswith(
        "out.jsonl: one process instead of 3: TensorFlow can use 0 of 3 GPUs; run gpt2cli doctor\n"
    )
    assert result.stderr.count("\n") == 2 and Path("out.jsonl").exists()


@pytest.mark.parametrize("kind", ["pipe", "stdin"])
def test_prompts_that_can_be_read_only_once_are_read_once_for_all_processes(cli, children, kind):
    name = "/dev/stdin"
    if kind == "pipe":
        os.mkfifo("pipe")
        name = "pipe"
    words = ("sample", *FLAGS, "--seed", 5, "--prompts", name, "--out", "out.jsonl")

    def fed(*more):
        if kind == "stdin":
            before = os.dup(0)
            with open("prompts.txt", "rb") as file:
                os.dup2(file.fileno(), 0)
            result = cli(*words, *more)
            os.dup2(before, 0)
            return result
        text = Path("prompts.txt").read_bytes()
        thread = threading.Thread(target=Path("pipe").write_bytes, args=(text,))
        thread.start()
        result = cli(*words, *more)
        thread.join()
        return result

    children.failing = {1}
    assert fed("--processes", 2).returncode == 1
    result = fed()
    assert result.returncode == 1 and "was begun with --processes 2, not 1" in result.stderr
    children.failing = set()
    result = fed("--processes", 2)
    assert result.returncode == 0 and children.started == [1]
    check_finished(cli)


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_a_job_ignores_prompts_that_are_replaced_while_it_starts(cli, children, kind):
    """The new file has the size and the time of the old one."""
    path, more = Path("prompts.txt"), ()
    if kind == "csv":
        old = "".join(f"{n},{text}\r\n" for n, text in enumerate(PROMPTS))
        path = Path("prompts.csv")
        path.write_bytes(f"n,text\r\n{old}".encode("utf-16"))
        more = ("--csv_column", "text", "--encoding", "utf-16")
    before, content = path.stat(), path.read_bytes()
    words = ("sample", *FLAGS, "--seed", 5, "--prompts", path, *more)

    def replace():
        path.write_bytes(content.replace(b"k", b"K"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert path.stat().st_size == before.st_size

    children.meanwhile = replace
    result = cli(*words, "--processes", 2, "--out", "out.jsonl")
    assert result.returncode == 0, result
    assert [line["prompt"] for line in lines(Path("out.jsonl"))] == PROMPTS
    assert left() == []

    children.failing = {2}  # resumed with the new prompts, it is another job
    path.write_bytes(content)
    assert cli(*words, "--processes", 2, "--out", "out.jsonl").returncode == 1
    children.failing = set()
    result = cli(*words, "--processes", 2, "--out", "out.jsonl")
    assert result.returncode == 0
    assert "out.jsonl.1-of-2 belongs to a different job; moved to" in result.stderr
    assert [line["prompt"] for line in lines(Path("out.jsonl"))] != PROMPTS


def test_all_processes_use_one_checkpoint_even_if_training_saves_another(cli, children):
    run = Path("checkpoint/run1")
    shutil.copytree("models/tiny", run)
    (run / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')

    def save():
        for path in run.glob("model.ckpt*"):
            path.with_name(path.name.replace(".ckpt", "-7")).write_bytes(b"not that one")
        (run / "checkpoint").write_text('model_checkpoint_path: "model-7"\n')

    children.meanwhile = save
    words = ("--run_name", "run1", *FLAGS[2:], "--prompts", "prompts.txt", "--seed", 5)
    result = cli("sample", *words, "--out", "out.jsonl", "--processes", 2)
    assert result.returncode == 0, result
    assert children.checkpoints == ["model.ckpt"] * 2
    check_finished(cli)


def test_a_shard_in_the_name_needs_the_flag(cli, prompts):
    result = job(cli, "out-{shard}.jsonl")
    assert result.returncode == 2 and "{shard} in --out needs --shard" in result.stderr


def test_processes_need_a_job(cli, prompts):
    assert cli("sample", *FLAGS, "--prompts", "prompts.txt", "--processes", 2).returncode == 2


def test_a_process_that_fails_is_reported_and_the_others_finish_their_parts(
    cli, prompts, monkeypatch
):
    """It fails because another process holds the lock of its part."""
    words, children = ("--processes", 3), Children()
    children.failing = {2, 3}
    with monkeypatch.context() as patch:
        patch.setattr(processes, "run", children.run)
        assert job(cli, "out.jsonl", *words).returncode == 1
    with locks.locked(prompts / ".out.jsonl.2-of-3.lock", "sample", target="out.jsonl.2-of-3"):
        result = job(cli, "out.jsonl", *words)
    assert (
        result.returncode == 1
        and "out.jsonl.2-of-3: its process ended with status 75: " in result.stderr
    )
    assert f"process {os.getpid()}" in result.stderr and "1 of 3 processes failed" in result.stderr
    assert left() == [f"out.jsonl.{end}" for end in ("1-of-3", "3-of-3", "part", "part.json")]
    monkeypatch.setattr(processes, "run", children.run)
    children.failing = set()
    assert job(cli, "out.jsonl", *words).returncode == 0 and children.started == [2]
    check_finished(cli)


def test_a_new_job_waits_for_the_processes_of_an_old_one(cli, children):
    with locks.locked(Path(".out.jsonl.2-of-2.lock"), "sample", target="out.jsonl.2-of-2"):
        result = job(cli, "out.jsonl", "--processes", 2)
    assert result.returncode == 75 and "writing out.jsonl.2-of-2" in result.stderr
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 0
    check_finished(cli)


def children_of(process):
    """Return the ids of the live processes whose parent it is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(") ")[2].split()[:2]
            if int(parent) == process and state != "Z":
                found.append(int(path.parent.name))
    return found


def is_over(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[0]
    except OSError:
        return True
    return state == "Z"  # a zombie: its parent has not waited for it


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.02)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has PDEATHSIG")


@on_linux
def test_the_processes_end_when_their_parent_is_killed(cli, prompts):
    Path("many.txt").write_text("".join(f"{PROMPTS[i % 5]} {i}\n" for i in range(4_000)))
    words = [*FLAGS, "--seed", 5, "--prompts", "many.txt", "--batch_size", 8, "--out", "out.jsonl"]
    command = [sys.executable, "-m", "gpt2cli", "sample", *map(str, words), "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    parts = [Path(f"out.jsonl.{k}-of-2.part") for k in (1, 2)]
    until(lambda: all(part.exists() and part.stat().st_size for part in parts) or process.poll())
    started = children_of(process.pid)
    assert len(started) == 2
    process.kill()
    process.wait()
    until(lambda: all(map(is_over, started)), 20)
    assert all(part.exists() for part in parts)  # they had not simply finished
    assert not Path("out.jsonl").exists()


@on_linux
@pytest.mark.slow
def test_a_job_in_parts_that_is_killed_again_and_again_resumes(cli, prompts):
    Path("many.txt").write_text("".join(f"{PROMPTS[i % 5]} {i}\n" for i in range(20_000)))
    words = [*FLAGS, "--seed", 5, "--prompts", "many.txt", "--batch_size", 8, "--out"]
    command = [sys.executable, "-m", "gpt2cli", "sample", *map(str, words), "out.jsonl"]
    environment, chance = {**os.environ, "PYTHONPATH": str(ROOT)}, random.Random(1)
    for _ in range(40):
        process = subprocess.Popen([*command, "--processes", "2"], env=environment)
        time.sleep(chance.random() * 8)
        started = children_of(process.pid)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        until(lambda ended=started: all(map(is_over, ended)), 20)
    assert cli("sample", *words, "out.jsonl", "--processes", 2).returncode == 0
    assert cli("sample", *words, "whole.jsonl").returncode == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert left() == []


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that makes every new Python process run a shell script instead."""

    def install(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    monkeypatch.chdir(tmp_path)
    return install


def configs(count):
    return {number: SampleOptions(prompt=str(number)) for number in range(count)}


def test_a_process_that_ends_is_reported_while_the_others_run(program):
    # the first waits for a file that is made when the second has ended
    program(
        'case "$4" in *0) until [ -e reported ]; do sleep 0.05; done; exit 3;; esac\n'
        "echo a word >&2; echo the last >&2; kill -9 $$"
    )
    found = []
    for ended in processes.run("sample", configs(2)):
        found.append(ended)
        Path("reported").touch()
    assert found == [(1, "by signal 9", "the last"), (0, "with status 3", "")]


def test_each_process_has_a_gpu_of_its_own(program, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    program('echo "$CUDA_VISIBLE_DEVICES" >&2')
    found = {number: message for number, _, message in processes.run("sample", configs(3))}
    assert found == {0: "2", 1: "5", 2: "2"}


def test_all_are_ended_together_when_this_process_is(program, monkeypatch):
    """The first has to be killed and the last ends by itself; the others do not wait for them."""
    monkeypatch.setattr(processes, "GRACE", 4)
    program(
        'case "$4" in *4) until [ -e ready0 -a -e ready1 -a -e ready2 -a -e ready3 ]; '
        "do sleep 0.05; done; exit;; *0) trap '' TERM;; "
        '*) trap "touch saved$$; exit" TERM;; esac\n'
        "echo $$ >pid$$; mv pid$$ ready${4#--prompt=}; while :; do sleep 0.05; done"
    )
    ended = processes.run("sample", configs(5))
    assert next(ended) == (4, "with status 0", "")
    ended.close()
    saved = [path.stat().st_mtime for path in Path().glob("saved*")]
    assert len(saved) == 3 and max(saved) < time.time() - 1  # before the first was killed
    assert all(is_over(int(path.read_text())) for path in Path().glob("ready*"))


@on_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_processes_end_when_the_one_that_started_them_is_ended(tmp_path, program, number):
    program("touch ready$$; exec sleep 100")
    code = (
        "import sys; from gpt2cli.commands.sample import SampleOptions;"
        "from gpt2cli.jobs import workers as processes; sys.executable = sys.argv[1]\n"
        "next(processes.run('sample', {n: SampleOptions() for n in range(2)}))"
    )
    python, script = sys.orig_argv[0], sys.executable
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [python, "-c", code, script],
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup may run us
    )
    until(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    started = [int(path.name.removeprefix("ready")) for path in tmp_path.glob("ready*")]
    assert sorted(children_of(process.pid)) == sorted(started)
    process.send_signal(number)
    process.wait()
    until(lambda: all(map(is_over, started)), 10)


@on_linux
def test_a_process_whose_parent_is_already_gone_does_not_start():
    follow = functools.partial(processes._end_with, processes.PRCTL, -1)
    command = [sys.executable, "-c", "print('started')"]
    result = subprocess.run(command, preexec_fn=follow, capture_output=True)
    assert result.returncode == 143 and result.stdout == b""


@on_linux
def test_a_terminal_stops_only_the_process_that_started_the_others():
    """It sends its signals to all; with SIGTERM from their parent they would be two requests."""
    follow = functools.partial(processes._end_with, processes.PRCTL, os.getpid())
    code = "import os\nfor number in (1, 2): os.kill(os.getpid(), number)\nprint('alive')"
    result = subprocess.run([sys.executable, "-c", code], preexec_fn=follow, capture_output=True)
    assert result.returncode == 0 and result.stdout == b"alive\n"


@pytest.mark.parametrize(
    "visible, found",
    [("", []), ("-1", []), ("0", ["0"]), ("2,GPU-x", ["2", "GPU-x"]), ("1,-1,2", ["1"])],
)
def test_gpus_are_those_that_cuda_shows(monkeypatch, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpus() == found


def test_a_config_becomes_its_command_line():
    config = SampleOptions(prompt="-x = 1", stop=("a", "b\n"), keep_stop=True, top_p=0.5, seed=0)
    assert command_line.read_command_line(["sample", *processes.words_of(config)]) == config


def test_a_new_job_moves_away_the_parts_of_an_older_one_and_no_others(cli, prompts):
    """NAME.3-of-8 may also be what a user's `--shard 3/8 --out NAME.{shard}` wrote."""
    (prompts / "out.jsonl.part").write_text("")
    (prompts / "out.jsonl.part.json").write_text('{"processes": 7}')
    older = ("out.jsonl.2-of-7.part", "out.jsonl.2-of-7.part.json", "out.jsonl.3-of-7")
    mine = ("out.jsonl.2-of-8.part", "out.jsonl.2-of-8.part.json", "out.jsonl.3-of-8")
    for name in (*older, *mine):
        (prompts / name).write_text("{}\n")
    assert job(cli, "out.jsonl").returncode == 0
    left = {path.name for path in prompts.iterdir()} - {"models", "prompts.txt", "out.jsonl"}
    assert left == {"out.jsonl.2-of-7.part.old", "out.jsonl.3-of-7.old", *mine}

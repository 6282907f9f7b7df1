"""`sample --processes`: a job in parts, one for each process, whichever of them ends how."""

import contextlib
import functools
import io
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
from gpt2cli import files
from gpt2cli.commands.sample import SampleOptions
from gpt2cli.inference import generator as inference
from gpt2cli.jobs import workers as processes


def test_processes_together_write_what_one_does(cli, prompts):
    """To the last byte."""
    with open("prompts.txt", "a") as file:
        file.write("\n".join(f"The import {n}" for n in range(9)) + "\n")
    assert job(cli, "whole.jsonl", "--nsamples", 2, "--batch_size", 2).returncode == 0
    words = ("--nsamples", 2, "--batch_size", 2, "--processes", 3)
    result = job(cli, "out.jsonl", *words)
    assert result.returncode == 0 and "by 3 processes, 0 failures" in result.stderr
    count = len({line["index"] // 2 for line in lines(Path("out.jsonl"))})
    assert f"out.jsonl: {count} prompts, " in result.stderr
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not list(Path().glob("out.jsonl.*"))


class Children:
    """Stands in for processes.run: the commands run here, one after the other.

    Attributes:
        failing: numbers of the parts whose process ends at once.
        started: the numbers of those that were started.
        checkpoints: what each was told to use.
    """

    def __init__(self):
        self.failing, self.started, self.checkpoints = set(), [], []
        self.meanwhile = lambda: None  # called when they start

    def run(self, command, configs, ended):
        self.started, self.checkpoints = [], [config.checkpoint for config in configs]
        self.meanwhile()
        for number, config in enumerate(configs):
            part = int(config.out.rpartition(".")[2].partition("-")[0])
            self.started.append(part)
            if part in self.failing:
                ended(number, "by signal 9", "out of memory")
                continue
            with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
                command_line.main([command, *processes.words_of(config)])
            ended(number, "with status 0", "")


@pytest.fixture
def children(monkeypatch, prompts):
    children = Children()
    monkeypatch.setattr(processes, "run", children.run)
    monkeypatch.setattr(processes, "gpus", lambda: [])
    monkeypatch.chdir(prompts)
    return children


def left():
    """What lies beside out.jsonl and is of it."""
    return sorted(p.name for p in Path().iterdir() if p.name.startswith(("out.jsonl.", ".out")))


def check_finished(cli, *more):
    """out.jsonl is what one process writes, and nothing else is there."""
    more = [w for i, w in enumerate(more) if "--processes" not in more[max(i - 1, 0) : i + 1]]
    assert job(cli, "whole.jsonl", *more, "--processes", 1).returncode == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert left() == []


def test_what_is_finished_stays_when_a_process_fails(cli, children):
    children.failing = {2}
    result = job(cli, "out.jsonl", "--processes", 3)
    assert result.returncode == 1 and children.started == [1, 2, 3]
    assert "out.jsonl: process 2 of 3 ended by signal 9: out of memory\n" in result.stderr
    assert "1 of 3 processes failed" in result.stderr and "The same command" in result.stderr
    assert not Path("out.jsonl").exists()
    assert {"out.jsonl.1-of-3", "out.jsonl.3-of-3"} < set(left())

    children.failing = set()
    Path(".out.jsonl.1-of-3.lock").write_text("process 1 on a host that is gone")
    result = job(cli, "out.jsonl", "--processes", 3)
    assert result.returncode == 0 and children.started == [2]
    assert "one process for each of 1 parts that are left of 3; GPUs" in result.stderr
    assert "5 prompts, 12 tokens, " in result.stderr  # of six each, those of this command
    assert " by 3 processes, 0 failures, 3 samples were there\n" in result.stderr
    check_finished(cli)


def test_parts_that_are_not_the_answers_to_the_prompts_are_refused(cli, children):
    """As when the file of prompts changes after the first process has read it."""
    words = ("--processes", 2)
    children.failing = {2}
    assert job(cli, "out.jsonl", *words).returncode == 1
    part = Path("out.jsonl.1-of-2")
    part.write_text("".join(part.read_text().splitlines(True)[:-1]))
    children.failing = set()
    for _ in range(2):
        result = job(cli, "out.jsonl", *words)
        assert result.returncode == 1 and "which changed meanwhile. Remove them" in result.stderr
        assert not Path("out.jsonl").exists()
    for path in Path().glob("out.jsonl.*-of-2"):
        path.unlink()
    assert job(cli, "out.jsonl", *words).returncode == 0
    check_finished(cli)


def test_the_parts_of_another_job_are_set_aside(cli, children):
    children.failing = {2}
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 1
    first = Path("out.jsonl.1-of-2").read_bytes()
    children.failing = set()
    result = job(cli, "out.jsonl", "--processes", 2, seed=("--seed", 6))
    assert result.returncode == 0 and children.started == [1, 2]
    assert "out.jsonl.1-of-2 is of another job: set aside as out.jsonl.1-of-2.old" in result.stderr
    assert left() == ["out.jsonl.1-of-2.old"]
    assert Path(left()[0]).read_bytes() == first
    assert {line["seed"] for line in lines(Path("out.jsonl"))} == {6}


def test_a_file_that_has_the_name_of_a_part_by_chance_is_not_joined(cli, children):
    Path("out.jsonl.1-of-2").write_text('{"index": 0, "text": "mine"}\n')
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 0
    assert "mine" in Path("out.jsonl.1-of-2.old").read_text()
    Path("out.jsonl.1-of-2.old").unlink()
    check_finished(cli)


KILLED = """
import os, sys
from gpt2cli import cli
from gpt2cli.jobs import lines as jobs

real = jobs.Lines.join

def join(lines):
    for number, line in enumerate(real(lines)):
        if number == 1:
            os.kill(os.getpid(), 9)
        yield line

jobs.Lines.join = join
cli.main(sys.argv[1:])
"""


def test_a_job_that_is_killed_while_its_parts_are_joined_joins_them_again(cli, children):
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
    assert "5 prompts, 0 tokens, " in result.stderr and ", 5 samples were there" in result.stderr
    check_finished(cli)


@pytest.mark.parametrize("which", [0, 1])
def test_a_job_that_is_ended_when_its_parts_are_joined_only_tidies_up(
    cli, children, which, monkeypatch
):
    """Before the first part is removed, or after the last one."""
    real = os.fsync if which == 0 else os.replace

    def dying(*arguments):
        if which == 0 and Path("out.jsonl.2-of-2").exists() or "out.jsonl" == str(arguments[-1]):
            raise Stopped
        return real(*arguments)

    words = ("--processes", 2)
    monkeypatch.setattr(os, real.__name__, dying)
    with pytest.raises(Stopped):
        job(cli, "out.jsonl", *words)
    monkeypatch.setattr(os, real.__name__, real)
    if which == 0:  # one of them was
        for name in ("out.jsonl", ".out.jsonl"):
            Path(f"{name}.1-of-2.lock").write_text("")
    children.started = []
    result = job(cli, "out.jsonl", *words)
    assert result.returncode == 0 and children.started == [], result
    Path("out.jsonl.1-of-2.lock").unlink(missing_ok=True)
    check_finished(cli)


@pytest.mark.parametrize("again", [3, 1, 0])
def test_a_job_in_parts_goes_on_in_them_whatever_processes_says(cli, children, again):
    children.failing = {1}
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 1
    children.failing = set()
    result = job(cli, "out.jsonl", "--processes", again)
    assert result.returncode == 0 and children.started == [1]
    told = "out.jsonl was begun by 2 processes, which go on, whatever --processes says\n"
    assert (told in result.stderr) == (again > 0)
    check_finished(cli)


def test_a_job_of_which_no_process_made_anything_may_have_another_number(cli, children):
    """As after --processes 2 took more memory than there is."""
    children.failing = {1, 2}
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 1
    Path("out.jsonl.2-of-2.part").write_text("")
    Path("out.jsonl.2-of-2.part.json").write_text("{}")
    children.failing = set()
    result = job(cli, "out.jsonl", "--processes", 3)
    assert result.returncode == 0 and children.started == [1, 2, 3]
    assert "out.jsonl: 3 processes; GPUs for them: none\n" in result.stderr
    check_finished(cli)


def test_what_one_process_began_one_goes_on_with(cli, children, monkeypatch):
    real, done = inference.LanguageModel.answers, []

    def dying(self, *arguments, **options):
        if done:
            raise Stopped
        done.append(1)
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(inference.LanguageModel, "answers", dying)
        job(cli, "out.jsonl")
    result = job(cli, "out.jsonl", "--processes", 2)
    assert result.returncode == 0 and children.started == []
    assert "begun by one process, which goes on, whatever --processes says" in result.stderr
    check_finished(cli)


@pytest.mark.parametrize("shard, count", [("1/2", 2), ("2/2", 3), ("3/3", 5)])
def test_the_processes_of_a_shard_write_what_one_does(cli, children, shard, count):
    Path("prompts.txt").write_text("".join(f"{PROMPTS[i % 5]} {i}\n" for i in range(11)))
    more = ("--shard", shard, "--nsamples", 2, "--processes", count)
    result = job(cli, "out.jsonl", *more)
    number = len(range(int(shard[0]) - 1, 11, int(shard[2])))
    count = min(count, number)
    assert result.returncode == 0 and len(children.started) == count
    assert f"out.jsonl: {number} prompts" in result.stderr
    assert f" by {count} processes" in result.stderr
    check_finished(cli, *more)


def test_a_shard_has_all_gpus_of_its_host_unless_told_otherwise(cli, children, monkeypatch):
    monkeypatch.setattr(processes, "gpus", lambda: ["4", "GPU-x"])
    monkeypatch.setattr(processes, "usable_gpus", lambda: 2)
    result = job(cli, "out.jsonl", "--shard", "2/2")
    assert result.returncode == 0 and children.started == [1, 2]
    assert "out.jsonl: 2 processes; GPUs for them: 4, GPU-x\n" in result.stderr
    check_finished(cli, "--shard", "2/2")
    children.started = []
    assert job(cli, "int8.jsonl", "--precision", "int8").returncode == 0  # for the CPU
    assert children.started == []


def test_gpus_that_tensorflow_cannot_use_are_not_shared_among_processes(cli, prompts, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-none-1,GPU-none-2,GPU-none-3")
    result = job(cli, "out.jsonl")
    assert result.returncode == 0 and result.stderr.startswith(
        "out.jsonl: one process, not 3: of 3 GPUs TensorFlow can use 0; gpt2cli doctor says more\n"
    )
    assert result.stderr.count("\n") == 2 and Path("out.jsonl").exists()


@pytest.mark.parametrize("kind", ["pipe", "stdin"])
def test_prompts_that_can_be_read_once_are_for_one_process(cli, children, monkeypatch, kind):
    """A child that reads them again would find other ones."""
    text = Path("prompts.txt").read_bytes()
    name = "/dev/stdin"
    if kind == "pipe":
        os.mkfifo("pipe")
        name = "pipe"
    monkeypatch.setattr(processes, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(processes, "usable_gpus", lambda: 2)
    words = ("sample", *FLAGS, "--seed", 5, "--prompts", name, "--out", "out.jsonl")

    def fed(*more):
        if kind == "stdin":
            before = os.dup(0)
            with open("prompts.txt", "rb") as file:
                os.dup2(file.fileno(), 0)
            result = cli(*words, *more)
            os.dup2(before, 0)
            return result
        thread = threading.Thread(target=Path("pipe").write_bytes, args=(text,))
        thread.start()
        result = cli(*words, *more)
        thread.join()
        return result

    result = fed("--processes", 2)
    assert result.returncode == 2 and f"{name} can be read once" in result.stderr
    assert left() == [] and not Path("out.jsonl").exists()
    result = fed()
    assert result.returncode == 0 and children.started == []
    assert f"out.jsonl: one process, not 2: {name} can be read once\n" in result.stderr
    children.failing = {1}
    Path("out.jsonl").unlink()
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 1
    result = fed()
    assert result.returncode == 1 and "was begun by 2 processes" in result.stderr
    assert "Write the prompts into a file" in result.stderr


def test_all_processes_use_one_checkpoint_though_the_run_saves_another(cli, children):
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


def test_a_name_with_a_shard_needs_one(cli, prompts):
    result = job(cli, "out-{shard}.jsonl")
    assert result.returncode == 2 and "{shard} in --out stands for --shard" in result.stderr


def test_processes_need_a_job(cli, prompts):
    assert cli("sample", *FLAGS, "--prompts", "prompts.txt", "--processes", 2).returncode == 2


def test_a_process_that_fails_is_told_and_the_others_finish_their_parts(cli, prompts, monkeypatch):
    """Here because another one fills its part, and the first part was finished before."""
    words, children = ("--processes", 3), Children()
    children.failing = {2, 3}
    with monkeypatch.context() as patch:
        patch.setattr(processes, "run", children.run)
        assert job(cli, "out.jsonl", *words).returncode == 1
    with files.locked(prompts / ".out.jsonl.2-of-3.lock", "sample", of="out.jsonl.2-of-3"):
        result = job(cli, "out.jsonl", *words)
    assert result.returncode == 1 and "process 2 of 3 ended with status 75: " in result.stderr
    assert f"process {os.getpid()}" in result.stderr and "1 of 3 processes failed" in result.stderr
    assert left() == [f"out.jsonl.{end}" for end in ("1-of-3", "3-of-3", "part", "part.json")]
    monkeypatch.setattr(processes, "run", children.run)
    children.failing = set()
    assert job(cli, "out.jsonl", *words).returncode == 0 and children.started == [2]
    check_finished(cli)


def test_a_new_job_does_not_take_a_part_from_under_a_process_that_fills_it(cli, children):
    with files.locked(Path(".out.jsonl.2-of-2.lock"), "sample", of="out.jsonl.2-of-2"):
        result = job(cli, "out.jsonl", "--processes", 2)
    assert result.returncode == 75 and "filling out.jsonl.2-of-2" in result.stderr
    assert job(cli, "out.jsonl", "--processes", 2).returncode == 0
    check_finished(cli)


def children_of(process):
    """The ids of the processes whose parent it is, which are not over."""
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
    return state == "Z"  # nobody has asked for it yet


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has PDEATHSIG")


@on_linux
def test_a_job_whose_parent_is_killed_ends_and_goes_on_later(cli, prompts):
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
    assert all(part.exists() for part in parts)  # they were not simply at an end
    assert not Path("out.jsonl").exists()


@on_linux
@pytest.mark.slow
def test_a_job_in_parts_that_is_killed_again_and_again_ends_as_one_that_was_not(cli, prompts):
    """At any moment, and now and then with another number of processes."""
    Path("many.txt").write_text("".join(f"{PROMPTS[i % 5]} {i}\n" for i in range(20_000)))
    words = [*FLAGS, "--seed", 5, "--prompts", "many.txt", "--batch_size", 8, "--out"]
    command = [sys.executable, "-m", "gpt2cli", "sample", *map(str, words), "out.jsonl"]
    environment, chance = {**os.environ, "PYTHONPATH": str(ROOT)}, random.Random(1)
    for _ in range(40):
        count = str(chance.choice([2, 2, 3]))
        process = subprocess.Popen([*command, "--processes", count], env=environment)
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
    """Have a shell script run instead of every Python that is started, by what it is to do."""

    def install(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    monkeypatch.chdir(tmp_path)
    return install


def configs(count):
    return [SampleOptions(prompt=str(number)) for number in range(count)]


def test_a_process_that_ends_is_told_of_while_the_others_run(program):
    # the first waits for what is made when the second has ended
    program(
        'case "$4" in *0) until [ -e told ]; do sleep 0.05; done; exit 3;; esac\n'
        "echo a word >&2; echo the last >&2; kill -9 $$"
    )
    told = []

    def ended(number, how, said):
        told.append((number, how, said))
        Path("told").touch()

    processes.run("sample", configs(2), ended)
    assert told == [(1, "by signal 9", "the last"), (0, "with status 3", "")]


def test_each_process_has_a_gpu_of_its_own(program, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    program('echo "$CUDA_VISIBLE_DEVICES" >&2')
    told = {}
    processes.run("sample", configs(3), lambda number, _, said: told.update({number: said}))
    assert told == {0: "2", 1: "5", 2: "2"}


def test_all_are_ended_together_when_this_process_is(program, monkeypatch):
    """The first has to be killed and the last ends by itself; the others do not wait for them."""
    monkeypatch.setattr(processes, "GRACE", 4)
    program(
        'case "$4" in *4) until [ -e ready0 -a -e ready1 -a -e ready2 -a -e ready3 ]; '
        "do sleep 0.05; done; exit;; *0) trap '' TERM;; "
        '*) trap "touch saved$$; exit" TERM;; esac\n'
        "echo $$ >pid$$; mv pid$$ ready${4#--prompt=}; while :; do sleep 0.05; done"
    )

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes.run("sample", configs(5), interrupted)
    saved = [path.stat().st_mtime for path in Path().glob("saved*")]
    assert len(saved) == 3 and max(saved) < time.time() - 1  # before the first was killed
    assert all(is_over(int(path.read_text())) for path in Path().glob("ready*"))


@on_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_processes_end_when_the_one_that_started_them_is_ended(tmp_path, program, number):
    program("touch ready$$; exec sleep 100")
    code = (
        "import sys; from gpt2cli.commands.sample import SampleOptions;"
        "from gpt2cli.jobs import workers as processes;"
        "sys.executable = sys.argv[1]\n"
        "processes.run('sample', [SampleOptions()] * 2, None)"
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
def test_a_process_whose_parent_is_gone_before_it_asked_does_not_start():
    follow = functools.partial(processes._follow, processes._leash().args[0], -1)
    command = [sys.executable, "-c", "print('started')"]
    result = subprocess.run(command, preexec_fn=follow, capture_output=True)
    assert result.returncode == 143 and result.stdout == b""


@pytest.mark.parametrize(
    "told, found",
    [("", []), ("-1", []), ("0", ["0"]), ("2,GPU-x", ["2", "GPU-x"]), ("1,-1,2", ["1"])],
)
def test_gpus_are_those_that_cuda_shows(monkeypatch, told, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert processes.gpus() == found


def test_a_config_is_its_own_command_line():
    config = SampleOptions(prompt="-x = 1", stop=("a", "b\n"), logprobs=True, top_p=0.5, seed=0)
    assert command_line.read_command_line(["sample", *processes.words_of(config)]) == config

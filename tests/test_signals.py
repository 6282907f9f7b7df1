"""Work outlives its messages and its terminal: lost messages, Ctrl-C, SIGTERM, SIGHUP."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_trust import FLAGS, mini, read_log

from gpt2cli import console, signals
from gpt2cli.cli import EXIT_STATUSES
from gpt2cli.storage import runs

mini = mini  # a fixture
STOPS = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}
each_stop = pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
T = ("--model_name", "tiny")
JOB = ("sample", *T, "--prompts", "prompts.txt", "--format", "jsonl", "--length", 3, "--seed", 5)


def unwritable(how):
    """Return a stream on which every line fails: on a full disk, or in a closed pipe."""
    if how == "full disk":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.fixture
def lose(monkeypatch):
    """Make standard error or standard output unwritable."""
    monkeypatch.setattr(console, "lost", console.lost)
    console.lost.forget()

    def break_stream(name, how):
        stream = unwritable(how)
        monkeypatch.setattr(sys, name, stream)
        return stream

    yield break_stream
    console.lost.stream = None


# --- messages and results that cannot be written ---


@pytest.fixture
def sampling(mini, monkeypatch):
    """The flags of a run that prints samples, which take no time."""
    from gpt2cli.inference.generator import LanguageModel

    monkeypatch.setattr(LanguageModel, "samples", lambda *_, **__: iter(()))
    return ("train", "text.txt", *FLAGS[:-2], "--sample_every", 2, "--steps", 2)


def losses_in(run):
    return [line for line in read_log(run) if "messages_lost" in line]


def test_a_run_continues_when_its_messages_are_lost_and_the_log_counts_them(cli, sampling, lose):
    lose("stderr", "full disk")
    lose("stdout", "full disk")
    assert cli(*sampling).returncode == 0
    assert runs.steps("checkpoint/run1") == [2] and Path("samples/run1/samples-2").exists()
    first, last = losses_in("checkpoint/run1")
    assert last["messages_lost"] > first["messages_lost"] >= 5
    assert last["step"] == 2 and last["reason"] == "No space left on device"


@pytest.mark.slow
def test_a_run_whose_samples_cannot_be_printed_reports_it(cli, sampling, lose):
    lose("stdout", "full disk")
    result = cli(*sampling)
    assert result.returncode == 0
    assert "cannot print the samples: No space left on device" in result.stderr
    assert losses_in("checkpoint/run1")[-1]["messages_lost"] == 1


@pytest.mark.parametrize("name", [pytest.param("stdout", marks=pytest.mark.slow), "stderr"])
def test_a_run_whose_reader_leaves_is_saved(cli, sampling, lose, monkeypatch, name):
    """As `train | head` and `train 2>&1 | head` leave it."""
    from gpt2cli.training.step import Trainer

    def step(self, *arguments, real=Trainer.step):
        lose(name, "closed pipe")
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "step", step)
    result = cli(*sampling, "--save_every", 9)
    assert result.returncode == 141
    assert runs.steps("checkpoint/run1") == [1 if name == "stderr" else 2]
    assert losses_in("checkpoint/run1")


@pytest.mark.parametrize("how", ["full disk", "closed pipe"])
def test_a_job_and_an_encoding_continue_when_their_messages_are_lost(cli, prompts, lose, how):
    lose("stderr", how)
    assert cli(*JOB, "--out", "out.jsonl").returncode == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 5
    assert cli("encode", "prompts.txt", "out.npy", *T).returncode == 0
    assert np.load("out.npy").size
    assert console.lost.count >= 2


@pytest.mark.parametrize("how, status", [("full disk", 1), ("closed pipe", 141)])
def test_a_result_that_cannot_be_written_is_an_error(cli, prompts, lose, how, status):
    commands = (
        ("sample", *T, "--length", 2),
        ("evaluate", "prompts.txt", *T),
        ("download",),
    )
    for words in commands:
        stream = lose("stdout", how)
        result = cli(*words)
        assert result.returncode == status, words
        shown = "gpt2cli: standard output: No space left on device\n"
        assert result.stderr.endswith(shown) == (status == 1), result.stderr
        stream.close()  # nothing is left in it that Python would fail to write at exit


def test_a_progress_bar_on_a_closed_terminal_does_not_end_the_command(cli, prompts, monkeypatch):
    """As after the loss of a connection, under `trap '' HUP`."""
    terminal, own = pty.openpty()
    with os.fdopen(own, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert stream.isatty()
        os.close(terminal)
        assert cli("encode", "prompts.txt", "out.npz", *T).returncode == 0
        assert Path("out.npz").exists()
        console.drop(stream)


def test_a_message_in_the_middle_of_another_one_is_lost(monkeypatch, lose):
    """A signal arrives while the main thread prints; Python rejects the handler's line."""

    class Busy(io.StringIO):
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", Busy())
    assert console.say("finishing") and console.lost.count == 1


# --- signals ---


def test_every_stop_has_its_documented_status():
    documented = (ROOT / "docs" / "generation.md").read_text()
    for status in EXIT_STATUSES:
        assert f"| {status} |" in documented
    assert set(STOPS.values()) <= set(EXIT_STATUSES)


def send(number):
    """Send a signal to this process, which Python handles before its next step."""
    os.kill(os.getpid(), number)
    time.sleep(0)


@pytest.fixture
def unstopped(monkeypatch):
    """SIGHUP ends this process as usual: nohup may run the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def stop_at_answer(monkeypatch, unstopped):
    """Return a function: send a signal before the model answers for the nth time."""
    from gpt2cli.inference.generator import LanguageModel

    real, calls = LanguageModel.answers, []

    def install(number, nth):
        def answers(self, *arguments, **named):
            calls.append(1)
            if len(calls) == nth:
                send(number)
            yield from real(self, *arguments, **named)

        calls.clear()
        monkeypatch.setattr(LanguageModel, "answers", answers)

    return install


def files_here():
    return sorted(str(path) for path in Path().rglob("*") if "models" not in path.parts)


@each_stop
def test_a_stopped_job_keeps_its_answers_and_says_how_to_resume(
    cli, prompts, stop_at_answer, number
):
    stop_at_answer(number, nth=3)
    result = cli(*JOB, "--out", "out.jsonl", "--batch_size", 1)
    assert result.returncode == STOPS[number]
    assert "out.jsonl: 2 samples kept; run the same command again to resume\n" in result.stderr
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert result.stderr.endswith(f"gpt2cli: stopped by {name}\n")
    assert files_here() == ["out.jsonl.part", "out.jsonl.part.json", "prompts.txt"]
    assert "2 samples from an earlier run" in cli(*JOB, "--out", "out.jsonl").stderr


@each_stop
def test_a_stopped_sample_leaves_the_old_file(cli, prompts, stop_at_answer, number):
    Path("out.txt").write_text("old")
    stop_at_answer(number, nth=1)
    result = cli("sample", *T, "--length", 2, "--out", "out.txt")
    assert result.returncode == STOPS[number]
    assert "out.txt was not written: run the same command again" in result.stderr
    assert Path("out.txt").read_text() == "old" and files_here() == ["out.txt", "prompts.txt"]


@each_stop
def test_a_stopped_encoding_leaves_nothing(cli, prompts, monkeypatch, unstopped, number):
    from gpt2cli.text import encoded

    def encode(*arguments, real=encoded.encode):
        for part in real(*arguments):
            yield part
            send(number)

    monkeypatch.setattr(encoded, "encode", encode)
    for name in ("out.npz", "out.npy"):
        result = cli("encode", "prompts.txt", name, *T)
        assert result.returncode == STOPS[number]
        assert f"{name} was not written: run the same command again" in result.stderr
    assert files_here() == ["prompts.txt"]


@each_stop
def test_a_stopped_download_says_what_it_keeps(cli, workdir, monkeypatch, unstopped, number):
    from gpt2cli.remote import transfer

    def attempt(session, wanted):
        Path(f"{wanted.path}.part").write_bytes(b"12345")
        send(number)

    monkeypatch.setattr(transfer, "attempt", attempt)
    result = cli("download", "124M")
    assert result.returncode == STOPS[number]
    assert "models/124M keeps 5 bytes: run the same command again to resume" in result.stderr
    assert [path.suffix for path in Path("models/124M").iterdir()] == [".part"]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGHUP,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_is_saved_and_says_how_to_resume(cli, mini, monkeypatch, unstopped, number):
    from gpt2cli.training.step import Trainer

    def step(self, *arguments, real=Trainer.step):
        send(number)
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "step", step)
    result = cli("train", "text.txt", *FLAGS, "--steps", 9)
    assert result.returncode == STOPS[number]
    lines = result.stderr.splitlines()
    assert "finishing this step, then saving the run and stopping" in lines
    assert "run the same command again to resume" in lines
    assert runs.steps("checkpoint/run1") == [1]


def test_under_nohup_a_hangup_is_ignored(cli, prompts, stop_at_answer):
    stop_at_answer(signal.SIGHUP, nth=1)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert cli(*JOB, "--out", "out.jsonl").returncode == 0


def test_ctrl_c_in_an_interactive_session_only_stops_the_sample(cli, monkeypatch):
    from gpt2cli.inference.generator import LanguageModel

    def stream(self, *arguments):
        send(signal.SIGINT)
        yield "never"

    monkeypatch.setattr(signals, "SAME", 0)
    monkeypatch.setattr(LanguageModel, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    result = cli("interactive", *T)
    assert result.returncode == 0 and result.stderr.count("stopped\n") == 2


def test_a_library_that_hides_the_exception_of_a_signal_does_not_hide_the_stop(
    cli, prompts, monkeypatch, unstopped
):
    from gpt2cli.text import encoded

    def encode(*arguments):
        try:
            send(signal.SIGTERM)
        except BaseException:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(encoded, "encode", encode)
    result = cli("encode", "prompts.txt", "out.npz", *T)
    assert result.returncode == 143 and result.stderr.endswith("stopped by SIGTERM\n")


# --- signals, in a process of their own ---


class Program:
    """A Python process that prints "ready", to which signals are then sent."""

    def __init__(self, code, **options):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        prelude = "import hashlib, os, signal, sys, threading, time\n"
        prelude += "from gpt2cli import console, signals\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude + code],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            **options,
        )
        assert self.process.stdout.readline() == "ready\n"

    def send(self, *numbers, pause=0.0):
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(pause)

    def end(self):
        """Return the exit status and the rest of the output."""
        out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, out


SAVING = """
signals.SAME = 60
signals.install()
with signals.noted("saving") as stop:
    print("ready", flush=True)
    while not stop.received:
        time.sleep(0.01)
    for _ in range({}):
        time.sleep(0.01)
print("saved", stop.received)
"""


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM, 1)],
    ids=["timeout", "terminal", "systemd"],
)
def test_two_signals_at_once_are_one_request(numbers):
    """`timeout` sends its signal twice, a closing terminal too; systemd sends SIGHUP as well."""
    program = Program(SAVING.format(20))
    program.send(*numbers)
    status, out = program.end()
    assert status == 0 and re.fullmatch(r"saved \d+\n", out)


@pytest.mark.parametrize("first, second", [(15, 2), (1, 15), (2, 1)])
def test_a_second_signal_ends_at_once(first, second):
    """The libraries' work at exit, which may take long, is left out."""
    code = """
import atexit
from gpt2cli import cli
signals.SAME, signals.LEAVE = 0, 60
atexit.register(time.sleep, 60)
def run(words):
    with signals.noted("saving"):
        print("ready", flush=True)
        time.sleep(60)
cli._run = run
cli.main([])
"""
    program = Program(code, stderr=subprocess.STDOUT)
    program.send(first)
    assert program.process.stdout.readline() == "saving\n"
    program.send(second)
    name = {1: "SIGHUP", 2: "Ctrl-C", 15: "SIGTERM"}[second]
    assert program.end() == (128 + second, f"gpt2cli: stopped by {name}\n")


def test_a_second_signal_ends_a_call_that_ignores_signals():
    """As in a collective operation that waits for a host, or a long compilation."""
    # the thread can print only when the main thread lets it run, which it does in the call
    code = "signals.install()\nsys.setswitchinterval(1000)\ncalls = threading.Event()\n"
    code += "threading.Thread(target=lambda: calls.wait() and print('ready', flush=True)).start()\n"
    code += "calls.set()\nhashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    program = Program(code)
    program.send(signal.SIGTERM, pause=signals.SAME + 0.2)
    assert program.process.poll() is None
    for _ in range(100):  # on a busy machine the first may have been noticed only now
        program.send(signal.SIGTERM, pause=0.2)
        if program.process.poll() is not None:
            break
    assert program.end() == (143, "")


def test_a_reader_that_does_not_read_does_not_delay_a_stop():
    """As `train 2>&1 | less`, which reads no more than it shows."""
    reader, writer = os.pipe()
    code = "signals.install()\nwith signals.noted('saving') as stop:\n"
    code += "    print('ready', flush=True)\n"
    code += "    while not stop.received: console.say('x' * 1000)\n"
    code += "print('saved', console.lost.reason)"
    program = Program(code, stderr=writer)
    while select.select([], [writer], [], 0)[1]:  # until the pipe is full
        time.sleep(0.01)
    program.send(signal.SIGTERM)
    assert program.end() == (0, "saved nobody reads standard error\n")
    os.close(reader)
    os.close(writer)


def test_a_program_keeps_its_output_when_it_is_stopped():
    """Only a command, which ends, gives up an output that nobody takes."""
    reader, writer = os.pipe()
    code = "os.set_blocking(2, False)\nbefore = os.fstat(2)\n"
    code += "try:\n    while True: os.write(2, bytes(4096))\nexcept BlockingIOError: pass\n"
    code += "with signals.noted() as stop:\n    print('ready', flush=True)\n"
    code += "    while not stop.received: time.sleep(0.01)\n"
    code += "print(os.path.samestat(before, os.fstat(2)))"
    program = Program(code, stderr=writer)
    program.send(signal.SIGTERM)
    assert program.end() == (0, "True\n")
    os.close(reader)
    os.close(writer)


@pytest.fixture
def stopped_import(tmp_path):
    """The environment with a TensorFlow that gets a signal while it is loaded."""
    (tmp_path / "tensorflow.py").write_text(
        "import os, signal, sys, time, unittest.mock\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.1)\n"
        "except BaseException:\n    raise ImportError('initialization failed')\n"
        "sys.modules['tensorflow'] = unittest.mock.MagicMock(__version__='2.21.0')\n"
    )
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def test_a_signal_while_tensorflow_is_loaded_ends_the_command_afterwards(tmp_path, stopped_import):
    """TensorFlow's libraries would turn the exception into an ImportError."""
    (tmp_path / "text.txt").write_text("a text")
    words = ("train", "text.txt", "--model_name", "tiny", "--models_dir", ROOT / "models")
    result = subprocess.run(
        [sys.executable, "-m", "gpt2cli", *words],
        cwd=tmp_path,
        env=stopped_import,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert result.stderr.endswith("gpt2cli: stopped by Ctrl-C\n")


def test_a_program_keeps_its_own_handlers_while_tensorflow_is_loaded(stopped_import):
    code = "signal.signal(signal.SIGINT, lambda *_: print('own'))\nprint('ready', flush=True)\n"
    code += "import gpt2cli.tensorflow\nprint('loaded')"
    assert Program(code, env=stopped_import).end() == (0, "own\nloaded\n")


def test_a_program_that_runs_a_command_line_has_its_own_handlers_afterwards():
    """Else a second Ctrl-C would end it without a question, as in a notebook."""
    code = "from gpt2cli import cli\nnames = (1, 2, 15)\n"
    code += "look = lambda: ([signal.getsignal(n) for n in names], signal.set_wakeup_fd(-1),"
    code += " len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0)\n"
    code += "before, usual = look(), threading.active_count()\n"
    code += "print('ready', flush=True)\n"
    code += "try: cli.main(['nothing'])\nexcept SystemExit as end: print(end.code)\n"
    code += "while threading.active_count() > usual: time.sleep(0.01)\n"
    code += "print(look() == before)"
    program = Program(code, stderr=subprocess.DEVNULL)
    assert program.end() == (0, "2\nTrue\n")


def test_a_signal_that_a_program_handles_in_c_is_left_to_it(monkeypatch):
    """Python returns None for such a handler, and cannot set it again."""
    look, before = signal.getsignal, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with signals.noted():
        assert look(signal.SIGTERM) is before


def start(*words, **options):
    """Start a command as a user does in a terminal of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2cli", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        **options,
    )


def handles(process, number):
    """Whether a process has a handler for a signal (SigCgt in proc(5))."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(re.search(r"^SigCgt:\s*(\w+)", status, re.M)[1], 16)
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("stop", "status"), [(KeyboardInterrupt(), 130), (signals.Stopped(signal.SIGTERM), 143)]
)
def test_a_signal_before_the_command_line_is_read_is_a_stop_too(cli, monkeypatch, stop, status):
    def install():
        raise stop

    monkeypatch.setattr(signals, "install", install)
    result = cli("--help")
    assert result.returncode == status and "gpt2cli: stopped by" in result.stderr


@pytest.mark.slow
@each_stop
@pytest.mark.parametrize("group", [False, True], ids=["process", "terminal"])
def test_all_processes_of_a_job_stop_together(cli, prompts, number, group):
    Path("many.txt").write_text("".join(f"The kettle {i}\n" for i in range(4000)))
    words = ("sample", *T, "--prompts", "many.txt", "--format", "jsonl", "--seed", 5)
    process = start(*words, "--out", "out.jsonl", "--processes", 2, stderr=subprocess.PIPE)
    parts = [Path(f"out.jsonl.{k}-of-2.part") for k in (1, 2)]
    while not all(part.exists() and part.stat().st_size for part in parts):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number) if group else process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == STOPS[number], err
    assert re.search(r"out\.jsonl: [\d,]+ samples kept; run the same command again", err)
    assert not list(Path().glob(".*.lock"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says when a process handles signals")
@each_stop
@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_command_can_be_stopped_at_any_moment(cli, mini, number, command):
    """Before and while TensorFlow is loaded, and while the model is compiled."""
    (mini / "many.txt").write_text("The kettle\n" * 5000)
    words = ("sample", *T, "--prompts", "many.txt", "--format", "jsonl", "--out", "out.jsonl")
    if command == "train":
        words = ("train", "text.txt", *FLAGS, "--steps", 10**6, "--save_every", 10**6)
    for pause in np.linspace(0, 8, 16):
        process = start(*words, stderr=subprocess.PIPE)
        while not handles(process, signal.SIGHUP):  # Python is still being loaded
            assert process.poll() is None
        time.sleep(pause)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == STOPS[number], (pause, err)
        assert "Traceback" not in err and "Exception ignored" not in err, (pause, err)
        assert not list(mini.rglob("*.lock"))
    if command == "train":
        assert runs.steps("checkpoint/run1")


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["2>/dev/full", ">/dev/full 2>&1", ">&- 2>&-"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_job_of_several_processes_outlives_its_messages(prompts, redirect, count):
    words = " ".join(map(str, JOB))
    command = f"{sys.executable} -m gpt2cli {words} --out o.jsonl --processes {count} {redirect}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", command], env=environment).returncode == 0
    assert len([json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]) == 5

"""Several devices and hosts give the results of one, and end together."""

import concurrent.futures
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from gpt2cli.errors import UserError
from gpt2cli.model import network as model
from gpt2cli.storage import checkpoint, folders
from gpt2cli.tensorflow import tf
from gpt2cli.training import hosts as cluster

OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor")
SHORT = [
    # one device splits a batch in two parts, and rounds each as the two devices do
    {
        "precision": "bfloat16",
        "parts": 2,
        "clip_norm": 0.5,
        "on_nonfinite": "skip",
        "loss": "completion",
    },
]
LONG = [
    {"loss": "completion"},
    {"dropout": 0.1, "memory_saving_gradients": True},
    {"accumulate_gradients": 2, "clip_norm": 0.5, "on_nonfinite": "skip", "optimizer": "adafactor"},
    *({"optimizer": name} for name in OPTIMIZERS),
    {"accumulate_gradients": 2},
    {"precision": "bfloat16"},
    {"precision": "bfloat16", "memory_saving_gradients": True, "dropout": 0.1},
    {"memory_saving_gradients": True},
    {"dropout": 0.1},
    {"dropout": 0.1, "accumulate_gradients": 2, "memory_saving_gradients": True, "clip_norm": 1.0},
    {"on_nonfinite": "skip"},
    {"only_train_transformer_layers": True},
]


def in_parts(count):
    """Cases in which one device splits a batch into as many parts as there are devices."""
    return [{"precision": kind, "parts": count} for kind in ("float32", "bfloat16")]


def followed(count, cases, steps):
    asked = json.dumps([{"steps": steps} | case for case in cases])
    words = [sys.executable, "tests/follow.py", str(count), asked]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "count, cases, steps",
    [
        (2, SHORT, 10),
        *(pytest.param(n, LONG + in_parts(n), 50, marks=pytest.mark.slow) for n in (2, 3, 4)),
    ],
)
def test_losses_follow_those_of_one_device(count, cases, steps):
    for case, (one, many) in zip(cases, followed(count, cases, steps), strict=True):
        # bfloat16 rounds each device's part of a gradient before the sum. One device does the same
        # if it splits the batch, and does not if it computes the batch at once.
        whole = "parts" not in case
        most = 1e-3 if case.get("precision") == "bfloat16" and whole else 1e-5
        for name, alone, together in zip(("loss", "norm", "validation"), one, many, strict=True):
            difference = np.abs(np.subtract(alone, together)).max()
            assert difference < most * (10 if name == "norm" else 1), (case, name, difference)
        assert one[0][0] != one[0][-1]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 7, 5), (6, 3, 3), (8, 32, 48)])
def test_a_replica_drops_the_same_values_as_one_device(kind, shape):
    x = tf.cast(tf.random.stateless_normal(shape, [1, 2]), kind)
    whole, half = model.Dropout(0.3, [3, 4]).at(5)(x), shape[0] // 2
    parts = [
        model.Dropout(0.3, [3, 4], tf.constant(first)).at(5)(x[first : first + half])
        for first in (0, half)
    ]
    assert bool(tf.reduce_all(whole == tf.concat(parts, 0)))
    assert 0.1 < float(tf.reduce_mean(tf.cast(whole == 0, tf.float32))) < 0.5


def config(workers, kind="worker", index=0, **more):
    return json.dumps(
        {"cluster": {"worker": workers, **more}, "task": {"type": kind, "index": index}}
    )


@pytest.mark.parametrize(
    "strategy, text, expected",
    [
        ("auto", None, (1, True)),
        ("auto", "", (1, True)),
        ("auto", "{}", (1, True)),
        ("auto", config(["a:1"]), (1, True)),
        ("auto", config(["a:1", "b:1"]), (2, True)),
        ("auto", config(["a:1", "b:1"], index=1), (2, False)),
        ("multiworker", config(["a:1", "b:1"], index=1), (2, False)),
        ("multiworker", config(["a:1"], chief=["c:1"]), (2, False)),
        ("multiworker", config(["a:1"], "chief", chief=["c:1"]), (2, True)),
        ("one", config(["a:1", "b:1"], index=1), (1, True)),
        ("mirrored", config(["a:1", "b:1"], index=1), (1, True)),
        ("multiworker", None, "TF_CONFIG"),
        ("multiworker", '{"environment": "cloud"}', "names none"),
        ("auto", '{"environment": "cloud"}', (1, True)),
        ("auto", config(["a:1"], ps=["p:1"]), "form"),
        ("auto", config(["a:1"], chief=["c:1", "d:1"]), "form"),
        ("auto", config("a:1"), "form"),
        ("auto", "nonsense", "form"),
        ("auto", "[]", "form"),
        ("auto", config(["a:1"], index=1), "form"),
        ("auto", config(["a:1", "b:1"], index=-1), "form"),
        ("auto", config(["a:1", "a:1"]), "form"),
        ("auto", config(["a:1", "b"]), "form"),
        ("auto", config(["a:1", "b:99999"]), "form"),
        ("auto", config(["[::1]:1", "b:1"]), (2, True)),
        ("auto", config(["a:1"], index="x"), "form"),
        ("auto", config(["a:1", "b:1"], index="1"), (2, False)),
        *(
            ("auto", config(["a:1", "b:1"], index=index), "form")
            for index in (True, 1.5, float("inf"), None, [1], "9" * 5000, "\u0661", 10**20)
        ),
        ("auto", config(["a:1"], "evaluator"), "form"),
        ("auto", config(7), "form"),
    ],
)
def test_the_hosts_are_those_of_tf_config(monkeypatch, strategy, text, expected):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            cluster.of_strategy(strategy)
    else:
        assert cluster.of_strategy(strategy)[:2] == expected


def in_thread(function, *arguments):
    """Call a function in a thread that does not outlive the tests; return its Future."""
    future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


@contextlib.contextmanager
def answering(address, answer):
    """A program that listens on HOST:PORT and answers each call with these bytes."""
    is_over = threading.Event()
    host, _, port = address.partition(":")

    def serve():
        while not is_over.is_set():
            with contextlib.suppress(OSError):
                caller, _ = server.accept()
                with caller:
                    caller.sendall(answer)

    with socket.create_server((host, int(port))) as server:
        server.settimeout(0.1)
        done = in_thread(serve)
        try:
            yield
        finally:
            is_over.set()
            done.result(20)


HTTP2 = b"\x00\x00\x18\x04\x00\x00\x00\x00"  # the first bytes of TensorFlow's server


class Meeting:
    """Hosts on free ports of this machine, each a thread, that meet and then run a server."""

    def __init__(self, count):
        self.addresses = [f"localhost:{port}" for port in free_ports(count)]
        self.printed = [[] for _ in range(count)]
        self.all_met = threading.Barrier(count)

    def start(self, number):
        """Start a host; its lines go to `printed`."""

        def work():
            own, others = self.addresses[number], list(self.addresses)
            others.remove(own)
            hosts = cluster.Cluster(len(others) + 1, number == 0, own, tuple(others))
            cluster.meet(hosts, self.printed[number].append)
            with answering(own, HTTP2):
                self.all_met.wait(20)

        return in_thread(work)

    def says(self, number, *missing):
        """Wait until a host's last line names these hosts."""
        line = f"waiting for {', '.join(self.addresses[host] for host in missing)}"
        wait_for(lambda: self.printed[number][-1:] == [line])


def test_hosts_wait_for_each_other_and_name_the_missing_ones():
    meeting = Meeting(3)
    hosts = [meeting.start(0)]
    meeting.says(0, 1, 2)
    hosts.append(meeting.start(1))
    meeting.says(0, 2)
    meeting.says(1, 2)
    assert not any(host.done() for host in hosts)
    hosts.append(meeting.start(2))
    assert [host.result(20) for host in hosts] == [None] * 3


def test_a_host_that_ended_is_missing_again_and_may_restart():
    meeting = Meeting(3)
    first = meeting.start(0)
    with answering(meeting.addresses[1], cluster.GREETING):
        meeting.says(0, 2)
    meeting.says(0, 1, 2)
    assert [host.result(20) for host in (meeting.start(1), meeting.start(2), first)] == [None] * 3


@pytest.mark.parametrize(
    "answer", [b"", b"\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH\r\n", b"gpt"]
)
def test_another_program_on_a_port_is_not_a_host(answer):
    meeting = Meeting(2)
    with answering(meeting.addresses[1], answer):
        first = meeting.start(0)
        meeting.says(0, 1)
        time.sleep(2 * cluster.PAUSE)
        assert not first.done()
    assert meeting.start(1).result(20) is first.result(20) is None


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 200_000])
def test_other_callers_do_not_disturb_the_hosts(noise):
    meeting = Meeting(2)
    first = meeting.start(0)
    meeting.says(0, 1)
    host, _, port = meeting.addresses[0].partition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            caller = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            with contextlib.suppress(ConnectionError):
                caller.sendall(noise)
        assert meeting.start(1).result(20) is first.result(20) is None


def test_a_host_in_tensorflow_has_met_the_others():
    """A host that comes late finds TensorFlow's server, which does not send our greeting."""
    first, second = (f"localhost:{port}" for port in free_ports(2))
    code = (
        "import tensorflow as tf, time; "
        f"server = tf.distribute.Server({{'worker': [{first!r}]}}); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as server:
        try:
            late = cluster.Cluster(2, False, second, (first,))
            assert in_thread(cluster.meet, late, print).result(60) is None
            assert server.poll() is None
        finally:
            server.kill()


def test_a_port_of_this_host_that_is_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        own = f"127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"port {port} for {own}, .* in TF_CONFIG: .* in use"):
            cluster.meet(cluster.Cluster(2, True, own, ("127.0.0.1:1",)), pytest.fail)


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_host_that_waits_for_others_can_be_ended(place, which):
    with Hosts(2, *FLAGS, "--run_name", "run") as hosts:
        hosts.processes[1].kill()
        wait_for(lambda: "waiting for 127.0.0.1:" in hosts.said(0))
        hosts.processes[0].send_signal(which)
        assert hosts.wait(10)[0] == 128 + which


COMPARING = """
import json, os, sys
number, port, devices, fields = json.loads(sys.argv[1])
workers = [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
task = {"type": "worker", "index": number}
os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
from gpt2cli.training.devices import Replicas, tf
from gpt2cli.training.hosts import of_strategy
from gpt2cli.errors import UserError
from tensorflow.python.distribute import collective_all_reduce_strategy as strategy
# as many CPUs as a host might have GPUs
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
strategy.CollectiveAllReduceExtended._initialize_local_devices = lambda self, resolver, worker: (
    tuple(f"{worker}/device:CPU:{number}" for number in range(devices)), "CPU")
try:
    print(Replicas("multiworker", of_strategy("multiworker")).compare(fields))
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices, other, expected",
    [
        ((1, 1), {"--a": 1, "--b": [2, "x"]}, ("None", "None")),
        (
            (2, 2),
            {"--a": 1, "--b": [3, "x"]},
            (r"in --b \(\[2, 'x'\] on", r"in --b \(\[3, 'x'\] on"),
        ),
        ((1, 2), {"--a": 1, "--b": [2, "x"]}, ("number of GPUs", "number of GPUs")),
    ],
)
def test_hosts_that_differ_report_the_field(devices, other, expected):
    port = free_ports(1)[0]
    asked = [(0, port, devices[0], {"--a": 1, "--b": (2, "x")}), (1, port, devices[1], other)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        hosts = []
        for one in asked:
            words = [sys.executable, "-c", COMPARING, json.dumps(one)]
            hosts.append(subprocess.Popen(words, env=environment, stdout=-1, stderr=-3, text=True))
            stack.callback(hosts[-1].kill)
        for host, words in zip(hosts, expected, strict=True):
            printed = host.communicate(timeout=120)[0]
            assert re.search(words, printed) and "--a" not in printed, printed


TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 80
FLAGS = ("text.txt", "--model_name", "tiny", "--seq_length", 32, "--learning_rate", 0.001)
FLAGS += ("--sample_every", 0, "--print_every", 1)


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [listener.getsockname()[1] for listener in listeners]


class Hosts:
    """Processes of one training, each with its TF_CONFIG.

    Args:
        count: number of hosts.
        words: arguments of `train` for all hosts.
        own: further arguments of one host, by its number.
        spaces: the network namespace and the address of each host.
    """

    def __init__(self, count, *words, own=None, spaces=()):
        addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
        addresses = [f"{address}:2222" for _, address in spaces] or addresses
        self.logs = [Path(f"host{index}.log").absolute() for index in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            command = ["ip", "netns", "exec", spaces[index][0]] if spaces else []
            command += [sys.executable, "-m", "gpt2cli", "train", *map(str, words)]
            command += map(str, (own or {}).get(index, ()))
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            environment["TF_CONFIG"] = config(addresses, index=index)
            with open(log, "w") as file:
                one = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            self.processes.append(one)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self.processes:
            one.kill()
            one.wait()

    def said(self, index):
        """Return the log of a host."""
        return self.logs[index].read_text()

    def wait(self, seconds=120):
        """Return the exit statuses of all hosts."""
        until = time.monotonic() + seconds
        return [one.wait(max(0.1, until - time.monotonic())) for one in self.processes]

    def until_step(self, step):
        """Wait until the chief has printed a step."""
        while not re.search(rf"^\[{step} \|", self.said(0), re.M):
            assert all(one.poll() is None for one in self.processes), self.said(0)
            time.sleep(0.1)


def losses_of(run):
    lines = [json.loads(line) for line in Path(f"checkpoint/{run}/log.jsonl").open()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture
def place(workdir):
    (workdir / "text.txt").write_text(TEXT)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_hosts_train_as_one_does_and_resume_with_another_number(cli, place, count):
    more = ("--val_dataset", "text.txt", "--val_every", 4, "--val_batch_count", 3)
    more += ("--dropout", 0.1, "--seed", 5)

    def alone(run, steps):
        words = (*FLAGS, *more, "--batch_size", 6, "--run_name", run, "--steps", steps)
        assert cli("train", *words).returncode == 0

    def together(steps):
        words = (*FLAGS, *more, "--batch_size", 6 // count, "--run_name", "many", "--steps", steps)
        with Hosts(count, *words) as hosts:
            assert hosts.wait() == [0] * count
            said = f"{count} devices on {count} hosts: a global batch of 6 x 32, 192 tokens"
            assert said in hosts.said(0)
            assert all("loss=" not in hosts.said(index) for index in range(1, count))

    alone("one", 8)
    together(4)
    alone("many", 6)
    together(8)
    one, many = losses_of("one"), losses_of("many")
    assert list(one) == list(many) == list(range(1, 9))
    np.testing.assert_allclose(list(many.values()), list(one.values()), atol=1e-5)
    both = [
        checkpoint.load(folders.find_checkpoint(f"checkpoint/{run}")) for run in ("one", "many")
    ]
    for name, weight in both[0].weights.items():
        np.testing.assert_allclose(both[1].weights[name], weight, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_asking_any_host_to_stop_stops_all_with_a_checkpoint(place, number, which):
    with Hosts(2, *FLAGS, "--run_name", "run", "--seed", 1) as hosts:
        hosts.until_step(5)
        hosts.processes[number].send_signal(which)
        statuses = hosts.wait()
        assert statuses[number] == 128 + which and statuses[1 - number] == 75
        assert "another host was asked to stop" in hosts.said(1 - number)
        (step,) = re.findall(r"saved checkpoint/run at step (\d+)", hosts.said(0))
    assert folders.find_checkpoint("checkpoint/run").name == f"model-{step}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_host_that_is_killed_stops_the_others_and_all_resume_later(cli, place, number):
    flags = (*FLAGS, "--seed", 1, "--save_every", 5)
    with Hosts(2, *flags, "--run_name", "run") as hosts:
        hosts.until_step(12)
        hosts.processes[number].kill()
        began = time.monotonic()
        assert hosts.processes[1 - number].wait(60) == 1
        assert time.monotonic() - began < 40  # the documented limit
        assert re.search(r"^gpt2cli: lost contact with ", hosts.said(1 - number), re.M)
        assert "Traceback" not in hosts.said(1 - number)
    before = losses_of("run")
    saved = int(folders.find_checkpoint("checkpoint/run").name.removeprefix("model-"))
    assert saved >= 10
    with Hosts(2, *flags, "--run_name", "run", "--steps", saved + 5) as hosts:
        assert hosts.wait() == [0, 0]
    last = ("--steps", saved + 5, "--run_name", "one", "--batch_size", 2)
    assert cli("train", *flags, *last).returncode == 0
    one, many = losses_of("one"), losses_of("run")
    assert list(many) == list(one)
    np.testing.assert_allclose(list(many.values()), list(one.values()), atol=1e-5)
    both = [step for step in before if step in many]
    assert all(before[step] == pytest.approx(many[step], abs=1e-5) for step in both)


@pytest.mark.slow
def test_a_host_of_a_finished_run_does_not_wait(cli, place):
    assert cli("train", *FLAGS, "--run_name", "run", "--steps", 2).returncode == 0
    with Hosts(2, *FLAGS, "--run_name", "run", "--steps", 2) as hosts:
        hosts.processes[1].kill()
        assert hosts.processes[0].wait(60) == 0
        assert "step 2 and --steps is 2: nothing to do" in hosts.said(0)


LONG_VALIDATION = ("--val_dataset", "text.txt", "--val_every", 5, "--val_batch_count", 10**6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_hosts_end_in_the_middle_of_a_validation(cli, place, number):
    """A host that is asked to stop saves the run and ends all; a killed one ends the other."""
    for which, own, other in ((signal.SIGTERM, 143, 75), (signal.SIGKILL, -9, 1)):
        flags = (*FLAGS, "--run_name", f"run{which}", "--seed", 1)
        assert cli("train", *flags, "--steps", 1).returncode == 0  # at step 0 there is one, too
        with Hosts(2, *flags, *LONG_VALIDATION) as hosts:
            hosts.until_step(5)
            time.sleep(3)
            hosts.processes[number].send_signal(which)
            statuses = hosts.wait(60)
            assert (statuses[number], statuses[1 - number]) == (own, other)
            assert "Traceback" not in hosts.said(1 - number)
            if which == signal.SIGTERM:
                assert f"saved checkpoint/run{which} at step 5" in hosts.said(0)
            else:
                assert "lost contact with" in hosts.said(1 - number)


@pytest.mark.slow
def test_hosts_with_different_work_are_rejected(cli, place):
    """Without --seed, which the chief would draw."""
    shutil.copy("text.txt", "other.txt")
    with open("other.txt", "a") as file:
        file.write("more")
    assert cli("train", *FLAGS, "--run_name", "run", "--steps", 1).returncode == 0
    for own, said in (
        ({0: ["--dataset", "text.txt"], 1: ["--dataset", "other.txt"]}, "checksum of the text ("),
        ({n: ["text.txt", "--run_name", "run", "--checkpoint_dir", n] for n in (0, 1)}, None),
        (
            {n: ["text.txt", "--run_name", "run", *(n * ["--batch_size", 2])] for n in (0, 1)},
            "--batch_size (",
        ),
    ):
        if said is None:  # a folder that is not shared
            shutil.copytree("checkpoint", "0")
            said = "the checkpoint to resume"
        with Hosts(2, *FLAGS[1:], "--steps", 3, own=own) as hosts:
            assert hosts.wait() == [1, 1]
            for number in (0, 1):
                assert "the hosts differ in" in hosts.said(number)
                assert said in hosts.said(number) and "Traceback" not in hosts.said(number)


@pytest.mark.slow
def test_no_host_succeeds_if_the_first_cannot_save(place):
    """The limit on file sizes is below a checkpoint's."""
    with Hosts(2, *FLAGS, "--run_name", "run", "--seed", 1, "--steps", 100) as hosts:
        hosts.until_step(2)
        resource.prlimit(hosts.processes[0].pid, resource.RLIMIT_FSIZE, (10**5, 10**5))
        assert hosts.wait() == [1, 1]
        assert "Step 100 is not saved" in hosts.said(0)
        assert "step 100 is not saved; check the log of the first host" in hosts.said(1)
        assert "crashed" not in hosts.said(0) + hosts.said(1)


@pytest.fixture
def spaces():
    """Two network namespaces with a cable between them, if this machine allows it."""
    names = [f"gpt2cli-{os.getpid()}-{end}" for end in "ab"]
    ends = [f"g{os.getpid() % 10**6}{end}" for end in "ab"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True).returncode

    if not shutil.which("ip") or any(ip("netns", "add", name) for name in names):
        pytest.skip("no network namespace can be made here")
    try:
        assert ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]) == 0
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")

        def cable(state):
            assert ip("-n", names[1], "link", "set", ends[1], state) == 0

        yield list(zip(names, ("10.77.0.1", "10.77.0.2"), strict=True)), cable
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_hosts_that_lose_the_network_stop_and_resume_when_it_is_back(place, spaces):
    places, cable = spaces
    flags = (*FLAGS, "--seed", 1, "--save_every", 5, "--run_name", "run")
    with Hosts(2, *flags, spaces=places) as hosts:
        hosts.until_step(12)
        cable("down")
        began = time.monotonic()
        assert hosts.wait(90) == [1, 1]
        assert time.monotonic() - began < 60  # the documented limit
        for index in (0, 1):
            assert re.search(r"^gpt2cli: lost contact with ", hosts.said(index), re.M)
    before = losses_of("run")
    cable("up")
    with Hosts(2, *flags, "--steps", 18, spaces=places) as hosts:
        assert hosts.wait() == [0, 0]
    after = losses_of("run")
    assert list(after) == list(range(1, 19))
    both = [step for step in before if step in after]
    assert all(before[step] == pytest.approx(after[step], abs=1e-5) for step in both)

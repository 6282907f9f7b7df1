"""What a training step costs on many devices: a model of it, and a check on this machine.

    benchmarks/scaling.py table                # the tables of docs/scaling.md
    benchmarks/scaling.py check MODEL_FOLDER   # 1 to 4 processes of this machine beside the model

The formulas are explained in docs/scaling.md.
"""

import contextlib
import itertools
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gpt2cli.model.sizes import PRESETS, ModelConfig  # noqa: E402
from gpt2cli.model.weights import weight_shapes  # noqa: E402

SIZES = ("124M", "355M", "774M", "1558M")
COUNTS = (1, 2, 4, 8, 16, 32, 64)


class Link(NamedTuple):
    """A way between devices: bytes a second in one direction, seconds until the first comes."""

    bandwidth: float
    latency: float


class Device(NamedTuple):
    """flops: a second, that a training step reaches in matrix products; memory: bytes."""

    flops: float
    memory: float


def config_of(size):
    """The ModelConfig of a released size."""
    n_layer, n_head, n_embd = PRESETS[size]
    return ModelConfig(50257, 1024, n_embd, n_head, n_layer)


def parameters(config):
    """Weights, and those of them that take part in products: all but the position table."""
    count = {name: math.prod(shape) for name, shape in weight_shapes(config).items()}
    return sum(count.values()), sum(count.values()) - list(count.values())[1]


def flops(config, batch, length):
    """Of a step on one device: forward and backward, half of the attention's square."""
    _, used = parameters(config)
    attention = config.n_layer * config.n_embd * length
    return 6 * batch * length * (used + attention)


def traffic(config, count):
    """Bytes that each device sends, and messages in a row, to sum float32 gradients in a ring."""
    total, _ = parameters(config)
    return 2 * (count - 1) / count * 4 * total, 2 * (count - 1)


def step_seconds(config, batch, length, device, link, count):
    """Computing, and summing gradients after it: nothing of the two at once."""
    sent, messages = traffic(config, count)
    return flops(
        config, batch, length
    ) / device.flops, sent / link.bandwidth + messages * link.latency


def training_bytes(config, batch, length, bfloat16=True):
    """Weights, gradients, Adam's moments in float32, and what is kept for the backward pass."""
    total, _ = parameters(config)
    number = 2 if bfloat16 else 4
    tokens = batch * length
    layer = tokens * number * (21 * config.n_embd + config.n_head * length * 5 / 8)
    return 16 * total + (2 * total if bfloat16 else 0) + layer * config.n_layer


DEVICE = Device(120e12, 80e9)  # a GPU of 312 TFLOP/s in bfloat16, of which 0.4 are reached
LINKS = (  # and batches whose gradients are summed before they are sent
    ("in the host, NVLink, 200 GB/s", Link(200e9, 1e-5), 1),
    ("in the host, PCIe 4, 20 GB/s", Link(20e9, 1e-5), 1),
    ("100 Gbit/s", Link(12.5e9, 2e-5), 1),
    ("10 Gbit/s", Link(1.25e9, 5e-5), 1),
    ("in the host, PCIe 4, `--accumulate_gradients 16`", Link(20e9, 1e-5), 16),
    ("100 Gbit/s, `--accumulate_gradients 16`", Link(12.5e9, 2e-5), 16),
    ("10 Gbit/s, `--accumulate_gradients 16`", Link(1.25e9, 5e-5), 16),
)


def share(size, link, batches, count):
    """Of perfect scaling, with `batches` of 8 x 1,024 in a step of each device."""
    work, wait = step_seconds(config_of(size), 8 * batches, 1024, DEVICE, link, count)
    return work / (work + wait)


def table():
    """The tables of docs/scaling.md, and by how much the second differs between the sizes."""
    print("| size | weights, millions | FLOP a step | to send (64 devices), MB | memory, GB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for size in SIZES:
        config = config_of(size)
        total, _ = parameters(config)
        work, sent = flops(config, 8, 1024), traffic(config, 64)[0]
        memory = training_bytes(config, 8, 1024)
        row = f"{total / 1e6:,.0f} | {work:.2e} | {sent / 1e6:,.0f} | {memory / 1e9:,.1f}"
        print(f"| {size} | {row} |")
    print("\n| link between devices | " + " | ".join(map(str, COUNTS)) + " |")
    print("| --- |" + " ---: |" * len(COUNTS))
    apart = 0.0
    for name, link, batches in LINKS:
        cells = [[share(size, link, batches, count) for count in COUNTS] for size in SIZES]
        print(f"| {name} | " + " | ".join(f"{one:.0%}" for one in cells[1]) + " |")
        apart = max(apart, *(max(column) - min(column) for column in zip(*cells, strict=True)))
    print(f"\nof 355M; the sizes differ by no more than {100 * apart:.1f} points")


def free_ports(count):
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in made]


def measured(folder, text, count, steps=8):
    """Seconds a step of `count` processes, each on one core, 2 x 128 tokens; the median."""
    workers = [f"127.0.0.1:{port}" for port in free_ports(count)]
    processes = []
    with tempfile.TemporaryDirectory() as place:
        for index in range(count):
            words = ["train", text, "--models_dir", folder.parent, "--model_name", folder.name]
            words += ["--checkpoint_dir", place, "--sample_dir", place, "--batch_size", 2]
            words += ["--seq_length", 128, "--steps", steps, "--sample_every", 0, "--seed", 1]
            core = ["taskset", "-c", str(index % os.cpu_count())]
            command = [*core, sys.executable, "-m", "gpt2cli", *map(str, words)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            if count > 1:
                task = {"type": "worker", "index": index}
                environment["TF_CONFIG"] = json.dumps(
                    {"cluster": {"worker": workers}, "task": task}
                )
            with open(Path(place) / f"log{index}", "w") as log:
                processes.append(subprocess.Popen(command, env=environment, stderr=log, stdout=log))
        ended = [one.wait() for one in processes]  # if one ends badly, the others do
        said = (Path(place) / "log0").read_text()
        assert ended == [0] * count, said
    times = [float(found) for found in re.findall(r"^\[\d+ \| ([\d.]+)\]", said, re.M)]
    return statistics.median(b - a for a, b in itertools.pairwise(times[1:]))


def check(folder):
    """Measure, and print beside the model, whose two numbers come from one and two processes."""
    config = ModelConfig.from_json((folder / "hparams.json").read_text())
    with tempfile.TemporaryDirectory() as place:
        text = Path(place) / "text.txt"
        text.write_text((ROOT / "README.md").read_text() * 4)
        seconds = {count: measured(folder, text, count) for count in (1, 2, 3, 4)}
    sent = {count: traffic(config, count)[0] for count in seconds}
    bandwidth = sent[2] / (seconds[2] - seconds[1])
    cores = os.cpu_count()
    print("| processes | measured, s | computing | summing | model, s | of the measured |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for count, found in seconds.items():
        work = seconds[1] * -(-count // cores)  # more processes than cores take turns
        wait = sent[count] / bandwidth * max(1, count / cores)  # which also copy the bytes
        total = work + wait
        row = f"{found:.2f} | {work:.2f} | {wait:.2f} | {total:.2f} | {total / found:.2f}"
        print(f"| {count} | {row} |")
    print(f"\n{bandwidth / 1e9:.2f} GB/s between two processes, {sent[2] / 1e6:,.0f} MB sent")


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        table()
    elif len(sys.argv) == 3 and sys.argv[1] == "check":
        check(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)

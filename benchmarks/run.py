#!/usr/bin/env python3
"""Speed and memory of a 124M model with random weights: training, sampling, encoding.

    python benchmarks/run.py [--steps 20] [--length 1000] [--batch_size 1]

Each job is a process of its own, whose peak memory the operating system reports. Figures of a
shared machine are noisy: compare those of one run with each other.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
MAKE = """
from pathlib import Path
from gpt2cli import checkpoint, model
from gpt2cli.config import ModelConfig
sizes = ModelConfig(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)
checkpoint.save(model.GPT2(sizes, model.random_weights(sizes)), Path("models/random"))
"""
SAMPLE = """
import json, sys, time
import gpt2cli
length, rows, precision = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
started = time.perf_counter()
model = gpt2cli.load_model("models/random", precision)
ready = time.perf_counter()
prompts = [[row] * 8 for row in range(rows)]
seconds = []
for seed in (1, 2):
    begun = time.perf_counter()
    samples = model.generate(prompts, length=length, batch_size=rows, seed=seed)
    seconds.append(time.perf_counter() - begun)
    assert all(len(sample.tokens) == length for sample in samples)
print(json.dumps({"ready": ready - started, "seconds": seconds}))
"""


def run(*words, cwd):
    """Run a process; returns (standard output, standard error, peak memory in GB)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=cwd, env=environment, stdout=out, stderr=err
        )
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        err.seek(0)
        if status:
            raise SystemExit(f"{' '.join(words)} failed:\n{err.read()}")
        return out.read(), err.read(), usage.ru_maxrss / 1e6


def sampling(folder, length, rows, precision="float32"):
    """A line about one batch of samples."""
    out, _, memory = run("-c", SAMPLE, str(length), str(rows), precision, cwd=folder)
    found = json.loads(out)
    first, second = (rows * length / s for s in found["seconds"])
    return (
        f"sample, {precision}, batch {rows} x {length}: {second:7.1f} tokens/s  "
        f"({first:.1f} with compiling, model ready in {found['ready']:.1f} s)  peak {memory:.2f} GB"
    )


def training(folder, steps, *flags):
    """A line about some steps at sequence length 1,024."""
    words = (
        "-m",
        "gpt2cli",
        "train",
        "tokens.npz",
        "--model_name",
        "random",
        "--steps",
        str(steps),
    )
    words += ("--sample_every", "0", "--restore_from", "fresh", "--overwrite", *flags)
    _, err, memory = run(*words, cwd=folder)
    lines = [line for line in err.splitlines() if " loss=" in line]
    speeds = [float(line.split()[-2]) for line in lines][1:]  # the first step traces the graph
    losses = [line.split()[3].removeprefix("loss=") for line in (lines[0], lines[-1])]
    return (
        f"train, 1 x 1024 {' '.join(flags)}: median {statistics.median(speeds):.1f} tokens/s  "
        f"loss {losses[0]} -> {losses[1]} in {steps} steps  peak {memory:.2f} GB"
    )


def main():
    """Make the model, run the jobs, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=1000)
    options = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("tensorflow", "numpy"))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {versions}")
    with tempfile.TemporaryDirectory() as folder:
        run("-c", MAKE, cwd=folder)
        tokens = np.random.default_rng(0).zipf(1.3, 200_000) % 50257
        np.savez(Path(folder) / "tokens.npz", tokens.astype(np.uint16))
        print(sampling(folder, options.length, 1), flush=True)
        print(sampling(folder, 128, 8), flush=True)
        print(training(folder, options.steps, "--memory_saving_gradients"), flush=True)
        print(training(folder, options.steps), flush=True)


if __name__ == "__main__":
    main()

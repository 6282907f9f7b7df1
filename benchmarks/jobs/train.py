"""Tokens per second of training steps; a process of its own each time, one at a time."""

import contextlib
import statistics

import process
from convert import N_CTX
from tools import OWN

WARM_UP = 2  # steps that do not count


def run(session):
    """Measure every tool that trains."""

    def one(pair, number):
        tool, kind = pair
        steps = WARM_UP + session.options.steps
        if tool in OWN:
            rates, peak = ours(session, tool, kind, steps)
        else:
            with contextlib.closing(session.worker(tool, kind)) as worker:
                reply = worker.ask("train", steps=steps, length=N_CTX)
                rates = [N_CTX / seconds for seconds in reply["value"]]
                peak = process.peak(worker.pid)
        return {"rate": statistics.median(rates[WARM_UP:]), "peak": peak}

    pairs = session.pairs(of="trains")
    formats = session.prepare("124M", [(tool, "float32") for tool in dict(pairs)])
    pairs = [pair for pair in pairs if pair[0] in dict(formats)]
    session.rounds("train", f"1 x {N_CTX}", pairs, one)


def ours(session, tool, kind, steps):
    """Run `gpt2cli train`: (tokens per second of each step, peak GB)."""
    words = ["tokens.npz", "--model_name", "random", "--steps", steps, "--sample_every", 0]
    words += ["--restore_from", "fresh", "--overwrite", "--precision", kind.partition(",")[0]]
    words += ["--memory_saving_gradients"] if "recomputed" in kind else []
    folder = session.folder / "124M"
    _, peak, _, said = session.run(tool, "-m", "gpt2cli", "train", *words, cwd=folder)
    return [float(line.split()[-2]) for line in said.splitlines() if " loss=" in line], peak

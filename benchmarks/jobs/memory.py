"""Memory of the whole process after loading and one token, which touches every weight."""

import contextlib
import time

import process

from jobs.generate import PROMPT


def run(session):
    """Measure every tool in every precision."""
    measure(session, session.prepare("124M", session.pairs()))


def measure(session, pairs, size="124M"):
    """Load each model alone, once a round."""

    def one(pair, number):
        with contextlib.closing(session.worker(*pair, size)) as worker:
            worker.ask("generate", prompts=[[1] * PROMPT], length=1, greedy=True, seed=0)
            time.sleep(1)  # allocators return memory a little later
            return process.memory(worker.pid)

    session.rounds("memory", "after loading", pairs, one, size, warm_up=True)

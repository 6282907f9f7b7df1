"""The work of reading a prefix once, and of 32 requests that share it."""

import contextlib
import time

import numpy as np
from convert import N_VOCAB
from session import REST
from tools import OWN

SHARED, REQUESTS = 512, 32
CASE = f"{SHARED} shared tokens"
ONE, MANY = "1 request", f"{REQUESTS} requests"


def run(session):
    """Measure ours and the base version; each call has a new prefix and one more token a row."""
    pairs = session.prepare("124M", session.pairs(("float32", "int8"), OWN))
    with contextlib.ExitStack() as stack:
        workers = {}
        for pair in pairs:
            workers[pair] = stack.enter_context(contextlib.closing(session.worker(*pair)))

        def one(pair, number):
            kind, _, requests = pair[1].partition(", ")
            rows = 1 if requests == ONE else REQUESTS
            draw = np.random.default_rng([number, rows])
            prefix = draw.integers(0, N_VOCAB, SHARED).tolist()
            prompts = [[*prefix, int(last)] for last in draw.permutation(N_VOCAB)[:rows]]
            time.sleep(REST)
            reply = workers[pair[0], kind].ask(
                "generate", prompts=prompts, length=1, greedy=True, seed=0
            )
            return {"seconds": reply["seconds"], "cpu": reply["cpu"]}

        lines = [(t, f"{k}, {requests}") for t, k in pairs for requests in (ONE, MANY)]
        session.rounds("prefix", CASE, lines, one, warm_up=True)

"""Prompt look-up, on and off, for one row of text that repeats itself, and that does not."""

import contextlib
import time

import numpy as np
from convert import N_VOCAB
from session import REST
from worker import Failed

SWITCH = ("off", "on")
LENGTH, REPEATED, TIMES = 256, 16, 8  # new tokens; tokens that the prompt repeats, and how often
CASES = {  # -> repeats in the prompt, settings; a random model repeats itself with temperature 0
    "repetitive text": (TIMES, {"greedy": True}),
    "nothing to find": (1, {"greedy": False}),
    "misleading text": (TIMES, {"greedy": False, "top_k": 4}),
}


def run(session):
    """Measure ours with and without; both must give the same tokens."""
    found = session.prepare("124M", session.pairs(("float32", "int8"), ("ours",)))
    pairs = [(tool, f"{kind}, look-up {switch}") for tool, kind in found for switch in SWITCH]
    ids = np.random.default_rng(0).integers(0, N_VOCAB, REPEATED).tolist()
    with contextlib.ExitStack() as stack:
        workers = {}
        for pair in pairs:
            try:
                workers[pair] = stack.enter_context(contextlib.closing(session.worker(*pair)))
            except Failed as error:
                if "no prompt look-up" not in str(error):
                    raise
                session.skipped.append(f"lookup ({error})")
                return
        for case, (times, settings) in CASES.items():
            tokens = {}

            def one(pair, number, settings=settings, times=times, tokens=tokens):
                time.sleep(REST)
                asked = {"prompts": [ids * times], "length": LENGTH, "seed": number, **settings}
                reply = workers[pair].ask("generate", **asked)
                key = (pair[1].partition(",")[0], number)
                if tokens.setdefault(key, reply["value"]) != reply["value"]:
                    raise Failed("the tokens differ from those without look-up")
                return {"rate": LENGTH / reply["seconds"], "cpu": reply["cpu"]}

            session.rounds("lookup", case, pairs, one, warm_up=True)

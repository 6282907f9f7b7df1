"""Prompt look-up, on and off, for one row of text that repeats itself, and that does not."""

import contextlib
import time

import numpy as np
from convert import N_VOCAB
from session import REST, say
from worker import Failed

LENGTH, REPEATED, TIMES = 256, 16, 8  # new tokens; tokens that the prompt repeats, and how often
CASES = {  # -> repeats in the prompt, settings; a random model repeats itself with temperature 0
    "repetitive text": (TIMES, {"greedy": True}),
    "nothing to find": (1, {"greedy": False}),
    "misleading text": (TIMES, {"greedy": False, "top_k": 4}),
}


def run(session):
    """Measure ours with and without; both must give the same tokens."""
    pairs = session.prepare("124M", session.pairs(("float32", "int8"), ("ours",)))
    ids = np.random.default_rng(0).integers(0, N_VOCAB, REPEATED).tolist()
    with contextlib.ExitStack() as stack:
        workers = {}
        for pair in pairs:
            workers[pair] = stack.enter_context(contextlib.closing(session.worker(*pair)))
        try:
            for worker in workers.values():
                worker.ask("generate", prompts=[ids], length=1, greedy=True, seed=0, lookup=False)
        except Failed as error:
            say(f"lookup: {error}")
            session.skipped.append(f"lookup ({error})")
            return
        for case, (times, settings) in CASES.items():
            tokens = {}

            def one(pair, number, settings=settings, times=times, tokens=tokens):
                tool, kind = pair
                kind, _, switch = kind.partition(", look-up ")
                time.sleep(REST)
                asked = {"prompts": [ids * times], "length": LENGTH, "seed": number}
                reply = workers[tool, kind].ask(
                    "generate", **asked, **settings, lookup=switch == "on"
                )
                if tokens.setdefault((kind, number), reply["value"]) != reply["value"]:
                    raise Failed("the tokens differ from those without look-up")
                return {"rate": LENGTH / reply["seconds"], "cpu": reply["cpu"]}

            lines = [(t, f"{k}, look-up {s}") for t, k in pairs for s in ("off", "on")]
            session.rounds("lookup", case, lines, one, warm_up=True)

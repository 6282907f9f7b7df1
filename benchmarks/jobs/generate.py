"""New tokens per second of every tool in every precision, all of them loaded at once."""

import contextlib
import time

import numpy as np
from convert import N_VOCAB
from session import REST, say
from worker import Failed

PROMPT, GREEDY, LOSS_IDS = 8, 8, 512  # tokens of a prompt, of the comparison, of the loss
GROWTH = ((1, 32), (1, 64), (1, 256), (1, 512), (2, 128), (4, 128), (16, 128))
FEW = ("ours", "ctranslate2", "llama")  # for growth and sizes


def run(session):
    """Measure the shapes of the command line with everything that is installed."""
    pairs = session.prepare("124M", session.pairs())
    if "ours" in session.tools:
        losses(session, [pair for pair in pairs if pair[0] == "ours"])
    measure(session, "generate", pairs, session.options.shapes)


def growth(session):
    """Measure more shapes in int8, to show how cost grows with tokens and batch."""
    pairs = session.prepare("124M", session.pairs(("int8",), FEW))
    measure(session, "growth", pairs, GROWTH)


def losses(session, pairs):
    """Compute the loss of each of our precisions, and of the reference, on the same ids."""
    ids = np.random.default_rng(0).integers(0, N_VOCAB, LOSS_IDS).tolist()
    for tool, kind in (("ours", "graph"), *pairs):
        say(f"the loss of {kind}")
        try:
            with contextlib.closing(session.worker(tool, kind)) as worker:
                session.losses[kind] = worker.ask("loss", ids=ids)["value"]
        except Failed as error:
            say(f"the loss of {kind}: {error}")


def measure(session, job, pairs, shapes, size="124M"):
    """Measure all pairs in turn, shape by shape."""
    draw = np.random.default_rng(0)
    most = max(rows for rows, _ in shapes)
    prompts = draw.integers(0, N_VOCAB, (most, PROMPT)).tolist()
    workers, broken, greedy = {}, {}, {}

    def ask(pair, rows, length, number):
        if pair not in workers:
            raise Failed(broken[pair])
        time.sleep(REST)
        asked = {"prompts": prompts[:rows], "length": length, "greedy": number is None}
        reply = workers[pair].ask("generate", **asked, seed=number or 0)
        if [len(row) for row in reply["value"]] != [length] * rows:
            raise Failed(f"not {length} tokens in each of {rows} rows")
        return reply

    with contextlib.ExitStack() as stack:
        for pair in pairs:
            say(f"loading {' '.join(pair)}")
            try:
                workers[pair] = stack.enter_context(contextlib.closing(session.worker(*pair, size)))
                greedy[pair] = ask(pair, 1, GREEDY, None)["value"][0]
            except Failed as error:
                broken[pair] = str(error)
                if pair in workers:
                    workers.pop(pair).close()
        for rows, length in shapes:

            def one(pair, number, rows=rows, length=length):
                reply = ask(pair, rows, length, number)
                peak = session.watch(workers[pair])["peak"]
                return {"rate": rows * length / reply["seconds"], "cpu": reply["cpu"], "peak": peak}

            session.rounds(job, f"{rows} x {length}", pairs, one, size, warm_up=True)
            mark_differences(session.lines[-len(pairs) :], greedy)


def mark_differences(lines, greedy):
    """Mark float32 lines whose greedy tokens are not those of ours."""
    right = greedy.get(("ours", "float32"))
    for line in lines:
        first = greedy.get((line["tool"], line["kind"]))
        line["differs"] = (
            line["kind"] == "float32" and None not in (first, right) and first != right
        )

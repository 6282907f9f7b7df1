"""Seconds from nothing: complete commands, the first token of a model, a server that answers."""

import contextlib
import http.client
import time

import process
from serve import Served
from session import REST
from tools import OWN
from worker import Failed, one_line

from jobs.generate import PROMPT

SAMPLE = ("-m", "gpt2cli", "sample", "--model_name", "tiny", "--length", "1")
FIRST = "first token"


def run(session):
    """Measure the commands of ours and of the base version, and the first token of all tools."""
    own = [name for name in OWN if name in session.tools]

    def command(*words):
        def one(pair, number):
            return session.run(pair[0], *words, cwd=session.checkout(pair[0]))[0]

        return one

    pairs = [(name, "") for name in own]
    help_ = command("-m", "gpt2cli", "--help")
    session.rounds("start", "--help", pairs, help_, "", warm_up=True)
    session.rounds("start", "sample", pairs, command(*SAMPLE), "tiny", warm_up=True)
    only = [("tensorflow", "")]
    session.rounds("start", "import tensorflow", only, command("-c", "import tensorflow"), "")
    first_token(session, session.prepare("124M", session.pairs(("float32", "int8"))))
    server(session, own)


def first_token(session, pairs, size="124M"):
    """Measure from the start of a process to its first token, with the figures of that process."""

    def one(pair, number):
        time.sleep(REST)
        begun = time.perf_counter()
        with contextlib.closing(session.worker(*pair, size)) as worker:
            worker.ask("generate", prompts=[[1] * PROMPT], length=1, greedy=True, seed=0)
            return {"seconds": time.perf_counter() - begun, **session.watch(worker)}

    session.rounds("start", FIRST, pairs, one, size, warm_up=True)


def server(session, own):
    """Measure from the start of `serve` to the first answer 200 of /health."""
    folder = session.folder / "124M/models/vocabulary"

    def one(pair, number):
        time.sleep(REST)
        begun = time.perf_counter()
        words = ("--precision", pair[1])
        environment = session.environment(pair[0])
        try:
            served = Served(folder, *words, environment=environment, limit=session.options.limit)
        except RuntimeError as error:
            raise Failed(one_line(str(error))) from None
        with served:
            while not healthy(served.port):
                time.sleep(0.005)
            figures = {"seconds": time.perf_counter() - begun, **process.cpu(served.process.pid)}
            return figures | {"peak": process.peak(served.process.pid)}

    pairs = [(name, kind) for kind in ("float32", "int8") for name in own]
    session.rounds("start", "serve is ready", pairs, one, warm_up=True)


def healthy(port):
    """Return whether the server says that it answers at full speed."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as asked:
        try:
            asked.request("GET", "/health")
            return asked.getresponse().status == 200
        except OSError:
            return False

"""Both ends of the pipe between run.py and the process of one tool: a line of JSON each way.

A tool's process loads one model in one precision and answers requests until its input ends. So
several tools stay loaded while the rounds of a job move from one to the next.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent


class Failed(Exception):
    """A tool failed; the text says why, in one line."""


def serve(make):
    """Run as a tool's process: make(folder, kind, cores), then call the methods that are asked for.

    Args:
        make: returns an object with `versions` and methods such as `generate` and `train`.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print

    def answer(work):
        begun, used = time.perf_counter(), time.process_time()
        try:
            value = work()
            reply = {"value": value, "seconds": time.perf_counter() - begun}
            reply["cpu"] = time.process_time() - used
        except (Exception, SystemExit) as error:  # gpt-2-simple ends the process with a message
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)
        return reply.get("value")

    folder, kind, cores = sys.argv[1:]
    tool = None

    def load():
        nonlocal tool
        tool = make(Path(folder), kind, int(cores))
        return tool.versions

    if answer(load) is None:
        return
    for line in sys.stdin:
        request = json.loads(line)
        answer(lambda request=request: getattr(tool, request.pop("do"))(**request))


def versions(*packages):
    """Return {package: version} of those of these packages that are installed here."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


class Worker:
    """run.py's end: the process of a tool, ready when the constructor returns.

    Attributes:
        versions: of the tool and of the packages it uses.
        pid: of the process.
    """

    def __init__(self, python, script, folder, kind, cores, environment, limit):
        self._limit = limit  # seconds to wait for an answer
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the process
        self._process = subprocess.Popen(
            [python, HERE / script, folder, kind, str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=folder,
        )
        self.pid = self._process.pid
        try:
            self.versions = self._answer()["value"]
        except BaseException:
            self.close()
            raise

    def ask(self, do, **request):
        """Call a method of the tool; return its value, seconds, and CPU seconds as cpu.

        Raises:
            Failed: it raised an exception, or the process has ended.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise Failed(self._last_words()) from None
        return self._answer()

    def close(self):
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()

    def _answer(self):
        ready, _, _ = select.select([self._process.stdout], [], [], self._limit)
        if not ready:
            self._process.kill()
            raise Failed(f"no answer in {self._limit:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._last_words())
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(one_line(reply["error"]))
        return reply

    def _last_words(self):
        status = self._process.wait()
        self._log.seek(0)
        return one_line((self._log.read().strip().splitlines() or ["nothing said"])[-1], status)


def one_line(text, status=None):
    """Return a message that is short enough for a table, with its process's exit status."""
    text = " ".join(text.replace("|", "/").split())
    return (f"exit status {status}: " if status is not None else "") + text[:160]

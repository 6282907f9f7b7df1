"""Run commands in processes with a failing disk or a wrong clock, or killed at a chosen call.

Run as a program, this is a server that has loaded gpt2cli and TensorFlow behind the library of
faults.c. It forks a process for each command that it reads: that takes a third of a second, where a
new process would take three.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Faulty:
    """Run command lines with faults; see faults.c for their names, here without FAULT_.

    Args:
        library: the compiled faults.c; None where it cannot be compiled, and then nothing fails.
    """

    def __init__(self, library):
        self.library = library
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "LD_PRELOAD": str(library or ""), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words, most=None, closed=(), after=None, **faults):
        """Run a command in the current folder.

        Args:
            words: the command line.
            most: bytes that a file may have, as ulimit -f sets them.
            closed: file descriptors to close before.
            after: seconds after which it is killed.
            faults: "under", and the faults.

        Returns:
            The ended process; its status is -9 if it was killed.
        """
        environment = {f"FAULT_{name.upper()}": str(value) for name, value in faults.items()}
        with tempfile.TemporaryDirectory() as folder:
            task = {
                "words": [str(word) for word in words],
                "environment": environment,
                "cwd": os.getcwd(),
                "output": folder,
                "most": most,
                "closed": list(closed),
                "after": after,
            }
            print(json.dumps(task), file=self._server.stdin, flush=True)
            status = int(self._server.stdout.readline())
            out, err = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(words, status, out, err)

    def close(self):
        """End the server."""
        self._server.stdin.close()
        self._server.wait()


def serve():
    """Run the commands on standard input, one after the other; print the status of each."""
    from gpt2cli import cli  # noqa: I001
    import gpt2cli.formats.convert
    import gpt2cli.inference.generator
    import gpt2cli.training.devices
    import gpt2cli.training.run  # noqa: F401

    for line in os.fdopen(os.dup(0)):  # a stream that has been read cannot be reconfigured
        task = json.loads(line)
        child = os.fork()
        if not child:
            begin(task)
            os._exit(ended(cli.main, task["words"]))
        if task["after"] is not None:
            time.sleep(task["after"])
            os.kill(child, signal.SIGKILL)  # it exists until the next line
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def begin(task):
    """Prepare the forked process."""
    os.chdir(task["cwd"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{task['output']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in task["closed"]:
        os.close(number)
    if task["most"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["most"], task["most"]))
    os.environ.update(task["environment"])
    if os.environ["LD_PRELOAD"]:
        ctypes.CDLL(None).fault_begin()


def ended(main, words):
    """Run a command line to its end; return its status."""
    status = 0
    try:
        main(words)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return status


if __name__ == "__main__":
    serve()

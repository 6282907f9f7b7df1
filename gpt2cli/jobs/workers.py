"""Run one command as several processes, each on a GPU of its own if there are GPUs."""

import contextlib
import ctypes
import functools
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from gpt2cli import flags, machine

GRACE = 60.0  # seconds that the processes have to end after SIGTERM
POLL = 0.1  # seconds between two checks for processes that ended
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # loaded before any fork

Key = TypeVar("Key", bound=Hashable)


def usable_gpus() -> int:
    """Return how many GPUs TensorFlow can use; loads it in another process, which takes seconds."""
    code = "from gpt2cli import tensorflow; print(len(tensorflow.GPUS))"
    environment = {**os.environ, "PYTHONPATH": _python_path()}
    command = [sys.executable, "-c", code]
    words = subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split()
    return int(words[-1]) if words and words[-1].isdigit() else 0  # no output: it cannot be loaded


def words_of(options: Any) -> list[str]:
    """Return a command's dataclass as flags, without those that have their default value."""
    words = []
    cls: type = type(options)
    for name, (_, default, _) in flags.fields_of(cls).items():
        value = getattr(options, name)
        if value != default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{flags.spelled(name)}={v}" for v in values]
    return words


def run(command: str, commands: Mapping[Key, Any]) -> Generator[tuple[Key, str, str]]:
    """Run a command once for each dataclass, side by side, until all have ended.

    If this process is stopped, SIGTERM stops the others too, and each keeps its answers.

    Yields:
        As soon as a process ends, its key, how it ended ("by signal 9") and its last line on
        standard error.
    """
    names = itertools.cycle(machine.gpus() or [None])
    running: dict[Key, tuple[subprocess.Popen, IO[bytes]]] = {}
    with contextlib.ExitStack() as stack:
        try:
            for key, options in commands.items():
                log = stack.enter_context(tempfile.TemporaryFile())
                running[key] = _start(command, options, next(names), log), log
            while running:
                for key, (process, output) in list(running.items()):
                    if process.poll() is not None:
                        del running[key]
                        status = process.returncode
                        how = f"with status {status}" if status >= 0 else f"by signal {-status}"
                        yield key, how, _last_line(output)
                time.sleep(POLL)
        finally:
            _stop([process for process, _ in running.values()])


def _start(command: str, options: Any, gpu: str | None, log: IO[bytes]) -> subprocess.Popen:
    own = {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2cli", command, *words_of(options)],
        env={**os.environ, **own, "PYTHONPATH": _python_path()},
        stdin=subprocess.DEVNULL,
        stderr=log,
        preexec_fn=functools.partial(_end_with, PRCTL, os.getpid()) if PRCTL else None,
    )


def _end_with(prctl: Callable[[int, int], int], parent: int) -> None:
    """Called in a new process: have Linux send it SIGTERM when its parent ends, however it ends.

    A terminal sends Ctrl-C and SIGHUP to all processes. Only the parent handles them; it sends
    SIGTERM to the others.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it died before the call above
        os._exit(128 + signal.SIGTERM)


def _last_line(log: IO[bytes]) -> str:
    log.seek(max(log.seek(0, os.SEEK_END) - 10_000, 0))
    return log.read().decode("utf-8", "replace").strip().rpartition("\n")[2][:300]


def _stop(running: Sequence[subprocess.Popen]) -> None:
    """Send SIGTERM to all, wait until they end, and kill those that do not."""
    for process in running:
        process.terminate()
    deadline = time.monotonic() + GRACE
    try:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
    finally:  # also after a second Ctrl-C
        for process in running:
            process.kill()
            process.wait()


def _python_path() -> str:
    """Return a PYTHONPATH with which a process finds this package, wherever it is."""
    root = str(Path(__file__).parents[2])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])

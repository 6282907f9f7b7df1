"""One command as several processes, each with a GPU of its own where there are some."""

import contextlib
import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpt2cli import flags

GRACE = 60.0  # seconds for all processes to end when they are asked to
LOOK = 0.1  # seconds between two looks at whether one has ended
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def gpus():
    """CUDA's names of the GPUs that this process may use, without loading TensorFlow."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        named = [name.strip() for name in told.split(",")]
        return named[: named.index("-1")] if "-1" in named else [name for name in named if name]
    with contextlib.suppress(OSError):
        found = [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
        return [str(number) for number in range(len(found))]
    return []


def usable_gpus():
    """How many GPUs TensorFlow can use; a process of its own loads it and says so, in seconds."""
    code = "from gpt2cli import tensorflow; print(len(tensorflow.GPUS))"
    environment = {**os.environ, "PYTHONPATH": _path()}
    words = [sys.executable, "-c", code]
    said = subprocess.run(words, env=environment, capture_output=True, text=True).stdout.split()
    return int(said[-1]) if said and said[-1].isdigit() else 0  # nothing: it cannot be loaded


def words_of(config):
    """A command's dataclass as flags of a command line: all that is not its default."""
    words = []
    for name, (_, default, _) in flags.fields_of(type(config)).items():
        value = getattr(config, name)
        if value != default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{flags.spelled(name)}={v}" for v in values]
    return words


def run(command, configs, ended):
    """Run a command once for each dataclass, side by side, until all have ended.

    If this process is ended meanwhile, so are they, and each saves what it has.

    Args:
        ended: called as soon as one ends, with its number from 0, how it ended and what it said
            last.
    """
    names, running = gpus(), {}
    with contextlib.ExitStack() as stack:
        try:
            for number, config in enumerate(configs):
                own = {"CUDA_VISIBLE_DEVICES": names[number % len(names)]} if names else {}
                log = stack.enter_context(tempfile.TemporaryFile())
                running[number] = _start(command, config, own, log), log
            while running:
                for number, (process, log) in list(running.items()):
                    if process.poll() is not None:
                        del running[number]
                        ended(number, _how(process.returncode), _last_line(log))
                time.sleep(LOOK)
        finally:
            _end([process for process, _ in running.values()])


def _start(command, config, variables, log):
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2cli", command, *words_of(config)],
        env={**os.environ, **variables, "PYTHONPATH": _path()},
        stdin=subprocess.DEVNULL,
        stderr=log,
        preexec_fn=_leash(),
    )


def _leash():
    """What a process does before its program starts, to be ended whenever this one ends.

    Even by SIGKILL. Linux alone has that, as a SIGTERM when the thread that started it is gone.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError, TypeError):
        return None
    return functools.partial(_follow, prctl, os.getpid())


def _follow(prctl, parent):
    prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # which died before it was asked for
        os._exit(128 + signal.SIGTERM)


def _how(status):
    """`with status 1`, or `by signal 9`."""
    return f"with status {status}" if status >= 0 else f"by signal {-status}"


def _last_line(log):
    log.seek(max(log.seek(0, os.SEEK_END) - 10_000, 0))
    return log.read().decode("utf-8", "replace").strip().rpartition("\n")[2][:300]


def _end(running):
    """Ask all to end, wait for all, and kill what is left."""
    for process in running:
        process.terminate()
    until = time.monotonic() + GRACE
    try:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0))
    finally:  # a second Ctrl-C
        for process in running:
            process.kill()
            process.wait()


def _path():
    """PYTHONPATH with which a process finds this package, wherever it was imported from."""
    here = str(Path(__file__).parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])

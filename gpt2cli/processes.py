"""One command as several processes, each with a GPU of its own where there are some."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from gpt2cli import flags

GRACE = 60.0  # seconds for a process to end when it is asked to


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


def words_of(config):
    """A command's dataclass as flags of a command line: all that is not its default."""
    words = []
    for name, (_, default, _) in flags.fields_of(type(config)).items():
        value = getattr(config, name)
        if value != default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{flags.spelled(name)}={v}" for v in values]
    return words


def run(command, configs):
    """Run a command once for each dataclass, side by side, and wait for all.

    If this process is ended meanwhile, so are they, and each saves what it has.

    Returns:
        Of each its exit status and what it said last.
    """
    names, ended = gpus(), []
    with contextlib.ExitStack() as stack:
        running = []
        for number, config in enumerate(configs):
            own = {"CUDA_VISIBLE_DEVICES": names[number % len(names)]} if names else {}
            log = stack.enter_context(tempfile.TemporaryFile())
            words = [sys.executable, "-m", "gpt2cli", command, *words_of(config)]
            environment = {**os.environ, **own, "PYTHONPATH": _path()}
            process = subprocess.Popen(words, env=environment, stderr=log, stdin=subprocess.DEVNULL)
            running.append((process, log))
            stack.callback(_end, process)
        for process, log in running:
            status = process.wait()
            log.seek(0)
            said = log.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            ended.append((status, said[:300]))
    return ended


def _end(process):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _path():
    """PYTHONPATH with which a process finds this package, wherever it was imported from."""
    here = str(Path(__file__).parents[1])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])

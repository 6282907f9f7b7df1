"""One run of the benchmark: the models on disk, the programs, and the lines found so far."""

import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import machine
import process
from convert import weights_of
from machine import CORES, ROOT
from tools import ENCODERS, OWN, TOOLS
from worker import Failed, Worker, one_line, versions

HERE = Path(__file__).absolute().parent
REST = 0.3  # seconds between two calls: threads of the last one may still wait busily
MAKING = 3600  # seconds: making a model of 1558M or measuring limits may take long


def say(text):
    """Print progress; the tables alone go to standard output."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


class Session:
    """A folder with the models, and what was found so far.

    Attributes:
        lines: a dict for each line of a table: job, case, size, tool, kind, and either `figures`
            (name -> one number a round) or `failed`; `first` has the figures of a warm-up round.
        best: a limit's name -> (value, how it was reached).
        tools: those that take part, by name.
    """

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.lines, self.best, self.losses, self.skipped = [], {}, {}, []
        packages = ("tensorflow", "ai-edge-litert", "numpy", "tiktoken", "tokenizers")
        self.versions = {"ours": versions(*packages)}
        self.tools, self._known = {}, {}
        self._made, self._broken = set(), set()  # (tool, size) of models
        if options.base:
            self.versions["base"] = {"commit": machine.commit(options.base)}
        for name in [n for n in TOOLS if n in options.only]:
            if name == "base" and not options.base:
                continue
            if not self.python(name).exists():
                self.skipped.append(f"{name} (not installed)")
                continue
            self.tools[name] = TOOLS[name]

    # Programs

    def python(self, tool):
        """Return the interpreter of a tool."""
        ours = tool in OWN or tool not in TOOLS
        return Path(sys.executable) if ours else self.options.peers / tool / "bin/python"

    def checkout(self, tool):
        """Return the checkout of gpt2cli that a tool's process imports."""
        return self.options.base if tool == "base" else ROOT

    def environment(self, tool, **more):
        """Return the environment of a tool's process: only our own find gpt2cli."""
        kept = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONHOME")}
        if tool in (*OWN, *ENCODERS):
            kept["PYTHONPATH"] = str(self.checkout(tool))
        kept["XDG_CACHE_HOME"] = str(self.folder / f"cache-{tool}")
        return kept | {"TF_CPP_MIN_LOG_LEVEL": "2", "HF_HUB_OFFLINE": "1"} | more

    def kinds(self, tool, wanted):
        """Return the wanted kinds that a tool has here; the others are noted once."""
        code = TOOLS[tool].known
        if code and tool not in self._known:
            self._known[tool] = self.run(tool, "-c", code)[2].split()
        found = []
        for kind in wanted:
            if missing := TOOLS[tool].lacks(kind):
                note = f"{tool} {kind} (slow without {missing}, which this processor lacks)"
            elif code and kind.partition(",")[0] not in self._known[tool]:
                note = f"{tool} {kind} (not in this version, or not on this processor)"
            else:
                found.append(kind)
                continue
            self.skipped += [note] * (note not in self.skipped)
        return found

    def pairs(self, wanted=None, tools=None, of="generates"):
        """Return (tool, kind) of all that can be measured here."""
        names = [name for name in self.tools if tools is None or name in tools]
        return [
            (name, kind)
            for name in names
            for kind in self.kinds(name, getattr(self.tools[name], of))
            if wanted is None or kind in wanted
        ]

    def run(self, tool, *words, cwd=None, limit=None, **more):
        """Run a Python process; return (figures, peak GB, standard output, standard error).

        Figures are seconds, user and system (CPU seconds), and peak.

        Raises:
            Failed: it ended with an error, or took longer than the limit.
        """
        limit = limit or self.options.limit
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            time.sleep(REST)
            begun = time.perf_counter()
            child = subprocess.Popen(
                [self.python(tool), *map(str, words)],
                cwd=cwd or self.folder,
                env=self.environment(tool, **more),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
            late = threading.Timer(limit, child.kill)
            late.start()
            try:
                _, status, usage = os.wait4(child.pid, 0)
            except BaseException:
                child.kill()
                child.wait()
                raise
            finally:
                late.cancel()
            seconds = time.perf_counter() - begun
            child.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err.seek(0)
            said = err.read()
            if seconds > limit:
                raise Failed(f"no answer in {limit:g} s")
            if child.returncode:
                raise Failed(one_line((said.splitlines() or [""])[-1], child.returncode))
            peak = usage.ru_maxrss * 1024 / 1e9
            figures = {"seconds": seconds, "user": usage.ru_utime, "system": usage.ru_stime}
            return figures | {"peak": peak}, peak, out.read(), said

    def worker(self, tool, kind, size="124M"):
        """Return a process with a model loaded; its versions are noted."""
        script, environment = TOOLS[tool].script, self.environment(tool)
        folder = self.folder / size
        limit = self.options.limit
        worker = Worker(self.python(tool), script, folder, kind, CORES, environment, limit)
        self.versions.setdefault(tool, worker.versions)
        return worker

    # Models

    def prepare(self, size, pairs):
        """Write a model's random weights, in the format of each tool; return the pairs that work.

        Raises:
            Failed: there is too little room for the model.
        """
        self._check_room(size)
        names = dict.fromkeys(tool for tool, _ in pairs)
        (self.folder / size).mkdir(exist_ok=True)
        for tool in ("ours", *names):  # whoever runs, the weights are ours
            if (tool, size) in self._made | self._broken or tool in ("base", "gpt2simple"):
                continue
            say(f"model of {tool}, {size}")
            # 124M is kept for all jobs, which need different kinds
            kinds = [kind for name, kind in pairs if name == tool]
            if size == "124M":
                kinds = self.kinds(tool, TOOLS[tool].generates)
            words = [HERE / "convert.py", tool, self.folder / size, size, ",".join(kinds)]
            words += [self.options.vocabulary] if tool == "ours" else []
            try:
                self.run(tool, *words, limit=MAKING)
                self._made.add((tool, size))
            except Failed as error:
                if tool == "ours":
                    raise
                self.skipped.append(f"{tool}, {size} ({error})")
                self._broken.add((tool, size))
        return [pair for pair in pairs if (pair[0], size) not in self._broken]

    def discard(self, size):
        """Remove a model from the disk."""
        shutil.rmtree(self.folder / size, ignore_errors=True)
        self._made = {pair for pair in self._made if pair[1] != size}

    def _check_room(self, size):
        total = 4 * weights_of(size)
        free = shutil.disk_usage(self.folder).free
        if ("ours", size) in self._made:
            return
        if free < 4 * total:
            raise Failed(f"needs {4 * total / 1e9:.0f} GB of the disk, {free / 1e9:.0f} are free")
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
        if available < 2.5 * total:
            need = f"needs {2.5 * total / 1e9:.1f} GB of memory"
            raise Failed(f"{need}, {available / 1e9:.1f} are free")

    # Lines

    def rounds(self, job, case, pairs, measure, size="124M", warm_up=False):
        """Measure each pair once a round: measure(pair, round) returns figures by name.

        The lines are in `self.lines` from the start, so that a run that is stopped keeps them.

        Args:
            pairs: (tool, kind) of each; one that fails is not tried again.
            warm_up: a round 0 that does not count; its figures are kept as `first`.
        """
        head = {"job": job, "case": case, "size": size}
        lines = {pair: head | {"tool": pair[0], "kind": pair[1], "figures": {}} for pair in pairs}
        self.lines += lines.values()
        for number in range(0 if warm_up else 1, self.options.rounds + 1):
            name = ", ".join(part for part in (job, size, case) if part)
            say(f"{name}: round {number} of {self.options.rounds}")
            for pair, line in lines.items():
                if "failed" in line:
                    continue
                try:
                    found = measure(pair, number)
                except Failed as error:
                    say(f"{' '.join(pair)}: {error}")
                    line["failed"] = str(error)
                    continue
                if not number:
                    line["first"] = found
                    continue
                for name, value in found.items():
                    line["figures"].setdefault(name, []).append(value)

    def limits(self):
        """Measure what the machine can do with each library; the best of all tries counts."""
        for tool, library in (
            *(("ours", library) for library in ("numpy", "tensorflow", "litert")),
            *(("transformers", "torch") for _ in range("transformers" in self.tools)),
        ):
            say(f"limits of the machine, by {library}")
            try:
                words = [HERE / "limits.py", library, CORES]
                _, _, out, _ = self.run(tool, *words, limit=MAKING)
            except Failed as error:
                say(f"limits by {library}: {error}")
                continue
            for name, value, how in json.loads(out):
                if value > self.best.get(name, (0,))[0]:
                    self.best[name] = (value, how)

    def watch(self, worker):
        """Return a worker's CPU seconds since its start, and its peak memory."""
        return process.cpu(worker.pid) | {"peak": process.peak(worker.pid)}

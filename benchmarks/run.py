#!/usr/bin/env python3
"""Speed and memory of a random 124M model, ours and other programs' in turn; prints Markdown.

    python benchmarks/run.py [--jobs generate,train,encode,start] [--rounds 3] [--install]

README.md here says what is measured and how. Every other program is optional: it is left out where
`--peers` holds no virtual environment for it.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tables
from convert import SIZES
from worker import Failed, Worker, one_line, versions

HERE = Path(__file__).absolute().parent
ROOT = HERE.parent
CORES = len(os.sched_getaffinity(0))
JOBS = ("generate", "train", "encode", "start")
SHAPES = ((1, 128), (1, 1000), (8, 128), (32, 128))  # batch, new tokens
PROMPT, GREEDY, LOSS_IDS = 8, 8, 512  # tokens of a prompt, of the comparison, of the loss
WARM_UP = 2  # steps of training that do not count
REST = 0.3  # seconds between two calls: threads of the last one may still wait busily


@dataclass(frozen=True)
class Tool:
    """A program: its worker script, the kinds of model that it generates with and trains.

    `install` are the words of `pip install`, once for each tuple.
    """

    script: str
    generates: tuple
    trains: tuple = ()
    install: tuple = ()


TOOLS = {
    "ours": Tool(
        "ours.py",
        ("float32", "bfloat16", "int8"),
        ("float32", "bfloat16", "float32, recomputed", "bfloat16, recomputed"),
    ),
    "transformers": Tool(
        "peer_transformers.py",
        ("float32", "bfloat16"),
        (
            *("float32", "bfloat16 (autocast)", "bfloat16 (whole)"),
            *("bfloat16 (autocast), recomputed", "bfloat16 (whole), recomputed"),
        ),
        (("torch", "transformers"),),
    ),
    "ctranslate2": Tool(
        "peer_ctranslate2.py", ("float32", "bfloat16", "int8"), (), (("ctranslate2",),)
    ),
    "llama": Tool(
        "peer_llama.py", ("float32", "bfloat16", "int8"), (), (("llama-cpp-python", "gguf"),)
    ),
    "gpt2simple": Tool(
        "peer_gpt2simple.py",
        ("float32",),
        ("float32",),
        # it asks for a TensorFlow that is no longer there
        (("tensorflow", "regex", "requests", "tqdm"), ("--no-deps", "gpt-2-simple", "toposort")),
    ),
}
ENCODERS = ("ours", "tiktoken", "tokenizers")


def main():
    """Make the models, run the jobs, print the tables."""
    options = read_options()
    if options.install:
        install(options)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="gpt2cli-bench-") as folder:
        bench = Bench(options, Path(folder))
        results = {"machine": machine(), "load_before": load, "rounds": options.rounds}
        results |= {"versions": bench.versions, "skipped": bench.skipped, "limits": bench.best}
        results |= {"losses": bench.losses, "lines": bench.lines}
        for job in ("limits", *options.jobs, "limits"):
            getattr(bench, job)()
            if options.json:  # after each, for a run that is cut off
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(tables.report(results))


def read_options():
    """The command line."""

    def several(known):
        def read(text):
            names = text.split(",")
            if unknown := set(names) - set(known):
                raise argparse.ArgumentTypeError(f"{unknown.pop()} is none of {', '.join(known)}")
            return names

        return read

    names = sorted({*TOOLS, *ENCODERS})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--jobs", type=several(JOBS), default=list(JOBS), help="some of " + ",".join(JOBS))
    add("--rounds", type=int, default=3, help="times that each line is measured, in turn")
    add("--steps", type=int, default=8, help=f"training steps a round, {WARM_UP} to warm up first")
    add("--shapes", default=SHAPES, type=shapes, help="of generate, such as 1x128,8x128")
    add("--only", type=several(names), default=names, help="some of " + ",".join(names))
    add("--peers", type=Path, default=HERE / "peers", help="folder of virtual environments")
    add("--install", action="store_true", help="make those of --only that are missing, with pip")
    add("--text", type=Path, help="file to encode (default: 30 MB from the installed packages)")
    add("--vocabulary", type=Path, default=ROOT / "models/tiny", help="encoder.json, vocab.bpe")
    add("--wordpiece", type=Path, help="folder of a vocab.txt; encode is measured with it too")
    add("--json", type=Path, help="file to write the raw numbers to")
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < 1:
        parser.error("--rounds and --steps take 1 or more")
    for name in ("peers", "text", "vocabulary", "wordpiece"):
        if (path := getattr(options, name)) is not None:
            setattr(options, name, path.absolute())
    return options


def shapes(text):
    """1x128,8x128 -> ((1, 128), (8, 128))."""
    return tuple(tuple(map(int, part.split("x"))) for part in text.split(","))


def install(options):
    """Make the virtual environments that are missing."""
    for name, tool in TOOLS.items():
        if name in options.only and tool.install and not (options.peers / name).exists():
            say(f"installing {name}")
            venv.create(options.peers / name, with_pip=True)
            for words in tool.install:
                pip = [options.peers / name / "bin/python", "-m", "pip", "install", "-q", *words]
                if subprocess.run(pip).returncode:
                    say(f"pip failed: {options.peers / name} is incomplete, remove it")


def say(text):
    """Progress; the tables alone go to standard output."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def machine():
    """The date, the processor, and the commit that is measured."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    python = f"Python {platform.python_version()}"
    return f"{datetime.date.today()}, {CORES} cores of {cpu}, {python}, commit {commit or '?'}"


class Bench:
    """One session: a folder with the models, and what was found so far.

    Attributes:
        lines: one dict for each line of a table: job, case, tool, kind, and either `rates` (one a
            round) and `peak` (GB), or `failed`.
    """

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.lines, self.best, self.losses, self.skipped = [], {}, {}, []
        self.versions = {"ours": versions("tensorflow", "numpy", "tiktoken", "tokenizers")}
        self.tools = {}
        needed = set(options.jobs) & {"generate", "train", "start"}
        for name in [n for n in TOOLS if n in options.only] if needed else []:
            if not self.python(name).exists():
                self.skipped.append(f"{name} (not installed)")
                continue
            self.tools[name] = TOOLS[name]
        if needed:  # whoever runs, the weights are ours
            self.convert("ours", str(options.vocabulary))
        for name in [n for n in self.tools if n not in ("ours", "gpt2simple")]:
            try:
                self.convert(name)
            except Failed as error:
                self.skipped.append(f"{name} ({error})")
                del self.tools[name]

    def python(self, tool):
        """The interpreter of a tool."""
        ours = tool not in TOOLS or tool == "ours"
        return Path(sys.executable) if ours else self.options.peers / tool / "bin/python"

    def environment(self, tool, **more):
        """The environment of a tool's process: ours alone finds gpt2cli."""
        kept = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONHOME")}
        kept |= {"PYTHONPATH": str(ROOT)} if tool in ("ours", *ENCODERS) else {}
        return kept | {"TF_CPP_MIN_LOG_LEVEL": "2", "HF_HUB_OFFLINE": "1"} | more

    def convert(self, tool, *words):
        """Write the weights in a tool's format."""
        say(f"model of {tool}")
        self.run(tool, HERE / "convert.py", tool, self.folder, *words)

    def run(self, tool, *words, cwd=None, fine=(0,), **more):
        """Run a Python process: (seconds, peak GB, standard output, standard error), or Failed."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            time.sleep(REST)
            begun = time.perf_counter()
            process = subprocess.Popen(
                [self.python(tool), *map(str, words)],
                cwd=cwd or self.folder,
                env=self.environment(tool, **more),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - begun
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err.seek(0)
            said = err.read()
            if process.returncode not in fine:
                raise Failed(one_line((said.splitlines() or [""])[-1], process.returncode))
            return seconds, usage.ru_maxrss * 1024 / 1e9, out.read(), said

    def worker(self, tool, kind):
        """A process with a model loaded; its versions are noted."""
        script, environment = TOOLS[tool].script, self.environment(tool)
        worker = Worker(self.python(tool), script, self.folder, kind, CORES, environment)
        self.versions.setdefault(tool, worker.versions)
        return worker

    def rounds(self, job, case, lines, measure, warm_up=False):
        """Measure each line once a round: measure(line, round) -> (rate, peak GB).

        Args:
            lines: (tool, kind) of each; one that fails is not tried again.
            warm_up: a round 0 that does not count.
        """
        found = {line: {"rates": [], "peak": 0.0} for line in lines}
        for number in range(0 if warm_up else 1, self.options.rounds + 1):
            say(f"{job} {case}: round {number} of {self.options.rounds}")
            for line in lines:
                if "failed" in found[line]:
                    continue
                try:
                    rate, peak = measure(line, number)
                except Failed as error:
                    say(f"{' '.join(line)}: {error}")
                    found[line] = {"failed": str(error)}
                    continue
                if number:
                    found[line]["rates"].append(rate)
                    found[line]["peak"] = max(found[line]["peak"], peak)
        for (tool, kind), figures in found.items():
            self.lines.append({"job": job, "case": case, "tool": tool, "kind": kind, **figures})

    def limits(self):
        """Measure what the machine can do; the better of all tries counts."""
        say("limits of the machine")
        _, _, out, _ = self.run("ours", HERE / "limits.py", CORES)
        for name, value in json.loads(out).items():
            self.best[name] = max(value, self.best.get(name, 0))

    def generate(self):
        """New tokens a second of every tool in every precision, all of them loaded at once."""
        draw = np.random.default_rng(0)
        most = max(rows for rows, _ in self.options.shapes)
        prompts = draw.integers(0, SIZES["n_vocab"], (most, PROMPT)).tolist()
        ids = draw.integers(0, SIZES["n_vocab"], LOSS_IDS).tolist()
        workers, broken, greedy = {}, {}, {}

        def ask(line, rows, length, number):
            if line not in workers:
                raise Failed(broken[line])
            asked = {"prompts": prompts[:rows], "length": length}
            time.sleep(REST)
            reply = workers[line].ask("generate", **asked, greedy=number is None, seed=number or 0)
            if [len(row) for row in reply["value"]] != [length] * rows:
                raise Failed(f"not {length} tokens in each of {rows} rows")
            return reply

        if "ours" in self.tools:
            say("the loss of the float32 graph")
            graph = self.worker("ours", "graph")
            self.losses["graph"] = graph.ask("loss", ids=ids)["value"]
            graph.close()
        lines = [(name, kind) for name, tool in self.tools.items() for kind in tool.generates]
        try:
            for line in lines:
                say(f"loading {' '.join(line)}")
                try:
                    workers[line] = self.worker(*line)
                    greedy[line] = ask(line, 1, GREEDY, None)["value"][0]
                    if line[0] == "ours":
                        self.losses[line[1]] = workers[line].ask("loss", ids=ids)["value"]
                except Failed as error:
                    broken[line] = str(error)
                    if line in workers:
                        workers.pop(line).close()
            for rows, length in self.options.shapes:

                def measure(line, number, rows=rows, length=length):
                    seconds = ask(line, rows, length, number)["seconds"]
                    return rows * length / seconds, workers[line].peak()

                self.rounds("generate", f"{rows} x {length}", lines, measure, warm_up=True)
        finally:
            for worker in workers.values():
                worker.close()
        right = greedy.get(("ours", "float32"))
        for line in self.lines:
            first = greedy.get((line["tool"], line["kind"]))
            line["differs"] = line["kind"] == "float32" and first not in (None, right)

    def train(self):
        """Tokens a second of training steps; a process of its own each time, one at a time."""

        def measure(line, number):
            tool, kind = line
            steps = WARM_UP + self.options.steps
            if tool == "ours":
                rates, peak = self.train_ours(kind, steps)
            else:
                worker = self.worker(tool, kind)
                try:
                    reply = worker.ask("train", steps=steps, length=SIZES["n_ctx"])
                    rates = [SIZES["n_ctx"] / seconds for seconds in reply["value"]]
                    peak = worker.peak()
                finally:
                    worker.close()
            return statistics.median(rates[WARM_UP:]), peak

        lines = [(name, kind) for name, tool in self.tools.items() for kind in tool.trains]
        self.rounds("train", f"1 x {SIZES['n_ctx']}", lines, measure)

    def train_ours(self, kind, steps):
        """`gpt2cli train` itself: (tokens a second of each step, peak GB)."""
        words = ["tokens.npz", "--model_name", "random", "--steps", steps, "--sample_every", 0]
        words += ["--restore_from", "fresh", "--overwrite", "--precision", kind.partition(",")[0]]
        words += ["--memory_saving_gradients"] if "recomputed" in kind else []
        _, peak, _, said = self.run("ours", "-m", "gpt2cli", "train", *words)
        return [float(line.split()[-2]) for line in said.splitlines() if " loss=" in line], peak

    def encode(self):
        """Megabytes of text a second, from a file of text to a file of ids."""
        text = self.options.text or self.folder / "text.txt"
        if self.options.text is None:
            text.write_bytes(installed_text())
        size = text.stat().st_size / 1e6
        (self.folder / "word.txt").write_text("word\n")
        folders = {"bpe": self.options.vocabulary, "wordpiece": self.options.wordpiece}
        for vocabulary, folder in folders.items():
            if folder is None:
                continue
            tools = [n for n in ENCODERS if n in self.options.only]
            tools = [n for n in tools if (vocabulary, n) != ("wordpiece", "tiktoken")]
            lines = [(n, f"{t} thread{'s' * (t > 1)}") for n in tools for t in sorted({1, CORES})]

            loading = {}

            def measure(line, number, vocabulary=vocabulary, folder=folder, loading=loading):
                tool, threads = line[0], line[1].split()[0]
                if tool == "ours":
                    where = ["--models_dir", folder.parent, "--model_name", folder.name]
                    words = ["-m", "gpt2cli", "encode"]
                    last = [*where, "--workers", threads]
                    nothing, *_ = self.run("ours", *words, "word.txt", "ids.npy", *last)
                    seconds, peak, *_ = self.run("ours", *words, text, "ids.npy", *last)
                    if seconds < 2 * nothing:
                        raise Failed("the text is too short: the start of the command dominates")
                    return size / (seconds - nothing), peak
                kind = vocabulary if vocabulary == "wordpiece" else tool
                words = [HERE / "encoders.py", kind, folder, text, "ids.npy", threads]
                _, peak, out, _ = self.run(tool, *words)
                reply = json.loads(out)
                loading[line] = reply["loading"]
                return size / reply["seconds"], peak

            self.rounds("encode", f"{vocabulary}, {size:.1f} MB", lines, measure)
            for line in self.lines[-len(lines) :]:
                line["loading"] = loading.get((line["tool"], line["kind"]))

    def start(self):
        """Seconds until a command has done the least that it can do."""
        commands = {
            ("ours", "--help"): ("-m", "gpt2cli", "--help"),
            ("ours", "sample --model_name tiny --length 1"): (
                *("-m", "gpt2cli", "sample", "--model_name", "tiny", "--length", "1"),
            ),
            ("tensorflow", "import tensorflow"): ("-c", "import tensorflow"),
        }
        first = "124M, float32: one token"
        lines = [line for line in commands if line[0] != "ours" or "ours" in self.tools]
        lines += [(name, first) for name in self.tools]

        def measure(line, number):
            if line[1] != first:
                seconds, peak, *_ = self.run(line[0], *commands[line], cwd=ROOT)
                return seconds, peak
            time.sleep(REST)
            begun = time.perf_counter()
            worker = self.worker(line[0], "float32")
            try:
                worker.ask("generate", prompts=[[1] * PROMPT], length=1, greedy=True, seed=0)
                return time.perf_counter() - begun, worker.peak()
            finally:
                worker.close()

        self.rounds("start", "seconds", lines, measure)


def installed_text(size=30_000_000):
    """Code and documents of the installed packages, in an order that is always the same."""
    place = Path(sysconfig.get_paths()["purelib"])
    kinds = (".md", ".py", ".rst", ".txt")
    paths = sorted(path for path in place.rglob("*") if path.suffix in kinds and path.is_file())
    random.Random(0).shuffle(paths)
    found, total = [], 0
    for path in paths:
        try:
            text = path.read_bytes()
            text.decode()
        except (OSError, UnicodeDecodeError):
            continue
        found.append(text)
        total += len(text)
        if total >= size:
            break
    return b"\n".join(found)


if __name__ == "__main__":
    main()

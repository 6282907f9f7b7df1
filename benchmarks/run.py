#!/usr/bin/env python3
"""Speed and memory of random models, ours and other programs' in turn; prints Markdown.

    python benchmarks/run.py [--peers DIR] [--base CHECKOUT] [--jobs start,generate] [--install]

README.md here says what is measured and how. Every other program is optional: it is left out where
`--peers` holds no virtual environment for it. Ctrl-C or SIGTERM ends the run, and the tables of
what was measured are printed.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import machine
import tables
from convert import SIZES
from jobs import encode, generate, lookup, memory, prefix, sizes, start, train
from machine import ROOT
from session import HERE, Session, say
from tools import ENCODERS, TOOLS, install
from worker import Failed

JOBS = {
    "limits": Session.limits,  # once more at the end: the better of both counts
    "start": start.run,
    "memory": memory.run,
    "generate": generate.run,
    "lookup": lookup.run,
    "prefix": prefix.run,
    "growth": generate.growth,
    "train": train.run,
    "encode": encode.run,
    "sizes": sizes.run,
}
SHAPES = ((1, 128), (1, 1000), (8, 128), (32, 128))  # batch, new tokens


class Stopped(BaseException):
    """A signal that ends the run; its number."""


def main():
    """Make the models, run the jobs, print the tables; return the exit status."""
    options = read_options()
    if options.install:
        install(options.peers, options.only, say)
    load = os.getloadavg()[0]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    status = 0
    with tempfile.TemporaryDirectory(prefix="gpt2cli-bench-", dir=options.folder) as folder:
        session = Session(options, Path(folder))
        results = {"machine": machine.describe(), "load_before": load, "rounds": options.rounds}
        results |= {"versions": session.versions, "skipped": session.skipped}
        results |= {"limits": session.best, "losses": session.losses, "lines": session.lines}
        try:
            status = run(session, results)
        except Stopped as stopped:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # the tables are printed once
            say(f"stopped by {signal.Signals(stopped.args[0]).name}; the tables have the rest")
            status = 128 + stopped.args[0]
            save(options, results)
    print(tables.report(results), flush=True)
    return status


def run(session, results):
    """Run the jobs; one that fails as a whole is noted, and the next one runs. Return 1 then."""
    status = 0
    names = session.options.jobs
    for name in [*names, *(["limits"] if "limits" in names else [])]:
        try:
            JOBS[name](session)
        except Failed as error:
            say(f"{name}: {error}")
            session.skipped.append(f"{name} ({error})")
            status = 1
        save(session.options, results)  # after each, for a run that is killed
    return status


def stop(number, frame):
    """End the run."""
    raise Stopped(number)


def save(options, results):
    """Write the raw numbers."""
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


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
    add("--steps", type=int, default=8, help="training steps a round, after 2 to warm up")
    add("--shapes", default=SHAPES, type=shapes, help="of generate, such as 1x128,8x128")
    add("--sizes", default=list(SIZES)[1:], type=several(SIZES), help="of the job sizes")
    add("--only", type=several(names), default=names, help="some of " + ",".join(names))
    add("--base", type=Path, help="another checkout of gpt2cli, measured in the same rounds")
    add("--peers", type=Path, default=HERE / "peers", help="folder of virtual environments")
    add("--install", action="store_true", help="make those of --only that are missing, with pip")
    add("--limit", type=float, default=600, help="seconds for one call; a slower line fails")
    add("--text", type=Path, help="file to encode (default: 30 MB from the installed packages)")
    add("--vocabulary", type=Path, default=ROOT / "models/tiny", help="encoder.json, vocab.bpe")
    add("--wordpiece", type=Path, help="folder of a vocab.txt; encode is measured with it too")
    add("--json", type=Path, help="file to write the raw numbers to")
    add("--folder", type=Path, help="where to make a folder for the models, up to 25 GB")
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < 1:
        parser.error("--rounds and --steps take 1 or more")
    for name in ("peers", "text", "vocabulary", "wordpiece", "base", "json", "folder"):
        if (path := getattr(options, name)) is not None:
            setattr(options, name, path.absolute())
    if options.base and not (options.base / "gpt2cli").is_dir():
        parser.error(f"--base {options.base} has no folder gpt2cli")
    return options


def shapes(text):
    """1x128,8x128 -> ((1, 128), (8, 128))."""
    return tuple(tuple(map(int, part.split("x"))) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())

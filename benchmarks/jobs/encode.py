"""Megabytes of text per second, from a file of text to a file of ids."""

import json
import random
import sysconfig
from pathlib import Path

from machine import CORES
from session import HERE
from tools import ENCODERS, OWN
from worker import Failed


def run(session):
    """Measure each vocabulary that was given."""
    options = session.options
    text = options.text or session.folder / "text.txt"
    if options.text is None:
        text.write_bytes(installed_text())
    (session.folder / "word.txt").write_text("word\n")
    for vocabulary, folder in (("bpe", options.vocabulary), ("wordpiece", options.wordpiece)):
        if folder is not None:
            measure(session, vocabulary, folder, text)


def measure(session, vocabulary, folder, text):
    """Measure all encoders of a vocabulary, with one thread and with all cores."""
    size = text.stat().st_size / 1e6
    tools = [
        n for n in ENCODERS if n in session.options.only and (n != "base" or n in session.tools)
    ]
    tools = [n for n in tools if (vocabulary, n) != ("wordpiece", "tiktoken")]
    pairs = [(n, f"{t} thread{'s' * (t > 1)}") for n in tools for t in sorted({1, CORES})]

    def one(pair, number):
        tool, threads = pair[0], pair[1].split()[0]
        if tool in OWN:
            return ours(session, tool, folder, text, threads)
        kind = vocabulary if vocabulary == "wordpiece" else tool
        words = [HERE / "encoders.py", kind, folder, text, "ids.npy", threads]
        figures, _, out, _ = session.run(tool, *words)
        reply = json.loads(out)
        loading = {"loading": reply["loading"]}
        return {"rate": size / reply["seconds"], "peak": figures["peak"], **loading}

    session.rounds("encode", f"{vocabulary}, {size:.1f} MB", pairs, one, size="")


def ours(session, tool, folder, text, threads):
    """Return the figures of `gpt2cli encode`, without those of a file with one word."""
    where = ["--models_dir", folder.parent, "--model_name", folder.name, "--workers", threads]
    words = ["-m", "gpt2cli", "encode"]
    nothing, *_ = session.run(tool, *words, "word.txt", "ids.npy", *where)
    figures, *_ = session.run(tool, *words, text, "ids.npy", *where)
    seconds = figures["seconds"] - nothing["seconds"]
    if seconds < nothing["seconds"]:
        raise Failed("the text is too short: the start of the command dominates")
    return {"rate": text.stat().st_size / 1e6 / seconds, "peak": figures["peak"]}


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

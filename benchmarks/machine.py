"""The machine: its processor, and the instruction sets that decide how fast products are."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
CORES = len(os.sched_getaffinity(0))
FLAGS = {  # of /proc/cpuinfo -> the name that people use
    "avx2": "AVX2",
    "avx512bw": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_tile": "AMX",
    "asimddp": "dot products",
    "i8mm": "I8MM",
    "bf16": "BF16",
}


def cpuinfo(name):
    """Return the first value of a name in /proc/cpuinfo, or an empty text."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def flags():
    """Return the instruction sets of FLAGS that this processor has."""
    known = (cpuinfo("flags") or cpuinfo("Features")).split()
    return [flag for flag in FLAGS if flag in known]


def describe():
    """Return a line: the date, the processor, and the commit that is measured."""
    cpu = cpuinfo("model name") or platform.processor() or platform.machine()
    has = ", ".join(FLAGS[flag] for flag in flags()) or "no known vector instructions"
    python = f"Python {platform.python_version()}"
    return f"{datetime.date.today()}, {CORES} cores of {cpu} ({has}), {python}, commit {commit()}"


def commit(checkout=ROOT):
    """Return the commit of a checkout; where it has none, the folder's name."""
    if not (checkout / ".git").exists():
        return checkout.name
    words = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or checkout.name

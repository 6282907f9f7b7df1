"""The processor, and the cores and memory this process may use, without TensorFlow."""

import contextlib
import itertools
import math
import os
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cores() -> int:
    """Return the number of cores this process may use, within its affinity and container limit."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no limit
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, math.ceil(quota / period))
    return max(count, 1)


def processor() -> tuple[str, list[str]]:
    """Return the processor's name, and its instruction sets as Linux names them; empty if unknown.

    Only x86 has instruction sets here: other processors list them under another name.
    """
    text = ""
    with contextlib.suppress(OSError), CPUINFO.open() as lines:
        text = "".join(itertools.takewhile(str.strip, lines))  # the first core's
    name = re.search(r"^model name\s*: (.*)", text, re.M)
    flags = re.search(r"^flags\s*: (.*)", text, re.M)
    return name[1] if name else "", flags[1].split() if flags else []


def gains_by_bfloat16() -> bool | None:
    """Return whether this processor multiplies bfloat16 faster than float32; None if unknown.

    AMX does. So does AVX512-BF16 on AMD's processors. On Intel's without AMX it is slower: one
    with AVX512-BF16 made 76 GFLOP/s a core in bfloat16 and 130 in float32 with TensorFlow 2.21.
    """
    name, flags = processor()
    if not flags:
        return None
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AMD" in name)


def free_memory() -> int | None:
    """Return the bytes of memory this process may still use; None if unknown."""
    free = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(1024 * int(line.split()[1]))
    # a container's own limit; "max" is none
    with contextlib.suppress(OSError, ValueError, KeyError):
        used, most, state = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("current", "max", "stat")
        )
        parts = dict(line.split() for line in state.splitlines())
        # the system's copies of files count as used, but it drops them as soon as memory is needed
        copies = int(parts["active_file"]) + int(parts["inactive_file"])
        free.append(int(most) - int(used) + copies)
    return min(free, default=None)

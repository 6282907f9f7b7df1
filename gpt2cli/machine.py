"""The cores and the memory that this process may use, told without TensorFlow."""

import contextlib
import os
from pathlib import Path


def cores():
    """Processors that this process may use, by its affinity and by a container's limit."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no limit
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, -(-quota // period))
    return max(count, 1)


def free_memory():
    """Bytes of main memory that this process may still take; None where that cannot be told."""
    free = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" is none
        used, most = (Path(f"/sys/fs/cgroup/memory.{n}").read_text() for n in ("current", "max"))
        free.append(int(most) - int(used))
    return min(free, default=None)

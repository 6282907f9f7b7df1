"""What this process may use: processor, memory, GPUs. Nothing here imports TensorFlow."""

import contextlib
import itertools
import math
import os
import re
import sys
from importlib import util
from pathlib import Path

from gpt2cli.errors import UserError

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


def gpus() -> list[str]:
    """Return CUDA's names of the GPUs that this process may use, without loading TensorFlow."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    with contextlib.suppress(OSError):
        found = [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
        return [str(number) for number in range(len(found))]
    return []


def has_tensorflow() -> bool:
    """Return whether TensorFlow is installed; it may be left out where models are only used."""
    return "tensorflow" in sys.modules or util.find_spec("tensorflow") is not None


def check_tensorflow(what: str) -> None:
    """Reject work that needs TensorFlow where it is not installed.

    Args:
        what: the work, as the subject of a sentence, such as "train".

    Raises:
        UserError: it is not installed.
    """
    if not has_tensorflow():
        raise UserError(
            f"{what} needs TensorFlow, which is not installed. Install it with: pip install "
            "tensorflow; with Docker, use the whole image: docker build -f Dockerfile.cpu ."
        )


def may_have_gpu() -> bool:
    """Return whether TensorFlow may find a GPU here; only TensorFlow can tell for certain."""
    if gpus():
        return True
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return False
    # NVIDIA's in Windows' Linux; AMD's; Apple's, which needs a plug-in
    is_there = any(os.path.exists(device) for device in ("/dev/dxg", "/dev/kfd"))
    plugins = (os.path.isdir(os.path.join(path, "tensorflow-plugins")) for path in sys.path)
    return is_there or any(plugins)

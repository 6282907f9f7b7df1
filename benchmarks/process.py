"""What the operating system knows about a running process: memory and CPU time."""

import os
import re
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def _kilobytes(text, name):
    return int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024 / 1e9


def peak(pid):
    """Return the peak resident memory so far, in GB, loading included."""
    return _kilobytes(Path(f"/proc/{pid}/status").read_text(), "VmHWM")


def memory(pid):
    """Return the memory in GB: now, peak, private, shared, and the part that files back.

    A page of a file that one process maps counts as private, and the system may drop it.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    pages = {name: _kilobytes(text, name) for name in re.findall(r"^(\w+):", text, re.MULTILINE)}
    return {
        "now": pages["Rss"],
        "peak": peak(pid),
        "private": pages["Private_Clean"] + pages["Private_Dirty"],
        "shared": pages["Shared_Clean"] + pages["Shared_Dirty"],
        "files": pages["Rss"] - pages["Anonymous"],
    }


def cpu(pid):
    """Return the user and the system CPU seconds of all threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return {"user": int(fields[11]) / TICKS, "system": int(fields[12]) / TICKS}

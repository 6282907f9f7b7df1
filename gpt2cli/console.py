"""The conversation on standard error: one line at a time, and a progress bar on a terminal."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

# Whether TensorFlow's own messages are shown; set from --verbose before TensorFlow is imported.
verbose = False


def say(text: str) -> None:
    """Print a line to standard error; standard output is for results alone."""
    print(text, file=sys.stderr, flush=True)


def progress(
    total: int, unit: str, done: int = 0, items: Iterable[Any] | None = None
) -> "tqdm[Any]":
    """Return a progress bar that shows on a terminal only, never in a log file.

    Args:
        total: amount of work, in units; bytes are scaled to kB, MB, ...
        unit: "B" for bytes, or a word with a space before it.
        done: amount of work that an earlier process did.
        items: what the bar yields when it is iterated over, one unit each.
    """
    from tqdm import tqdm

    scaled = unit == "B"
    return tqdm(
        items, total=total, initial=done, unit=unit, unit_scale=scaled, disable=None, leave=False
    )


def counted(number: int, noun: str) -> str:
    """Return `1,234 tokens` or `1 token`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

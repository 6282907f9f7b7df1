"""The conversation on standard error: one line at a time, and a progress bar on a terminal."""

import os
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

# Whether TensorFlow's own messages are shown; set from --verbose before TensorFlow is imported.
verbose = False
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def say(text: str) -> bool:
    """Print a line to standard error; standard output is for results alone.

    A message that cannot be printed, as on a full disk, ends no work. Control characters that a
    server or a file put into it are made visible.

    Returns:
        False if nobody reads the messages any more: their pipe is closed.
    """
    try:
        print(visible(text), file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # for what is still buffered
        return False
    except OSError:
        pass
    return True


def visible(text: str) -> str:
    """Return a text with its control characters, but line ends and tabs, as escapes."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


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

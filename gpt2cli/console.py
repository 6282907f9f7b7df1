"""The conversation on standard error: one line at a time, and a progress bar on a terminal."""

import contextlib
import os
import re
import select
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

# Whether TensorFlow's own messages are shown; set from --verbose before TensorFlow is imported.
verbose = False
# Characters that are invisible, or that change how a terminal shows the rest of a message: control
# characters except tabs, line and paragraph separators, zero-width spaces and joiners, the
# directional controls of Unicode's UAX #9 that reorder text, tags, and lone surrogates. The joiners
# U+200C and U+200D and the marks U+200E, U+200F and U+061C are ordinary in Persian, Hebrew, Arabic
# and emoji.
HIDDEN = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f\ud800-\udfff]"
)
LONGEST = 2000  # characters of a line; nobody reads a longer one


class Lost:
    """Messages that could not be printed.

    Attributes:
        count: their number.
        reason: why the last one could not be printed.
        stream: a standard error whose reader has exited.
    """

    def __init__(self) -> None:
        self.stream: Any = None
        self.forget()

    def forget(self) -> None:
        """Count from 0, for a new command."""
        self.count, self.reason = 0, ""

    def add(self, reason: str) -> None:
        """Count a message."""
        self.count += 1
        self.reason = reason


lost = Lost()


def say(text: str, *more: str) -> bool:
    """Print a line, or several, to standard error; standard output is for results alone.

    A message that cannot be printed, for example on a full disk, does not end the command; `lost`
    counts it. HIDDEN characters, which may come from a server or a file, are printed as escapes.

    Returns:
        False if nobody reads the messages any more: their pipe is closed.
    """
    if sys.stderr is None or sys.stderr is lost.stream:
        lost.add(lost.reason or "standard error is closed")
        return sys.stderr is None
    try:
        print("\n".join(map(visible, (text, *more))), file=sys.stderr, flush=True)
    except BrokenPipeError:
        lost.add("nobody reads standard error")
        lost.stream = sys.stderr
        _to_null(sys.stderr)
        return False
    except (OSError, ValueError, RuntimeError) as error:
        # ValueError: a Python program closed it. RuntimeError: a signal interrupted another line
        lost.add(getattr(error, "strerror", None) or str(error))
        drop(sys.stderr)
    return True


def drop(stream: Any) -> None:
    """Discard what a stream could not write, so that it does not fail again at the next line."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        kept = os.dup(stream.fileno())
        try:
            _to_null(stream)
            stream.flush()
        finally:
            os.dup2(kept, stream.fileno())
            os.close(kept)


def stop_waiting() -> None:
    """Discard further output if its reader has paused, as `less` does: the command must end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if not select.select([], [stream.fileno()], [], 0)[1]:
                _to_null(stream)
                if stream is sys.stderr:
                    lost.add("nobody reads standard error")
                    lost.stream = stream


def _to_null(stream: Any) -> None:
    """Connect a stream to the null device."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def visible(text: str) -> str:
    """Return a text as one line: HIDDEN characters as escapes, the middle of a long text cut."""
    if len(text) > LONGEST:
        left = LONGEST // 2
        text = f"{text[:left]} ... ({len(text) - 2 * left:,} characters) ... {text[-left:]}"
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


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


def _temporary_file() -> IO[bytes]:
    """Return an unnamed file; the null device if every disk is full."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Hold back everything written to standard error; show it only if the block fails.

    TensorFlow's and LiteRT's libraries log while they are loaded, before they read any setting.
    With --verbose nothing is held back.
    """
    if verbose:
        yield
        return
    real = os.dup(2)
    with _temporary_file() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # a message must not hide the error
                noise.seek(0)
                os.write(real, noise.read())
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)

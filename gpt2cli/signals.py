"""Requests to stop: Ctrl-C (SIGINT), SIGTERM, and SIGHUP from a terminal that closes.

The first request raises an exception in the main thread. Where the work must be saved first, it is
only noted (`noted`). The second one ends the process at once, even during a long TensorFlow call.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from gpt2cli import console

ENDED = 128  # a shell adds this to a signal's number in an exit status
SAME = 0.5  # seconds: `timeout`, systemd and a closing terminal send two signals for one request
AGAIN = "run the same command again"  # for messages
LEAVE = 1.0  # seconds after a second request in which unfinished files can be removed


class Stopped(SystemExit):
    """A signal other than a first Ctrl-C stopped the command.

    Attributes:
        number: the signal.
        name: its name for messages.
        is_second: whether to end at once, without the libraries' work at exit.
    """

    def __init__(self, number: int, is_second: bool = False) -> None:
        super().__init__(ENDED + number)
        self.number, self.is_second = number, is_second
        self.name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Stop:
    """A request to stop; `received` is the number of its first signal, or 0."""

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0  # time.monotonic()

    def count(self, number: int) -> int:
        """Note a signal; return 1 for the first request, 2 for a later one, 0 for a duplicate."""
        now = time.monotonic()
        if not self.received:
            self.received, self._at = number, now
            return 1
        return 0 if now - self._at < SAME else 2


class _Requests:
    """The requests of this process.

    Attributes:
        handled: as the main thread handles them, between two steps of Python.
        arrived: as they arrive, also during a long call of a library.
        is_noting: whether the main thread is inside `noted`.
        answer: the line to print there.
        raised: the signal that raised an exception, or 0.
        is_watched: whether this process is a command; the thread of `install` runs.
    """

    def __init__(self) -> None:
        self.handled, self.arrived = Stop(), Stop()
        self.is_noting, self.answer = False, ""
        self.raised = 0
        self.is_watched = False


_requests = _Requests()


def install() -> Callable[[], None]:
    """Let the signals stop the command that this process runs.

    Ctrl-C and SIGTERM stop it even if they are ignored at the start: a shell script starts its
    background commands with SIGINT ignored, but may send it to them, and a container's first
    process ignores every signal for which it has no handler.

    Returns:
        A function that restores the handlers, for a Python program that continues afterwards.
    """
    _requests.handled, _requests.arrived, _requests.raised = Stop(), Stop(), 0
    before = {number: signal.signal(number, _handle) for number in _numbers()}
    reader, writer = os.pipe()
    if hasattr(os, "set_blocking"):  # Windows has it from Python 3.12 on, and needs it nowhere
        os.set_blocking(writer, False)
    others = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    was_watched, _requests.is_watched = _requests.is_watched, True
    threading.Thread(target=_watch, args=[reader], daemon=True).start()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requests.is_watched = was_watched
        signal.set_wakeup_fd(others)
        os.close(writer)  # which ends the thread

    return restore


@contextlib.contextmanager
def noted(answer: str = "") -> Iterator[Stop]:
    """Only note the first request while the block runs; the block must check the Stop.

    Args:
        answer: the line to print when it arrives, if any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Stop()  # Python handles signals in the main thread alone
        return
    if not _requests.is_watched:  # in a Python program: its own handlers had the earlier ones
        _requests.handled = Stop()
    _requests.is_noting, _requests.answer = True, answer
    # also in a process that called `install`: TensorFlow takes SIGTERM on several hosts
    before = {number: signal.signal(number, _handle) for number in _numbers()}
    try:
        yield _requests.handled
    finally:
        _requests.is_noting = False
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """In a command, raise the exception of a request only at the end of the block.

    In another Python program its own handlers decide.
    """
    if not _requests.is_watched:
        yield
        return
    with noted() as stop:
        yield
    if stop.received:
        raise stopped(stop.received)


def check() -> None:
    """Raise a request's exception again, if a library has replaced it by one of its own."""
    if _requests.raised:
        raise stopped(_requests.raised)


def stopped(number: int) -> BaseException:
    """Return the exception with which a command ends after a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


@contextlib.contextmanager
def leaving(describe: Callable[[], str]) -> Iterator[None]:
    """If the block is stopped, print the line that says what is kept and how to resume."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        console.say(describe())
        raise


def keep_ctrl_c() -> None:
    """From now on, let each Ctrl-C raise KeyboardInterrupt, which the command handles itself."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _numbers() -> list[int]:
    """Return the signals that are requests to stop.

    Under nohup, SIGHUP is not one. Nor is a signal that a program handles in C, for which Python
    returns None: Python could not restore that handler.
    """
    found = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        found.append(signal.SIGHUP)  # Windows has none
    return [int(number) for number in found if signal.getsignal(number) is not None]


def _handle(number: int, frame: FrameType | None) -> None:
    order = _requests.handled.count(number)
    if not order:
        return
    if _requests.is_watched:  # another program's output is not this module's
        console.stop_waiting()
    if _requests.is_noting and order == 1:
        if _requests.answer:
            console.say(_requests.answer)
        return
    _requests.raised = number
    # not a second KeyboardInterrupt: where the first is handled, nothing expects another
    is_second = order > 1 and _requests.is_watched
    raise Stopped(number, is_second) if is_second else stopped(number)


def _watch(reader: int) -> None:
    """End the process after a second request, if the main thread does not."""
    while received := os.read(reader, 1):
        number = received[0]
        is_ours = signal.getsignal(number) is _handle  # interactive uses Ctrl-C for something else
        if is_ours and _requests.arrived.count(number) > 1:
            time.sleep(LEAVE)
            os._exit(ENDED + number)
    os.close(reader)

"""Requests that share a running batch: their rows join between two steps and leave when finished.

One thread owns the model and reports each Job's progress. A text depends on its seed and number
alone, not on the texts beside it.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gpt2cli.inference.generator import STREAMED, LanguageModel
from gpt2cli.inference.rows import Generation, Row

LOG = logging.getLogger(__name__)


class Full(Exception):
    """The queue is full."""


class Piece(NamedTuple):
    """The part of a Job's text that is new."""

    number: int  # which of the Job's texts
    text: str = ""  # new characters; no stop text can take them back
    begin: int = 0  # index of the first new token among the text's tokens
    end: int = 0  # index after the last new token
    done: bool = False  # this is the last piece
    error: str | None = None  # why it broke off: "timeout" or "failure"


Report = Callable[[list[Piece]], None]


class Job:
    """A request's texts.

    Args:
        model: the model of the texts.
        rows: of its texts, from `model.begin`; not yet in any Generation.
        report: receives new Pieces, on the scheduler's thread.
        seconds: time limit, including the time in the queue.
        streams: report texts while they grow, not only when they are finished.

    Attributes:
        first: time.monotonic() of its first token, or None.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: list[Row],
        report: Report,
        seconds: float,
        streams: bool = False,
    ) -> None:
        self.model, self.rows, self.streams, self._report = model, rows, streams, report
        self.deadline = time.monotonic() + seconds
        self.first: float | None = None
        self._reported = [0] * len(rows)  # tokens
        # only the scheduler's thread uses this and the rows
        self._over = [False] * len(rows)

    def is_over(self) -> bool:
        """Return whether there is nothing more to report."""
        return all(self._over)

    def grown(self, numbers: Iterable[int]) -> None:
        """Report the new part of each of these texts."""
        self.first = self.first or time.monotonic()
        pieces = []
        for number in numbers:
            row = self.rows[number]
            begin, end, done = self._reported[number], row.generated, row.finished
            if self._over[number] or not (self.streams or done):
                continue
            pieces.append(Piece(number, row.text.fresh(done), begin, end, done))
            self._reported[number], self._over[number] = end, done
        if pieces:
            self._report(pieces)

    def stop(self, error: str | None = None) -> None:
        """Take its rows out of the batch and report the error, if any, as the last thing."""
        for row in self.rows:
            row.finished = True
        if error and not self.is_over():
            left = [number for number, over in enumerate(self._over) if not over]
            self._report([Piece(number, done=True, error=error) for number in left])
        self._over = [True] * len(self.rows)
        # the receiver holds the job: a reference cycle would keep the model in memory
        self._report = lambda pieces: None


class Scheduler:
    """Lets Jobs share a batch.

    Args:
        width: rows generated side by side.
        queue: texts that may wait for a place.
    """

    def __init__(self, width: int, queue: int) -> None:
        self.width, self.queue = width, queue
        self._change = threading.Condition()
        self._waiting: collections.deque[tuple[Job, int]] = collections.deque()  # number of a text
        self._running: dict[Row, tuple[Job, int, float]] = {}  # and when it began
        self._batches: dict[LanguageModel, Generation] = {}
        self._cancelled: list[Job] = []
        self._closing = False
        self._pace = 1.0  # seconds that a text takes, a moving average
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Start a Job as soon as there are places; raises Full if too many texts wait."""
        with self._change:
            total = len(self._waiting) + len(self._running) + len(job.rows)
            if total > self.width + self.queue:
                raise Full
            self._waiting.extend((job, number) for number in range(len(job.rows)))
            self._change.notify()

    def cancel(self, job: Job) -> None:
        """Free a Job's places before the next step: its client is gone or has its answer."""
        with self._change:
            self._cancelled.append(job)
            self._change.notify()

    def is_alive(self) -> bool:
        """Return whether the scheduler's thread is running."""
        return self._thread.is_alive()

    def counts(self) -> tuple[int, int]:
        """Return the number of texts in the batch, and of those that wait."""
        with self._change:
            return len(self._running), len(self._waiting)

    def seconds_until_room(self) -> int:
        """Return an estimate of the seconds after which the queue has room."""
        with self._change:
            return max(1, round(self._pace * len(self._waiting) / self.width))

    def close(self) -> None:
        """Finish everything that was submitted, then end the thread."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._round():
            pass

    def _round(self) -> bool:
        """Wait for work and do one step of it; return False when the thread must end.

        A method of its own, so that no local variable keeps an old model alive while it waits.
        """
        with self._change:
            while not (self._waiting or self._running or self._cancelled or self._closing):
                self._change.wait()
            if not (self._waiting or self._running or self._cancelled):
                return False
            begun = self._admit()
        for model, rows in begun.items():
            if model not in self._batches:
                self._batches[model] = Generation(model.network, width=self.width)
            self._batches[model].add(rows)
        for model, batch in list(self._batches.items()):
            try:
                self._report(batch.step(STREAMED))
                finished = batch.is_empty()
            except (
                Exception
            ):  # a bug, or out of memory; other models' texts and later ones continue
                LOG.exception("a step of the model failed")
                for job in {job for job, *_ in self._running.values() if job.model is model}:
                    job.stop("failure")
                finished = True
            if finished:
                del self._batches[model]
        self._forget_finished()
        return True

    def _admit(self) -> dict[LanguageModel, list[Row]]:
        """Move waiting texts to free places; return them by model."""
        now = time.monotonic()
        begun: dict[LanguageModel, list[Row]] = {}
        while self._cancelled:
            self._cancelled.pop().stop()
        jobs = {job for job, _ in self._waiting} | {job for job, _, _ in self._running.values()}
        for job in jobs:
            if now > job.deadline:
                job.stop("timeout")
        self._waiting = collections.deque(pair for pair in self._waiting if not pair[0].is_over())
        while self._waiting and len(self._running) < self.width:
            job, number = self._waiting.popleft()
            row = job.rows[number]
            self._running[row] = job, number, now
            begun.setdefault(job.model, []).append(row)
        return begun

    def _report(self, grown: Iterable[Row]) -> None:
        """Report texts that grew to their Jobs."""
        numbers: dict[Job, list[int]] = {}
        for row in grown:
            job, number, _ = self._running[row]
            numbers.setdefault(job, []).append(number)
        for job, its in numbers.items():
            job.grown(its)

    def _forget_finished(self) -> None:
        now = time.monotonic()
        with self._change:
            for row in [row for row in self._running if row.finished]:
                *_, began = self._running.pop(row)
                self._pace += 0.1 * (now - began - self._pace)

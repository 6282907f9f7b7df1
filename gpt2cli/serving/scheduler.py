"""Requests that share a running batch: their rows join it between two steps and leave when done.

One thread owns the model; whoever submits a Job is told of its texts from that thread. What a text
becomes depends on its seed and number alone, not on what else runs.
"""

import collections
import sys
import threading
import time
import traceback
from typing import NamedTuple

from gpt2cli.inference.generator import STREAMED
from gpt2cli.inference.rows import Generation


class Full(Exception):
    """No place in the queue; `seconds` says when it may be worth another try."""

    def __init__(self, seconds):
        super().__init__("the queue is full")
        self.seconds = seconds


class Piece(NamedTuple):
    """What is new of one text of a Job.

    number: which of its texts.
    text: the new text, which a stop text can no longer take back.
    begin, end: the new tokens' places among the text's.
    done: nothing more comes.
    error: why it broke off: "timeout" or "failure".
    """

    number: int
    text: str = ""
    begin: int = 0
    end: int = 0
    done: bool = False
    error: str | None = None


class Job:
    """A request.

    Args:
        model: the inference.LanguageModel that its texts are of.
        rows: Rows from `model.begin`, not yet in any Generation.
        tell: function of a list of Pieces, called on the scheduler's thread.
        seconds: that it may take, with its time in the queue.
        streams: tell of texts while they grow, and not only when they are done.

    Attributes:
        first: time.monotonic of its first token, or None.
    """

    def __init__(self, model, rows, tell, seconds, streams=False):
        self.model, self.rows, self.streams, self._tell = model, rows, streams, tell
        self.deadline = time.monotonic() + seconds
        self.first = None
        self._told = [0] * len(rows)  # tokens
        self._over = [False] * len(rows)  # this and the rows are the scheduler's thread's alone

    def is_over(self):
        """Whether nothing more is to be told."""
        return all(self._over)

    def grown(self, numbers):
        """Tell what is new of these texts."""
        self.first = self.first or time.monotonic()
        pieces = []
        for number in numbers:
            row = self.rows[number]
            begin, end, done = self._told[number], row.generated, row.finished
            if self._over[number] or not (self.streams or done):
                continue
            pieces.append(Piece(number, row.text.fresh(done), begin, end, done))
            self._told[number], self._over[number] = end, done
        if pieces:
            self._tell(pieces)

    def stop(self, error=None):
        """Take its rows out of the batch; with an error tell of that. Nothing is told any more."""
        for row in self.rows:
            row.finished = True
        if error and not self.is_over():
            left = [number for number, over in enumerate(self._over) if not over]
            self._tell([Piece(number, done=True, error=error) for number in left])
        self._over = [True] * len(self.rows)
        self._tell = _nobody  # who asked holds the job: a circle would keep the model in memory


def _nobody(pieces):
    pass


class Scheduler:
    """Lets Jobs share a batch.

    Args:
        width: rows that grow side by side.
        queue: texts that may wait for a place among them.
    """

    def __init__(self, width, queue):
        self.width, self.queue = width, queue
        self._change = threading.Condition()
        self._waiting = collections.deque()  # (Job, number of its text)
        self._running = {}  # Row -> (Job, number, when it began)
        self._batches = {}  # Model -> Generation
        self._cancelled = []
        self._closing = False
        self._pace = 1.0  # seconds that a text takes, of late
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, job):
        """Let a Job begin as soon as there are places; Full if too many wait."""
        with self._change:
            total = len(self._waiting) + len(self._running) + len(job.rows)
            if total > self.width + self.queue:
                raise Full(max(1, round(self._pace * len(self._waiting) / self.width)))
            self._waiting.extend((job, number) for number in range(len(job.rows)))
            self._change.notify()

    def cancel(self, job):
        """Nobody waits for this Job any more: its places are free from the next step on."""
        with self._change:
            self._cancelled.append(job)
            self._change.notify()

    def is_alive(self):
        """Whether there is somebody to do the work."""
        return self._thread.is_alive()

    def counts(self):
        """Texts in the batch, and those that wait."""
        with self._change:
            return len(self._running), len(self._waiting)

    def close(self):
        """Finish all that was submitted, then end the thread."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()

    def _work(self):
        while self._round():
            pass

    def _round(self):
        """Wait for work and do a step of it; False when it is time to leave.

        A method, so that nothing keeps a model that is no longer served while there is no work.
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
                grown = batch.step(STREAMED)
                self._tell(grown)
            except Exception:  # ours, or no memory: other models' texts and later ones go on
                traceback.print_exc(file=sys.stderr)
                for job in {job for job, *_ in self._running.values() if job.model is model}:
                    job.stop("failure")
                batch = None
            if batch is None or batch.is_empty():
                del self._batches[model]
        self._forget_finished()
        return True

    def _admit(self):
        """Move what waits to the places that are free; {Model: Rows}."""
        now, begun = time.monotonic(), {}
        while self._cancelled:
            self._cancelled.pop().stop()
        for job in {job for job, *_ in (*self._waiting, *self._running.values())}:
            if now > job.deadline:
                job.stop("timeout")
        self._waiting = collections.deque(pair for pair in self._waiting if not pair[0].is_over())
        while self._waiting and len(self._running) < self.width:
            job, number = self._waiting.popleft()
            row = job.rows[number]
            self._running[row] = job, number, now
            begun.setdefault(job.model, []).append(row)
        return begun

    def _tell(self, grown):
        """Tell whose Rows these are."""
        told = {}
        for row in grown:
            job, number, _ = self._running[row]
            told.setdefault(job, []).append(number)
        for job, numbers in told.items():
            job.grown(numbers)

    def _forget_finished(self):
        now = time.monotonic()
        with self._change:
            for row in [row for row in self._running if row.finished]:
                *_, began = self._running.pop(row)
                self._pace += 0.1 * (now - began - self._pace)

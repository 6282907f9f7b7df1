"""What a run tells of itself while it is trained: log.jsonl, and TensorBoard's event file."""

import contextlib
import json
import math
import sys
from pathlib import Path

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.tensorflow import tf


class Journal:
    """The two files of a run folder, which grow line by line.

    Args:
        folder: the run's folder.
        step: lines of log.jsonl after this step are another run's, or of steps that are taken
            again, and go when the first line is written.
        always: what every line of log.jsonl says besides.
        holds: keep the lines of log.jsonl back until `release`.
    """

    def __init__(self, folder, step, always, holds=False):
        self.path, self._step, self._always = Path(folder) / "log.jsonl", step, always
        self._holds, self._held = holds, ""
        self._last = self._written = step
        # tf.summary.scalar would need TensorBoard installed
        self._events = tf.summary.create_file_writer(str(folder))

    def write(self, step, **values):
        """Record named numbers of a step."""
        self._with_events(lambda: self._write_events(step, values))
        plain = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._held += json.dumps({"step": step, **self._always, **plain}) + "\n"
        self._last = step
        if not self._holds:
            self._write_lines()

    def release(self):
        """Write the lines that were kept back, and each from now on as it comes."""
        self._holds = False
        if self._held:
            self._write_lines()

    def _write_lines(self):
        try:
            if self._step is not None and self.path.exists():
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(True)
                with files.replacing(self.path, "w", encoding="utf-8") as file:
                    file.writelines(text for text in lines if self._stays(text))
            self._step = None
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._held)
            self._held, self._written = "", self._last
        except (OSError, UserError):  # a full disk is told of at the next save
            self._step = self._written  # what was written of these lines is taken out first

    def _stays(self, line):
        """Whether a line is whole, which the last of a killed run may not be, and of before."""
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            return line.endswith("\n") and json.loads(line)["step"] <= self._step
        return False

    def _write_events(self, step, values):
        for name, value in values.items():
            tf.raw_ops.WriteScalarSummary(
                writer=self._events._resource,
                step=tf.constant(step, tf.int64),
                tag=name,
                value=value,
            )

    def _with_events(self, work):
        """Do it; where the file cannot be written say so once, and go on without it."""
        if self._events is None:
            return
        try:
            work()
        except tf.errors.OpError as error:
            self._events = None
            reason = str(error).partition("\n")[0][:150]
            print(f"TensorBoard's events are no longer written: {reason}", file=sys.stderr)

    def close(self):
        """Write out what is buffered."""
        self._with_events(lambda: self._events.close())

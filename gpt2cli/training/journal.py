"""The records of a run in training: log.jsonl and TensorBoard's event file.

No other module uses private attributes of tf.summary. `_resource` of its file writer was tried with
TensorFlow 2.21: tf.summary.scalar would need TensorBoard installed.
"""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2cli import files
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.tensorflow import tf


class Journal:
    """The two files of a run folder, which grow line by line.

    Args:
        folder: the run's folder.
        step: the step at which the run starts. Lines of log.jsonl after it belong to another run,
            or to steps that are taken again; the first new line replaces them.
        always: further fields of every line of log.jsonl.
        holds: hold back the lines of log.jsonl until `release`.
    """

    def __init__(
        self, folder: str | Path, step: int, always: dict[str, Any], holds: bool = False
    ) -> None:
        self.path = Path(folder) / "log.jsonl"
        self._step: int | None = step
        self._always = always
        self._holds = holds
        self._held = ""
        self._last = self._written = step
        self._events = tf.summary.create_file_writer(str(folder))

    def write(self, step: int, **values: float) -> None:
        """Record named numbers of a step; one that is not finite is null in log.jsonl."""
        self._with_events(lambda: self._write_events(step, values))
        self.note(step, **{name: v if math.isfinite(v) else None for name, v in values.items()})

    def note(self, step: int, **values: Any) -> None:
        """Add a line to log.jsonl, but nothing to the events."""
        self._held += json.dumps({"step": step, **self._always, **values}) + "\n"
        self._last = step
        if not self._holds:
            self._write_lines()

    def release(self) -> None:
        """Write the lines held back, and from now on each line at once."""
        self._holds = False
        if self._held:
            self._write_lines()

    def _write_lines(self) -> None:
        try:
            if self._step is not None and self.path.exists():
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(True)
                with files.replacing(self.path, "w", encoding="utf-8") as file:
                    file.writelines(text for text in lines if self._stays(text))
            self._step = None
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._held)
            self._held, self._written = "", self._last
        except (OSError, UserError):  # the next save reports a full disk
            self._step = self._written  # the next try first removes half-written lines

    def _stays(self, line: str) -> bool:
        """Whether a line is complete, and not after the step at which the run starts."""
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            return line.endswith("\n") and json.loads(line)["step"] <= self._step
        return False

    def _write_events(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            tf.raw_ops.WriteScalarSummary(
                writer=self._events._resource,
                step=tf.constant(step, tf.int64),
                tag=name,
                value=value,
            )

    def _with_events(self, work: Callable[[], Any]) -> None:
        """Do the work; report the first failure, and then continue without events."""
        if self._events is None:
            return
        try:
            work()
        except tf.errors.OpError as error:
            self._events = None
            reason = str(error).partition("\n")[0][:150]
            say(f"TensorBoard events are no longer written: {reason}")

    def close(self) -> None:
        """Flush the events."""
        self._with_events(lambda: self._events.close())

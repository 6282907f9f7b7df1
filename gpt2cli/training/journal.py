"""The records of a run in training: log.jsonl and TensorBoard's event file.

No other module uses private attributes of tf.summary. `_resource` of its file writer was tried with
TensorFlow 2.21: tf.summary.scalar would need TensorBoard installed.
"""

import contextlib
import json
import math
import secrets
from collections.abc import Callable
from typing import IO, Any

from gpt2cli import files, paths
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.storage.checkpoint import reason_of
from gpt2cli.storage.held import HeldFolder
from gpt2cli.tensorflow import tf

LOG = "log.jsonl"


class Journal:
    """The two files of a run folder, which grow line by line.

    Args:
        place: the run's folder.
        step: the step at which the run starts. Lines of log.jsonl after it belong to another run,
            or to steps that are taken again; the first new line replaces them.
        always: further fields of every line of log.jsonl.
        holds: hold back the lines of log.jsonl until `release`.
    """

    def __init__(
        self, place: HeldFolder, step: int, always: dict[str, Any], holds: bool = False
    ) -> None:
        self._place = place
        self._step: int | None = step
        self._always = always
        self._holds = holds
        self._held = self._reported = ""
        self._last = self._written = step
        with contextlib.suppress(FileNotFoundError), self._open("rb"):
            pass  # before the first step, reject a log that others may have prepared
        self._events: Any = ""  # not None, so that a failure is reported
        self._with_events(self._open_events)

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
        if not self._place.find():
            return  # the next save moves the run
        is_new_try = self._step is not None
        try:
            if self._step is not None:
                self._remove_lines()
            self._step = None
            with self._open("ab") as file:
                file.write(self._held.encode())
            self._held, self._written = "", self._last
        except (OSError, UserError) as error:  # the next save reports a full disk
            self._step = self._written  # the next try first removes half-written lines
            if is_new_try and isinstance(error, UserError) and not error.__cause__:
                self._report(str(error))

    def _remove_lines(self) -> None:
        """Remove the lines that do not stay from log.jsonl, if there is one."""
        try:
            with self._open("rb") as file:
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return
        path = self._place.path / LOG
        with files.replacing(path, "w", encoding="utf-8") as file:
            file.writelines(line for line in text.splitlines(True) if self._stays(line))

    def _open(self, mode: str) -> IO[Any]:
        return paths.open_own(self._place.path / LOG, mode)

    def _report(self, fault: str) -> None:
        """Print a fault of log.jsonl once."""
        if fault != self._reported:
            say(f"gpt2cli: {fault}. Training continues; once it is removed, the lines are written")
        self._reported = fault

    def _stays(self, line: str) -> bool:
        """Whether a line is complete, and not after the step at which the run starts."""
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            return line.endswith("\n") and json.loads(line)["step"] <= self._step
        return False

    def _open_events(self) -> None:
        # others must not guess the name and put a link there
        suffix = f".{secrets.token_hex(8)}.v2"
        self._events = tf.summary.create_file_writer(str(self._place.path), filename_suffix=suffix)

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
            say(f"TensorBoard events are no longer written: {reason_of(error)[:150]}")

    def close(self) -> None:
        """Flush the events; report lines of log.jsonl that could not be written."""
        self._with_events(lambda: self._events.close())
        if self._held and not self._holds:
            self._write_lines()
        if self._held:
            log = self._place.path / LOG
            say(f"{log} lacks the lines after step {self._written}: it cannot be written")

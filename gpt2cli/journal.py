"""What a run tells of itself while it is trained: log.jsonl, and TensorBoard's event file."""

import contextlib
import json
import math
from pathlib import Path

from gpt2cli import files
from gpt2cli.engine import tf
from gpt2cli.errors import UserError


class Journal:
    """The two files of a run folder, which grow line by line.

    Args:
        folder: the run's folder.
        step: lines of log.jsonl after this step are another run's, or of steps that are taken
            again, and go when the first line is written.
        always: what every line of log.jsonl says besides.
    """

    def __init__(self, folder, step, always):
        self.path, self._step, self._always = Path(folder) / "log.jsonl", step, always
        # tf.summary.scalar would need TensorBoard installed
        self._events = tf.summary.create_file_writer(str(folder))

    def write(self, step, **values):
        """Record named numbers of a step."""
        for name, value in values.items():
            tf.raw_ops.WriteScalarSummary(
                writer=self._events._resource,
                step=tf.constant(step, tf.int64),
                tag=name,
                value=value,
            )
        plain = {name: v if math.isfinite(v) else None for name, v in values.items()}
        line = json.dumps({"step": step, **self._always, **plain}) + "\n"
        with contextlib.suppress(OSError, UserError):  # a full disk is met at the next save
            if self._step is not None and self.path.exists():
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(True)
                with files.replacing(self.path, "w", encoding="utf-8") as file:
                    file.writelines(text for text in lines if self._stays(text))
            self._step = None
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)

    def _stays(self, line):
        """Whether a line is whole, which the last of a killed run may not be, and of before."""
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            return line.endswith("\n") and json.loads(line)["step"] <= self._step
        return False

    def close(self):
        """Write out what is buffered."""
        self._events.close()

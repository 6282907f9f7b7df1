"""The plan of a training run, and its progress."""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2cli.commands.train import TrainOptions


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of a run, fixed before its first step.

    Attributes:
        options: the flags, with a seed, and with --steps in place of --epochs.
        given: the flags with a seed, which train.json records.
        length: tokens of a row.
        rows: rows of a step, on all devices.
        batches: the sampler of batches to learn from.
        held_out: the sampler of batches to validate with, if any.
    """

    options: TrainOptions
    given: TrainOptions
    length: int
    rows: int
    batches: Any
    held_out: Any


@dataclasses.dataclass
class State:
    """The progress of a run, which state-STEP.json records.

    Attributes:
        step: the number of steps taken.
        run: the run's random name.
        running_loss: the average loss as a weighted sum and the sum of the weights.
        best: step and loss of the best validation, or None.
        worse: the number of validations since then.
        due: "validation" and "samples", if they are still to be made at this step.
        kept_at: Unix time at which a checkpoint was last kept for good.
        validation_loss: the loss at this step, if it was measured and is finite.
    """

    step: int
    run: str
    running_loss: list[float]
    best: dict[str, Any] | None
    worse: int
    due: list[str]
    kept_at: float
    validation_loss: float | None = None

    @classmethod
    def read(cls, record: dict[str, Any], val_dataset: str | None) -> State:
        """Read the JSON object of a state file; --val_dataset decides whether its best counts."""
        is_same = record.get("val_dataset") == val_dataset
        return cls(
            step=record["step"],
            run=record.get("run") or secrets.token_hex(8),
            running_loss=record.get("running_loss", [0.0, 0.0]),
            best=record.get("best") if is_same else None,
            worse=record.get("worse", 0) if is_same else 0,
            due=record.get("due", []),
            kept_at=record.get("kept_at", time.time()),
        )

    def record(self, options: TrainOptions) -> dict[str, Any]:
        """Return the JSON object of the state file."""
        fields = dataclasses.asdict(self)
        if self.validation_loss is None:
            del fields["validation_loss"]
        return fields | {"seed": options.seed, "val_dataset": options.validates_with}

    def add_validation(self, loss: float) -> None:
        """Note the validation loss of this step."""
        self.due = [name for name in self.due if name != "validation"]
        self.validation_loss = loss if math.isfinite(loss) else None
        if math.isfinite(loss) and (self.best is None or loss < self.best["loss"]):
            self.best, self.worse = {"step": self.step, "loss": loss}, 0
        else:
            self.worse += 1

"""The plan of a training run, and its progress."""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2cli.commands.train import TrainOptions

# Flags that decide what a run learns. Its state records them, so that a resumed run can name the
# changed ones.
SHAPING = (
    *("sampling", "noise", "batch_size", "accumulate_gradients", "precision", "optimizer"),
    *("learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "clip_norm", "dropout"),
    *("on_nonfinite", "only_train_transformer_layers", "val_batch_size", "val_batch_count"),
)


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
        model: name of the model that the run started from, if it is known.
        text: the fingerprint of the text to train on.
    """

    options: TrainOptions
    given: TrainOptions
    length: int
    rows: int
    batches: Any
    held_out: Any
    model: str | None = None
    text: int = 0

    def shape(self) -> dict[str, Any]:
        """Return everything that decides what the run learns, as the state records it."""
        options = self.options
        shape = {name: getattr(options, name) for name in SHAPING}
        if options.lr_schedule != "constant":  # the rate falls towards the last step
            shape["steps"] = options.steps
        devices = self.rows // (options.batch_size * options.accumulate_gradients)
        shape |= {"seed": options.seed, "seq_length": self.length, "devices": devices}
        return shape | {"text": self.text, "model": self.model}


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

    def record(self, plan: Plan) -> dict[str, Any]:
        """Return the JSON object of the state file."""
        fields, options = dataclasses.asdict(self), plan.options
        if self.validation_loss is None:
            del fields["validation_loss"]
        fields |= {"seed": options.seed, "val_dataset": options.validates_with}
        return fields | {"flags": plan.shape()}

    def add_validation(self, loss: float) -> None:
        """Note the validation loss of this step."""
        self.due = [name for name in self.due if name != "validation"]
        self.validation_loss = loss if math.isfinite(loss) else None
        if math.isfinite(loss) and (self.best is None or loss < self.best["loss"]):
            self.best, self.worse = {"step": self.step, "loss": loss}, 0
        else:
            self.worse += 1


def changes(record: dict[str, Any], plan: Plan) -> list[str]:
    """Describe how the flags and the text of a resumed run differ from those in its state.

    The states of earlier versions have only the seed.
    """
    before = {"seed": record.get("seed"), **record.get("flags", {})}
    now = plan.shape()
    changed = [n for n in now if before.get(n) is not None and before[n] != now[n]]
    words = [
        f"--{name} {now[name]} (was {before[name]})"
        for name in changed
        if name not in ("devices", "text", "model")
    ]
    if "devices" in changed:
        words.append(f"devices {now['devices']} (was {before['devices']})")
    if "text" in changed:
        words.append("another text in --dataset")
    lines = [f"resumed with changes: {', '.join(words)}"] if words else []
    is_larger = {"batch_size", "accumulate_gradients", "devices"} & set(changed)
    if is_larger and plan.options.sampling != "random":
        lines.append(f"the text continues as if each earlier step had read {plan.rows} rows")
    if "text" in changed and plan.options.val_fraction:
        lines.append(
            "--val_fraction holds out other documents than before, so this run may have been "
            "trained on some of them"
        )
    return lines

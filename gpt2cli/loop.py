"""One training run: its steps, and the lines, checkpoints and samples on the way.

training.py takes a step, runs.py finds checkpoints, checkpoint.py writes their files.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, Protocol

from gpt2cli import (
    checkpoint,
    engine,
    files,
    folders,
    graph,
    inference,
    journal,
    runs,
    training,
    training_memory,
    windows,
)
from gpt2cli.config import GenerateSettings, TrainConfig, new_seed
from gpt2cli.errors import UserError
from gpt2cli.optimizers import learning_rate
from gpt2cli.replicas import Replicas

SKIPS = 20  # steps in a row that --on_nonfinite skip leaves out before the run ends
RETRY = 60  # seconds after which a checkpoint that could not be written is tried again
VALIDATION_SEED = 1  # as nshepperd/gpt-2's; not the run's, so that runs can be compared


class Stop(Protocol):
    """A request to stop; `received` is not 0 once there is one."""

    received: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of a run, fixed before its first step.

    Attributes:
        config: the flags, with a seed, and with --steps in place of --epochs.
        given: the flags with a seed, which train.json records.
        length: tokens of a row.
        rows: rows of a step, on all devices.
        batches: the sampler of batches to learn from.
        held_out: the sampler of batches to validate with, if any.
    """

    config: TrainConfig
    given: TrainConfig
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
    def read(cls, record: dict[str, Any], val_dataset: str | None) -> "State":
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

    def record(self, config: TrainConfig) -> dict[str, Any]:
        """Return the JSON object of the state file."""
        fields = dataclasses.asdict(self)
        if self.validation_loss is None:
            del fields["validation_loss"]
        return fields | {"seed": config.seed, "val_dataset": config.val_dataset}

    def add_validation(self, loss: float) -> None:
        """Note the validation loss of this step."""
        self.due = [name for name in self.due if name != "validation"]
        self.validation_loss = loss if math.isfinite(loss) else None
        if math.isfinite(loss) and (self.best is None or loss < self.best["loss"]):
            self.best, self.worse = {"step": self.step, "loss": loss}, 0
        else:
            self.worse += 1


class Run:
    """One training run.

    Args:
        config: flags of `train`.
        folder: the run's folder.
        prefix: the checkpoint to start from.
        resumed: continue with its step, seed and optimizer state.
        vocabulary: the encoder, or None for a model without one.
        replicas: the devices that train.
        tokens: the text to train on.
        held_out: the text to validate with, if any.
        stop: the request to stop.

    Attributes:
        plan: the settings.
        state: the progress.
        stops: whether any of several hosts was asked to stop.

    Raises:
        UserError: the checkpoint is damaged, or its optimizer state does not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        prefix: Path,
        resumed: bool,
        vocabulary: Any,
        replicas: Replicas,
        tokens: windows.Tokens,
        held_out: windows.Tokens | None,
        stop: Stop,
    ) -> None:
        self.replicas, self.stop, self.stops = replicas, stop, False
        self.say(f"{prefix}: {engine.describe_devices()}")
        needed = training_memory.memory_needed(folders.read_config(prefix.parent), config)
        self.say(training_memory.memory_line(needed))
        with replicas.strategy.scope():
            network = checkpoint.load(prefix, config.precision, weights_precision="float32")
        self.model = inference.Model(graph.Graph(network), vocabulary)
        slots, record = self.read(config, prefix, resumed)
        self.state = State.read(record, config.val_dataset)
        config = dataclasses.replace(config, seed=self.seed(config.seed, record))
        self.plan = self.make_plan(config, folder, tokens, held_out)
        self.trainer = training.Trainer(network, self.plan.config, replicas)
        if slots:
            self.trainer.restore(slots)
        elif config.optimizer == "adafactor_gpt2_ml":
            if self.trainer.adopt(checkpoint.load_slots(prefix, config.optimizer)):
                self.say("the optimizer starts with the moments in the checkpoint")
        self.checkpoints = Checkpoints(folder, prefix, self.state.step, resumed)
        self.batch: windows.Batch | None = None  # the last that was learned from
        self.skipped = 0  # steps in a row
        self.journal = None
        if replicas.is_chief:
            start = self.state.step if resumed else -1
            always = {"seq_length": self.plan.length}
            # a replaced run keeps its log as long as its checkpoints
            is_replacing = bool(self.checkpoints.replaced)
            self.journal = journal.Journal(folder, start, always, holds=is_replacing)

    def read(
        self, config: TrainConfig, prefix: Path, resumed: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the optimizer's variables and the state beside a checkpoint, as far as needed."""
        if not resumed:
            return {}, {"step": 0}
        if config.restore_from == "weights":
            slots, record = {}, checkpoint.load_state(prefix)
        else:
            slots, record = checkpoint.load_training(prefix)
        if not slots:
            why = "" if record is None else ", as --restore_from weights asks"
            self.say(f"without the optimizer's state{why}: the optimizer starts from scratch")
        return slots, record or {"step": _step_of(prefix)}

    def seed(self, given: int | None, record: dict[str, Any]) -> int:
        """Return the seed of --seed, of the resumed run, or a new one for all hosts."""
        seed = given if given is not None else record.get("seed")
        if seed is None:
            seed = int(self.replicas.of_chief(new_seed()))
            self.say(f"seed {seed}")
        return seed

    def make_plan(
        self,
        config: TrainConfig,
        folder: Path,
        tokens: windows.Tokens,
        held_out: windows.Tokens | None,
    ) -> Plan:
        """Fix the settings of the run, and print them."""
        length = config.seq_length or self.model.config.n_ctx
        count = self.replicas.count
        rows = config.batch_size * config.accumulate_gradients * count
        vocabulary = self.model.encoder
        end = vocabulary.end if vocabulary else None

        def sampler(text: windows.Tokens, seed: int | None) -> Any:
            return text.sampler(config.sampling, length, seed, end, config.uer_compat)

        given, batches = config, sampler(tokens, config.seed)
        if config.epochs:
            steps = math.ceil(config.epochs * batches.count / rows)
            config = dataclasses.replace(config, epochs=0, steps=steps)
        if count > 1:
            hosts = f" on {self.replicas.hosts} hosts" if self.replicas.hosts > 1 else ""
            self.say(
                f"{count} devices{hosts}: a global batch of {config.batch_size * count} x {length},"
                f" {rows * length:,} tokens a step"
            )
        total = f" of {config.steps}" if config.steps else ""
        self.say(
            f"{config.dataset}: {tokens.total:,} tokens; a step reads {rows} x {length}, an epoch "
            f"takes {batches.count / rows:,.1f} steps; run {folder}, step {self.state.step}{total}"
        )
        return Plan(
            config=config,
            given=given,
            length=length,
            rows=rows,
            batches=batches,
            held_out=sampler(held_out, VALIDATION_SEED) if held_out else None,
        )

    def say(self, text: str) -> None:
        """Print a line on stderr, on the chief alone if there are several hosts."""
        if self.replicas.is_chief:
            _say(text)

    def record(self, **values: float) -> None:
        """Write numbers of this step to the journal."""
        if self.journal:
            self.journal.write(self.state.step, **values)

    def train(self) -> None:
        """Take steps until --steps, --patience or a stop; save, sample and validate on the way.

        Raises:
            UserError: training diverged, or the last step could not be saved.
        """
        config, state = self.plan.config, self.state
        if config.val_every and ("validation" in state.due or state.step == 0):
            self.validate()
        if "samples" in state.due and not self.sample_path().exists():
            vocabulary_size = self.model.config.n_vocab
            self.batch = self.plan.batches.batch(
                state.step - 1, self.plan.rows, config.noise, vocabulary_size
            )
            self.write_samples()
        if config.steps and state.step >= config.steps:
            self.say(
                f"the run is at step {state.step} and --steps is {config.steps}: nothing to do"
            )
            return
        self.began = self.reported = time.monotonic()
        self.reported_step = state.step
        while not (self.is_stopped() or self.is_over()):
            self.take_step()
            began = time.monotonic()
            self.do_what_is_due()
            self.reported += time.monotonic() - began  # the speed is of training alone
        self.finish()

    def do_what_is_due(self) -> None:
        """Validate, save and sample after a step, each if it is time."""
        config, state = self.plan.config, self.state
        every = {"validation": config.val_every, "samples": config.sample_every}
        state.due = [name for name, n in every.items() if n and state.step % n == 0]
        if "validation" in state.due:
            self.validate()
        is_best = config.keep_best and state.best and state.best["step"] == state.step
        is_time = state.step % config.save_every == 0
        if is_best or is_time or time.monotonic() >= self.checkpoints.retry_at:
            self.save()
        if "samples" in state.due:
            self.write_samples()

    def finish(self) -> None:
        """Save the last step; all hosts end together, with the chief's success."""
        step = self.state.step
        try:
            self.save(is_last=True)
        finally:
            is_saved = self.replicas.of_chief(int(self.checkpoints.step == step))
        if not is_saved:
            raise UserError(f"step {step} is not saved; check the log of the first host")
        if self.journal:
            self.journal.close()
        if not self.checkpoints.exist():
            self.say("stopped before the first step; nothing is saved")
            return
        name = shlex.quote(f"--run_name={self.plan.config.run_name}")
        self.say(
            f"saved {self.checkpoints.folder} at step {step}; sample from it with: "
            f"gpt2cli sample {name}"
        )

    def is_stopped(self) -> bool:
        """Whether to take no more steps; several hosts agreed on it in the step before."""
        return self.stops or (bool(self.stop.received) and self.replicas.hosts == 1)

    def is_over(self) -> bool:
        """Whether the run has taken all its steps, or no longer improves."""
        config, state = self.plan.config, self.state
        if config.patience and state.worse >= config.patience:
            best = state.best or {"step": 0, "loss": math.nan}
            self.say(
                f"the validation loss has not fallen {state.worse} times in a row; it was lowest "
                f"at step {best['step']}, {best['loss']:.4f}"
            )
            return True
        return bool(config.steps) and state.step >= config.steps

    def take_step(self) -> None:
        """Take one step with its batch, and print its line."""
        config, state, rows = self.plan.config, self.state, self.plan.rows
        n_vocab = self.model.config.n_vocab
        batch = self.plan.batches.batch(state.step, rows, config.noise, n_vocab)
        result = self.trainer.step(state.step, batch, bool(self.stop.received))
        self.stops = result.stops > 0 and self.replicas.hosts > 1
        state.validation_loss = None
        if not result.is_finite:
            self.skip(result, batch)
            return
        self.batch, self.skipped = batch, 0
        state.step += 1
        # the running average of nshepperd/gpt-2 train.py
        total, weight = state.running_loss
        state.running_loss = [total * 0.99 + result.loss, weight * 0.99 + 1]
        if state.step % config.print_every == 0 or state.step == config.steps:
            self.report(result, batch.inputs.size)

    def report(self, result: training.Step, tokens: int) -> None:
        """Print the line of a step that read `tokens` tokens, with the speed since the last."""
        state, now = self.state, time.monotonic()
        average = state.running_loss[0] / state.running_loss[1]
        speed = tokens * (state.step - self.reported_step) / (now - self.reported)
        self.reported, self.reported_step = now, state.step
        self.say(
            f"[{state.step} | {now - self.began:.2f}] loss={result.loss:.4f} avg={average:.4f} "
            f"acc={result.accuracy:.3f} {speed:.0f} tokens/s"
        )
        self.record(
            learning_rate=learning_rate(self.plan.config, state.step - 1),
            loss=result.loss,
            accuracy=result.accuracy,
            gradient_norm=result.norm,
            tokens_per_second=speed,
        )

    def skip(self, result: training.Step, batch: windows.Batch) -> None:
        """Skip a step whose loss or gradient is not finite, or end the run (UserError)."""
        config, step = self.plan.config, self.state.step
        spans = self.plan.batches.origin(step, self.plan.rows)
        where = "; ".join(
            f"chunk {chunk + 1}, tokens {start:,} to {stop:,}" for chunk, start, stop in spans[:8]
        )
        if len(spans) > 8:
            where += f" and {len(spans) - 8} more"
        problem = (
            f"step {step + 1}: the loss is {result.loss}, the gradient's norm {result.norm}. "
            f"The batch was {config.dataset}: {where}"
        )
        if self.model.encoder:
            text = self.model.encoder.decode(batch.inputs[0, :24].tolist())
            problem += f", beginning with {text!r}"
        if config.on_nonfinite == "stop" or self.skipped == SKIPS:
            self.fail(problem)
        self.skipped += 1
        self.state.step += 1
        self.say(f"{problem}. This step is skipped; no weight has changed")

    def fail(self, problem: str) -> NoReturn:
        """End a run that has diverged (UserError); its checkpoints stay."""
        advice = "No step of this run is saved; start again"
        if self.checkpoints.exist():
            saved = self.checkpoints
            advice = f"{saved.folder} keeps its checkpoint of step {saved.step}; resume"
        raise UserError(
            f"{problem}. Training has diverged, or the batch is bad. {advice} with a lower "
            "--learning_rate, with --warmup_steps, --clip_norm 1 or --on_nonfinite skip"
        )

    def save(self, is_last: bool = False) -> None:
        """Write a checkpoint of this step, unless there is one or its weights have diverged.

        If it fails, for example because the disk is full, training continues and the run tries
        again later.

        Raises:
            UserError: the weights have diverged, or the write failed and `is_last`.
        """
        step = self.state.step
        if self.checkpoints.step == step:
            return
        if self.journal is None:  # the chief writes
            self.checkpoints.step, self.checkpoints.replaced = step, []
            return
        if self.batch is not None:
            # the last loss was measured before the update: measure it with the weights to be saved
            first = windows.Batch._make(field[:1] for field in self.batch)
            loss = self.model.score([first]).loss
            if not math.isfinite(loss):
                self.fail(f"after step {step} the loss is {loss}")
        try:
            self.checkpoints.write(self.plan, self.state, self.trainer, self.journal)
        except UserError as error:
            kept = f"the last checkpoint is of step {self.checkpoints.step}"
            kept = kept if self.checkpoints.exist() else "no step of this run is saved"
            if is_last:
                raise UserError(f"{error}. Step {step} is not saved; {kept}") from error
            self.checkpoints.retry_at = time.monotonic() + RETRY
            _say(
                f"gpt2cli: {error}. Training continues; saving will be retried in {RETRY} seconds; "
                f"{kept}"
            )

    def sample_path(self) -> Path:
        """Return the file for this step's samples."""
        config = self.plan.config
        return Path(config.sample_dir) / config.run_name / f"samples-{self.state.step}"

    def write_samples(self) -> None:
        """Write samples/RUN_NAME/samples-STEP, and print them; a stop breaks this off."""
        if not self.replicas.is_chief:
            return
        config, stop = self.plan.config, self.stop
        default = 0 if config.top_p else 40
        settings = GenerateSettings(
            length=config.sample_length,
            nsamples=config.sample_num,
            batch_size=config.sample_num,
            top_k=default if config.top_k is None else config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        vocabulary, prompt = self.model.encoder, None
        if not (vocabulary and vocabulary.start is not None):
            # a token of the text in place of a start token, as nshepperd/gpt-2 train.py
            prompt = [0 if self.batch is None else int(self.batch.inputs[0, 0])]
        number = self.state.step * config.sample_num
        samples = self.model.samples([prompt], settings, number, stop=lambda: stop.received)
        texts = [dataclasses.replace(s, index=i).show("text") for i, s in enumerate(samples)]
        if stop.received:
            return
        self.state.due = [name for name in self.state.due if name != "samples"]
        print("\n".join(texts), flush=True)
        try:
            with files.replacing(
                self.sample_path(), "w", encoding="utf-8", errors="replace"
            ) as file:
                file.write("\n".join(texts) + "\n")
        except UserError as error:  # days of training are worth more than a sample
            _say(f"gpt2cli: {error}")

    def validate(self) -> None:
        """Print the mean loss of --val_batch_count batches, the same ones each time."""
        config, state, stop = self.plan.config, self.state, self.stop
        batches = (
            self.plan.held_out.batch(number, config.val_batch_size)
            for number in range(config.val_batch_count)
        )
        if self.replicas.count > 1:
            score = self.trainer.score(batches, lambda: bool(stop.received))
            self.stops = score is None and self.replicas.hosts > 1
        else:
            score = self.model.score(itertools.takewhile(lambda _: not stop.received, batches))
            score = None if stop.received else score
        if score is None:
            return
        perplexity = math.exp(min(score.loss, 700))
        self.say(
            f"[{state.step}] validation loss={score.loss:.4f} perplexity={perplexity:.2f} "
            f"acc={score.accuracy:.3f}"
        )
        self.record(validation_loss=score.loss, validation_accuracy=score.accuracy)
        state.add_validation(score.loss)


class Checkpoints:
    """The checkpoints that one run writes into its folder.

    Args:
        folder: the run's folder.
        prefix: the checkpoint to start from.
        step: its step.
        resumed: whether it is one of this run.

    Attributes:
        step: the step of the newest checkpoint.
        replaced: steps of another run, which the first checkpoint replaces.
        retry_at: time.monotonic() at which a checkpoint that failed is due.
    """

    def __init__(self, folder: Path, prefix: Path, step: int, resumed: bool) -> None:
        self.folder = folder
        self.step = step
        self.source: Path | None = None if prefix.parent == folder else prefix.parent
        self.replaced: list[int] = [] if resumed else runs.steps(folder)
        self.retry_at = math.inf

    def exist(self) -> bool:
        """Whether the folder holds a checkpoint of this run, and not of one that it replaces."""
        return bool(runs.steps(self.folder)) and not self.replaced

    def write(
        self,
        plan: Plan,
        state: State,
        trainer: training.Trainer,
        log: journal.Journal,
    ) -> None:
        """Write a checkpoint, then remove old ones.

        Raises:
            UserError: the checkpoint cannot be written; the old ones stay.
        """
        config, now = plan.config, time.time()
        record, hours = state.record(config), config.keep_every_hours
        if hours and now - state.kept_at >= hours * 3600:
            record |= {"permanent": True, "kept_at": now}
        checkpoint.save_run(self.folder, trainer.model, trainer.state(), record, self.source)
        self.step, self.source, state.kept_at = state.step, None, record["kept_at"]
        self.retry_at = math.inf
        replaced, self.replaced = self.replaced, []
        log.release()
        try:
            kept = runs.prune(self.folder, self.step, config.keep, config.keep_best, replaced)
            checkpoint.name_newest(self.folder, kept)
            with files.replacing(self.folder / "train.json", "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(plan.given), file, indent=2)
        except (OSError, UserError) as error:  # the checkpoint itself is written
            _say(f"gpt2cli: {error}")


def _step_of(prefix: Path) -> int:
    """Return the step of another program's checkpoint: from its name, or nshepperd's counter."""
    if named := re.fullmatch(r"model-(\d+)", prefix.name):
        return int(named[1])
    with contextlib.suppress(UserError, ValueError):
        return int(files.read_text(prefix.with_name("counter")))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""One training run: its steps, and the lines, checkpoints and samples on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gpt2cli import files, machine
from gpt2cli.console import lost, say
from gpt2cli.errors import UserError
from gpt2cli.inference.engines.xla import XlaEngine
from gpt2cli.inference.generator import LanguageModel
from gpt2cli.model.sizes import ALIASES
from gpt2cli.options import GenerateOptions, new_seed
from gpt2cli.signals import AGAIN, Stop
from gpt2cli.storage import checkpoint, reading
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.storage.held import HeldFolder
from gpt2cli.tensorflow import GPUS, describe_devices
from gpt2cli.text.batches import Batch, Tokens
from gpt2cli.text.encoder import Encoder
from gpt2cli.training.devices import Replicas
from gpt2cli.training.journal import Journal
from gpt2cli.training.memory import memory_line, memory_needed
from gpt2cli.training.optimizers import learning_rate
from gpt2cli.training.saves import Checkpoints
from gpt2cli.training.state import Plan, State, changes
from gpt2cli.training.step import Step, Trainer

if TYPE_CHECKING:
    from gpt2cli.commands.train import TrainOptions

SKIPS = 20  # steps in a row that --on_nonfinite skip leaves out before the run ends
SIGPIPE = 13  # POSIX; Python on Windows has no such name
RETRY = 60  # seconds after which a checkpoint that could not be written is tried again
BLOCKS = 2**14  # of the text from which the fingerprint in the state is made
SLOW_BFLOAT16 = (
    "--precision bfloat16 saves memory, but is no faster than float32 on this processor, which "
    "has no fast bfloat16 products: they are computed in float32"
)
VALIDATION_SEED = 1  # as nshepperd/gpt-2's; not the run's, so that runs can be compared


class Run:
    """One training run.

    Args:
        options: flags of `train`.
        folder: the run's folder.
        start: the model or run folder with the checkpoint to start from.
        resumed: continue with its step, seed and optimizer state.
        vocabulary: the encoder, or None for a model without one.
        replicas: the devices that train.
        tokens: the text to train on.
        held_out: the text to validate with, if any.
        stop: the request to stop.
        show: function that prints the text of a sample.

    Attributes:
        plan: the settings.
        state: the progress.
        stops: whether any of several hosts was asked to stop.

    Raises:
        UserError: the checkpoint is damaged, or its optimizer state does not fit.
    """

    def __init__(
        self,
        options: TrainOptions,
        folder: Path,
        start: ModelFolder,
        resumed: bool,
        vocabulary: Encoder | None,
        replicas: Replicas,
        tokens: Tokens,
        held_out: Tokens | None,
        stop: Stop,
        show: Callable[[str], None],
    ) -> None:
        self.replicas, self.stop, self.stops, self.show = replicas, stop, False, show
        self.journal: Journal | None = None
        self.told = 0  # lost messages that are recorded in the journal
        prefix = start.checkpoint
        assert prefix is not None
        self.say(f"{prefix}: {describe_devices()}")
        needed = memory_needed(start.known_sizes(), options)
        self.say(memory_line(needed))
        if options.precision == "bfloat16" and not GPUS and machine.gains_by_bfloat16() is False:
            self.say(SLOW_BFLOAT16)
        with replicas.strategy.scope():
            network = checkpoint.load(start, options.precision, weights_precision="float32")
        self.model = LanguageModel(XlaEngine(network), vocabulary)
        slots, record = self.read(options, prefix, resumed)
        self.state = State.read(record, options.validates_with)
        options = dataclasses.replace(options, seed=self.seed(options, record))
        self.plan = self.make_plan(options, folder, tokens, held_out)
        self.trainer = Trainer(network, self.plan.options, replicas)
        if slots:
            self.trainer.restore(slots)
        elif options.optimizer == "adafactor_gpt2_ml" and self.trainer.adopt(
            reading.load_slots(prefix, options.optimizer)
        ):
            self.say("the optimizer starts with the moments in the checkpoint")
        self.compare(record, start.path.name if not resumed else None)
        place = HeldFolder(folder)
        self.checkpoints = Checkpoints(place, start, self.state.step, resumed)
        self.batch: Batch | None = None  # the last that was learned from
        self.skipped = 0  # steps in a row
        if replicas.is_chief:
            first = self.state.step if resumed else -1
            always = {"seq_length": self.plan.length}
            # a replaced run keeps its log as long as its checkpoints
            is_replacing = bool(self.checkpoints.replaced)
            self.journal = Journal(place, first, always, holds=is_replacing)

    def read(
        self, options: TrainOptions, prefix: Path, resumed: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the optimizer's variables and the state beside a checkpoint, as far as needed."""
        if not resumed:
            return {}, {"step": 0}
        if options.restore_from == "weights":
            record = reading.load_state(prefix)
            slots: dict[str, Any] = {}
        else:
            slots, record = reading.load_training(prefix)
        if not slots:
            why = "" if record is None else ", as --restore_from weights asks"
            self.say(f"without the optimizer's state{why}: the optimizer starts from scratch")
        return slots, record or {"step": _step_of(prefix)}

    def seed(self, options: TrainOptions, record: dict[str, Any]) -> int:
        """Return the seed of --seed, of the resumed run, or a new one for all hosts.

        Raises:
            UserError: it would hold out other documents than the run did before.
        """
        before = record.get("seed")
        seed = options.seed if options.seed is not None else before
        if options.val_fraction and record["step"]:
            if record.get("val_dataset") != options.validates_with:
                self.say(
                    f"--val_fraction: this run did not hold out the same documents up to step "
                    f"{record['step']}, so it may have trained on some that it now validates with"
                )
            elif before not in (None, seed):
                raise UserError(
                    f"this run holds out the documents that seed {before} chose. With --seed "
                    f"{seed} it would validate with documents that it was trained on: "
                    "leave out --seed"
                )
        if seed is None:
            seed = int(self.replicas.of_chief(new_seed()))
            self.say(f"seed {seed}")
        return seed

    def make_plan(
        self,
        options: TrainOptions,
        folder: Path,
        tokens: Tokens,
        held_out: Tokens | None,
    ) -> Plan:
        """Fix the settings of the run, and print them."""
        length = options.seq_length or self.model.config.n_ctx
        count = self.replicas.count
        rows = options.batch_size * options.accumulate_gradients * count
        vocabulary = self.model.encoder
        end = vocabulary.end if vocabulary else None

        def sampler(text: Tokens, seed: int) -> Any:
            return text.sampler(options.sampling, length, seed, end, options.uer_compat)

        assert options.seed is not None
        text = tokens.fingerprint(BLOCKS)
        if options.val_fraction:
            tokens, held_out = self.split(tokens, options, end)
        given, batches = options, sampler(tokens, options.seed)
        if options.epochs:
            steps = math.ceil(options.epochs * batches.count / rows)
            options = dataclasses.replace(options, epochs=0, steps=steps)
        if count > 1:
            hosts = f" on {self.replicas.hosts} hosts" if self.replicas.hosts > 1 else ""
            self.say(
                f"{count} devices{hosts}: a global batch of {options.batch_size * count} x "
                f"{length}, {rows * length:,} tokens a step"
            )
        total = f" of {options.steps}" if options.steps else ""
        self.say(
            f"{options.dataset}: {tokens.total:,} tokens; a step reads {rows} x {length}, an epoch "
            f"takes {batches.count / rows:,.1f} steps; run {folder}, step {self.state.step}{total}"
        )
        return Plan(
            options=options,
            given=given,
            length=length,
            rows=rows,
            batches=batches,
            held_out=sampler(held_out, VALIDATION_SEED) if held_out else None,
            text=text,
        )

    def compare(self, record: dict[str, Any], model: str | None) -> None:
        """Report the flags that differ from those in a resumed run's state.

        Args:
            record: the state.
            model: name of the model from which a new run starts; None for a resumed one.
        """
        named, before = self.plan.options.model_name, record.get("flags", {}).get("model")
        self.plan = dataclasses.replace(self.plan, model=model or before)
        if model is not None:
            return
        if named and before and ALIASES.get(named, named) != ALIASES.get(before, before):
            self.say(
                f"--model_name {named} is ignored: this run started from {before}. To start from "
                "another model, choose another --run_name"
            )
        for line in changes(record, self.plan):
            self.say(line)

    def split(
        self, tokens: Tokens, options: TrainOptions, end: int | None
    ) -> tuple[Tokens, Tokens]:
        """Hold out --val_fraction of the documents for validation; the run's seed chooses them."""
        assert options.seed is not None
        found = tokens.split(options.val_fraction, options.seed, end)
        self.say(
            f"--val_fraction {options.val_fraction}: {found.held_out_documents:,} of "
            f"{found.documents + found.held_out_documents:,} documents "
            f"({found.held_out.total:,} of {tokens.total:,} tokens), chosen by seed "
            f"{options.seed}, are held out for validation"
        )
        return found.tokens, found.held_out

    def say(self, *lines: str) -> None:
        """Print lines on stderr, on the chief alone if there are several hosts.

        A closed pipe, as with `2>&1 | head`, is a request to stop: the run is saved first.
        """
        if self.replicas.is_chief and not say(*lines):
            self.stop.received = self.stop.received or SIGPIPE
        if not self.told:
            self.record_lost()

    def record_lost(self) -> None:
        """Write to log.jsonl how many messages could not be printed, if there are new ones."""
        if self.journal and lost.count > self.told:
            self.told = lost.count
            self.journal.note(self.state.step, messages_lost=lost.count, reason=lost.reason)

    def record(self, **values: float) -> None:
        """Write numbers of this step to the journal."""
        if self.journal:
            self.journal.write(self.state.step, **values)

    def train(self) -> None:
        """Take steps until --steps, --patience or a stop; save, sample and validate on the way.

        Raises:
            UserError: training diverged, or the last step could not be saved.
        """
        options, state = self.plan.options, self.state
        if options.val_every and ("validation" in state.due or state.step == 0):
            self.validate()
        if "samples" in state.due and not self.sample_path().exists():
            vocabulary_size = self.model.config.n_vocab
            self.batch = self.plan.batches.batch(
                state.step - 1, self.plan.rows, options.noise, vocabulary_size
            )
            self.write_samples()
        if options.steps and state.step >= options.steps:
            self.say(
                f"the run is at step {state.step} and --steps is {options.steps}: nothing to do"
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
        options, state = self.plan.options, self.state
        every = {"validation": options.val_every, "samples": options.sample_every}
        state.due = [name for name, n in every.items() if n and state.step % n == 0]
        if "validation" in state.due:
            self.validate()
        is_best = options.keep_best and state.best and state.best["step"] == state.step
        is_time = state.step % options.save_every == 0
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
        if not self.checkpoints.exist():
            self.say("stopped before the first step; nothing is saved")
        else:
            self.say(*self.summary())
        self.record_lost()
        if self.journal:
            self.journal.close()

    def summary(self) -> list[str]:
        """Return the last lines: what is saved, and how to use or resume it."""
        line = (
            f"saved {self.checkpoints.folder} at step {self.state.step}; sample from it with: "
            f"gpt2cli sample {self.flags()}"
        )
        if not self.stop.received:
            return [line]
        how = "" if self.plan.options.restore_from == "latest" else " with --restore_from latest"
        return [line, f"{AGAIN}{how} to resume"]

    def flags(self) -> str:
        """Return the flags that name the run's folder, which may have been moved."""
        folder = self.checkpoints.folder
        words = [f"--run_name={folder.name}"]
        if folder.parent.resolve() != Path(self.plan.options.checkpoint_dir).resolve():
            words.append(f"--checkpoint_dir={folder.parent}")
        return shlex.join(words)

    def is_stopped(self) -> bool:
        """Whether to take no more steps; several hosts agreed on it in the step before."""
        return self.stops or (bool(self.stop.received) and self.replicas.hosts == 1)

    def is_over(self) -> bool:
        """Whether the run has taken all its steps, or no longer improves."""
        options, state = self.plan.options, self.state
        if options.patience and state.worse >= options.patience:
            best = state.best or {"step": 0, "loss": math.nan}
            self.say(
                f"no improvement in {state.worse} validations; the validation loss was lowest "
                f"at step {best['step']}, {best['loss']:.4f}"
            )
            return True
        return bool(options.steps) and state.step >= options.steps

    def take_step(self) -> None:
        """Take one step with its batch, and print its line."""
        options, state, rows = self.plan.options, self.state, self.plan.rows
        n_vocab = self.model.config.n_vocab
        batch = self.plan.batches.batch(state.step, rows, options.noise, n_vocab)
        if not batch.mask.any():  # only --loss completion has such batches
            self.say(f"step {state.step + 1}: skipped; no token of its batch counts in the loss")
            state.step += 1
            return
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
        if state.step % options.print_every == 0 or state.step == options.steps:
            self.report(result, batch.inputs.size)

    def report(self, result: Step, tokens: int) -> None:
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
            learning_rate=learning_rate(self.plan.options, state.step - 1),
            loss=result.loss,
            accuracy=result.accuracy,
            gradient_norm=result.norm,
            tokens_per_second=speed,
        )

    def skip(self, result: Step, batch: Batch) -> None:
        """Skip a step whose loss or gradient is not finite, or end the run (UserError)."""
        options, step = self.plan.options, self.state.step
        spans = self.plan.batches.origin(step, self.plan.rows)
        where = "; ".join(
            f"chunk {chunk + 1}, tokens {start:,} to {stop:,}" for chunk, start, stop in spans[:8]
        )
        if len(spans) > 8:
            where += f" and {len(spans) - 8} more"
        problem = (
            f"step {step + 1}: the loss is {result.loss}, the gradient's norm {result.norm}. "
            f"The batch was {options.dataset}: {where}"
        )
        if self.model.encoder:
            text = self.model.encoder.decode(batch.inputs[0, :24].tolist())
            problem += f", beginning with {text!r}"
        if options.on_nonfinite == "stop" or self.skipped == SKIPS:
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
        if self.checkpoints.is_saved(step):
            return
        if self.journal is None:  # the chief writes
            self.checkpoints.step, self.checkpoints.replaced = step, []
            return
        if self.batch is not None:
            # the last loss was measured before the update: measure it with the weights to be saved
            row = int(self.batch.mask.sum(1).argmax())  # one with tokens to learn
            first = Batch._make(field[row : row + 1] for field in self.batch)
            loss = self.model.score([first]).loss
            if not math.isfinite(loss):
                self.fail(f"after step {step} the loss is {loss}")
        try:
            self.checkpoints.write(self.plan, self.state, self.trainer, self.journal)
        except UserError as error:
            kept = f"the last checkpoint is from step {self.checkpoints.step}"
            kept = kept if self.checkpoints.exist() else "no step of this run is saved"
            if is_last:
                raise UserError(f"{error}. Step {step} is not saved; {kept}") from error
            self.checkpoints.retry_at = time.monotonic() + RETRY
            say(
                f"gpt2cli: {error}. Training continues; saving will be retried in {RETRY} seconds; "
                f"{kept}"
            )
            return
        if self.checkpoints.lost:
            raise UserError(
                f"{self.checkpoints.lost} was moved, removed or replaced during training. The run "
                f"is saved in {self.checkpoints.folder} at step {step}, and training has stopped. "
                f"To resume, run the same command with {self.flags()}"
            )

    def sample_path(self) -> Path:
        """Return the file for this step's samples."""
        options = self.plan.options
        return Path(options.sample_dir) / options.run_name / f"samples-{self.state.step}"

    def write_samples(self) -> None:
        """Write samples/RUN_NAME/samples-STEP, and print them; a stop breaks this off."""
        if not self.replicas.is_chief:
            return
        options, stop = self.plan.options, self.stop
        default = 0 if options.top_p else 40
        settings = GenerateOptions(
            length=options.sample_length,
            nsamples=options.sample_num,
            batch_size=options.sample_num,
            top_k=default if options.top_k is None else options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
        vocabulary, prompt = self.model.encoder, None
        if not (vocabulary and vocabulary.start is not None):
            # a token of the text in place of a start token, as nshepperd/gpt-2 train.py
            prompt = [0 if self.batch is None else int(self.batch.inputs[0, 0])]
        number = self.state.step * options.sample_num
        samples = self.model.samples([prompt], settings, number, stop=lambda: stop.received)
        texts = [dataclasses.replace(s, index=i).show("text") for i, s in enumerate(samples)]
        if stop.received:
            return
        self.state.due = [name for name in self.state.due if name != "samples"]
        try:
            self.show("\n".join(texts))
        except OSError as error:  # the file of the samples has them too
            lost.add(str(error.strerror))
            self.say(f"gpt2cli: cannot print the samples: {error.strerror}")
            if isinstance(error, BrokenPipeError):
                self.stop.received = self.stop.received or SIGPIPE
        try:
            with files.replacing(
                self.sample_path(), "w", encoding="utf-8", errors="replace"
            ) as file:
                file.write("\n".join(texts) + "\n")
        except UserError as error:  # days of training are worth more than a sample
            say(f"gpt2cli: {error}")

    def validate(self) -> None:
        """Print the mean loss of --val_batch_count batches, the same ones each time."""
        options, state, stop = self.plan.options, self.state, self.stop
        batches = (
            self.plan.held_out.batch(number, options.val_batch_size)
            for number in range(options.val_batch_count)
        )
        if self.replicas.count > 1:
            score = self.trainer.score(batches, lambda: bool(stop.received))
            self.stops = score is None and self.replicas.hosts > 1
        else:
            score = self.model.score(itertools.takewhile(lambda _: not stop.received, batches))
            score = None if stop.received else score
        if score is None:
            return
        if not score.tokens:
            raise UserError(
                "no token of the validation batches counts in the loss. Increase --val_batch_count"
            )
        perplexity = math.exp(min(score.loss, 700))
        self.say(
            f"[{state.step}] validation loss={score.loss:.4f} perplexity={perplexity:.2f} "
            f"acc={score.accuracy:.3f}"
        )
        self.record(validation_loss=score.loss, validation_accuracy=score.accuracy)
        state.add_validation(score.loss)


def _step_of(prefix: Path) -> int:
    """Return the step of another program's checkpoint: from its name, or nshepperd's counter."""
    if named := re.fullmatch(r"model-(\d+)", prefix.name):
        return int(named[1])
    with contextlib.suppress(UserError, ValueError):
        return int(files.read_text(prefix.with_name("counter")))
    return 0

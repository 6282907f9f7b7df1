"""One training run: its steps, and what is said and written on the way.

training.py knows what a step is, runs.py which checkpoints there are, checkpoint.py their files.
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

from gpt2cli import files, machine
from gpt2cli import tensorflow as engine
from gpt2cli.errors import UserError
from gpt2cli.inference import generator as inference
from gpt2cli.inference.engines.xla import XlaEngine
from gpt2cli.options import GenerateOptions, new_seed
from gpt2cli.storage import checkpoint, folders, runs
from gpt2cli.text import batches as windows
from gpt2cli.training import journal
from gpt2cli.training import step as training

SKIPS = 20  # steps in a row that --on_nonfinite skip leaves out before the run ends
TRY_AGAIN = 60.0  # seconds after which a checkpoint that could not be written is tried again
VALIDATION_SEED = 1  # as nshepperd/gpt-2's; not the run's, so that runs can be compared


class Run:
    """One training run: model, optimizer, and what is written into its folders.

    Args:
        config: TrainOptions.
        folder: the run's folder.
        prefix: the checkpoint to start from.
        resumed: go on with its step, seed and optimizer state.
        vocabulary: the encoder, or None for a model without one.
        replicas: the replicas.Replicas that train.
    """

    def __init__(self, config, folder, prefix, resumed, vocabulary, replicas):
        self.replicas = replicas
        self.folder, self.prefix, self.source = folder, prefix, prefix.parent
        self.replaced = () if resumed else runs.steps(folder)
        self.say(f"{prefix}: {engine.describe_devices()}")
        self.say(memory_line(training.memory_needed(folders.read_config(prefix.parent), config)))
        with self.replicas.strategy.scope():
            network = checkpoint.load(prefix, config.precision, weights_precision="float32")
        self.model = inference.LanguageModel(XlaEngine(network), vocabulary)
        tensors, state = {}, None
        if resumed and config.restore_from == "weights":
            state = checkpoint.load_state(prefix)
        elif resumed:
            tensors, state = checkpoint.load_training(prefix)
        if resumed and not tensors:
            why = "" if state is None else ", as --restore_from weights asks"
            self.say(f"without the optimizer's state{why}: the optimizer starts anew")
        slots = {}
        if not tensors and config.optimizer == "adafactor_gpt2_ml":
            slots = checkpoint.load_slots(prefix, config.optimizer)
        state = state or {"step": _step_of(prefix) if resumed else 0}
        seed = config.seed if config.seed is not None else state.get("seed")
        if seed is None:
            seed = self.replicas.of_chief(new_seed())
            self.say(f"seed {seed}")
        self.config = self.given = dataclasses.replace(config, seed=seed)
        self.step = self.saved = state["step"]
        self.running_loss = state.get("running_loss", [0.0, 0.0])
        self.id = state.get("run") or secrets.token_hex(8)
        same = state.get("val_dataset") == config.val_dataset
        self.best = state.get("best") if same else None  # step and loss of the best validation
        self.worse = state.get("worse", 0) if same else 0  # validations since
        self.due = state.get("due", [])  # what the present step still has to do
        self.kept_at = state.get("kept_at", time.time())  # when the last was saved for good
        self.validated = {}  # the loss of the present step, once it is known
        self.batch = None  # the last that was learned from
        self.try_again = math.inf  # when a checkpoint that failed is to be written
        self.skipped = 0  # steps in a row
        self.stops = False  # whether any host was asked to
        self.trainer = training.Trainer(network, self.config, self.replicas)
        if tensors:
            self.trainer.restore(tensors)
        elif slots and self.trainer.adopt(slots):
            self.say("the optimizer goes on with the moments in the checkpoint")
        # lines after the present step are of steps that are taken again, or another run's
        always = {"seq_length": config.seq_length or self.model.config.n_ctx}
        # those of a run that is replaced stay as long as its checkpoints do
        start = self.step if resumed else -1
        self.journal = None
        if self.replicas.is_chief:
            self.journal = journal.Journal(folder, start, always, holds=bool(self.replaced))

    def say(self, text):
        """A line on stderr, of the chief alone where there are several hosts."""
        if self.replicas.is_chief:
            _say(text)

    def record(self, **values):
        """Numbers of this step for the journal."""
        if self.journal:
            self.journal.write(self.step, **values)

    def train(self, tokens, held_out, stop):
        """Take steps until --steps, --patience or `stop`; save, sample and validate on the way."""
        length = self.config.seq_length or self.model.config.n_ctx
        many = self.replicas.count
        rows = self.config.batch_size * self.config.accumulate_gradients * many
        sampler = self.sampler(tokens, length, self.config.seed)
        if self.config.epochs:
            steps = -(-self.config.epochs * sampler.count // rows)
            self.config = dataclasses.replace(self.config, epochs=0, steps=steps)
            self.trainer.config = self.config
        config = self.config
        if many > 1:
            hosts = f" on {self.replicas.hosts} hosts" * (self.replicas.hosts > 1)
            self.say(
                f"{many} devices{hosts}: a global batch of {config.batch_size * many} x {length}, "
                f"{rows * length:,} tokens a step"
            )
        self.say(
            f"{config.dataset}: {tokens.total:,} tokens; a step reads {rows} x {length}, an epoch "
            f"takes {sampler.count / rows:,.1f} steps; run {self.folder}, step {self.step}"
            + (f" of {config.steps}" if config.steps else "")
        )
        if config.val_every and ("validation" in self.due or self.step == 0):
            self.validate(held_out, length, stop)
        if "samples" in self.due and not self.sample_path().exists():
            vocabulary_size = self.model.config.n_vocab
            self.batch = sampler.batch(self.step - 1, rows, config.noise, vocabulary_size)
            self.write_samples(stop)
        if config.steps and self.step >= config.steps:
            self.say(f"the run is at step {self.step} and --steps is {config.steps}: nothing to do")
            return
        self.began = self.reported = time.monotonic()
        self.reported_step = self.step
        while not (self.is_stopped(stop) or self.is_over()):
            self.take_step(sampler, rows, stop)
            paused = time.monotonic()
            every = {"validation": config.val_every, "samples": config.sample_every}
            self.due = [name for name, n in every.items() if n and self.step % n == 0]
            if "validation" in self.due:
                self.validate(held_out, length, stop)
            is_best = config.keep_best and self.best and self.best["step"] == self.step
            is_time = self.step % config.save_every == 0 or time.monotonic() >= self.try_again
            if is_time or is_best:
                self.save()
            if "samples" in self.due:
                self.write_samples(stop)
            self.reported += time.monotonic() - paused  # the speed is that of training alone
        try:
            self.save(last=True)
        finally:  # all hosts end together, with the chief's success
            is_saved = self.replicas.of_chief(int(self.saved == self.step))
        if not is_saved:
            raise UserError(f"step {self.step} is not saved; see what the first host said")
        if self.journal:
            self.journal.close()
        name = shlex.quote(f"--run_name={config.run_name}")
        self.say(
            f"saved {self.folder} at step {self.step}; sample from it with: gpt2cli sample {name}"
            if self.has_saved()
            else "stopped before the first step; nothing is saved"
        )

    def is_stopped(self, stop):
        """Whether to take no more steps, on which several hosts agree with the step before."""
        return self.stops or (bool(stop.received) and self.replicas.hosts == 1)

    def is_over(self):
        """Whether the run has taken all its steps, or no longer gets better."""
        if self.config.patience and self.worse >= self.config.patience:
            self.say(
                f"the validation loss has not fallen {self.worse} times in a row; it was lowest at "
                f"step {self.best['step']}, {self.best['loss']:.4f}"
            )
            return True
        return bool(self.config.steps) and self.step >= self.config.steps

    def take_step(self, sampler, rows, stop):
        """One step with its batch, and the line that tells of it."""
        config = self.config
        batch = sampler.batch(self.step, rows, config.noise, self.model.config.n_vocab)
        done = self.trainer.step(self.step, batch, bool(stop.received))
        self.stops = done.stops > 0 and self.replicas.hosts > 1
        self.validated = {}
        if not done.is_finite:
            self.refuse(done, batch, sampler.origin(self.step, rows))
            return
        self.batch, self.skipped = batch, 0
        self.step += 1
        # the running average of nshepperd/gpt-2 train.py
        before = self.running_loss
        self.running_loss = [before[0] * 0.99 + done.loss, before[1] * 0.99 + 1]
        if self.step % config.print_every == 0 or self.step == config.steps:
            self.report(done, batch.inputs.size)

    def sampler(self, tokens, length, seed):
        """The batches of a text as --sampling asks for."""
        vocabulary, config = self.model.encoder, self.config
        end = vocabulary.end if vocabulary else None
        return tokens.sampler(config.sampling, length, seed, end, config.uer_compat)

    def report(self, done, tokens):
        """Print the line of a step that read `tokens` tokens; the speed is that since the last."""
        config = self.config
        now, average = time.monotonic(), self.running_loss[0] / self.running_loss[1]
        speed = tokens * (self.step - self.reported_step) / (now - self.reported)
        self.reported, self.reported_step = now, self.step
        self.say(
            f"[{self.step} | {now - self.began:.2f}] loss={done.loss:.4f} avg={average:.4f} "
            f"acc={done.accuracy:.3f} {speed:.0f} tokens/s"
        )
        self.record(
            learning_rate=training.learning_rate(config, self.step - 1),
            loss=done.loss,
            accuracy=done.accuracy,
            gradient_norm=done.norm,
            tokens_per_second=speed,
        )

    def refuse(self, done, batch, spans):
        """A step whose loss or gradient is no number: leave it out, or end the run (UserError)."""
        said = f"step {self.step + 1}: the loss is {done.loss}, the gradient's norm {done.norm}"
        where = "; ".join(
            f"chunk {chunk + 1}, tokens {start:,} to {stop:,}" for chunk, start, stop in spans[:8]
        )
        where += f" and {len(spans) - 8} more" * (len(spans) > 8)
        said += f". The batch was {self.config.dataset}: {where}"
        if self.model.encoder:
            text = self.model.encoder.decode(batch.inputs[0, :24].tolist())
            said += f", beginning with {text!r}"
        if self.config.on_nonfinite == "skip" and self.skipped < SKIPS:
            self.skipped += 1
            self.step += 1
            self.say(f"{said}. It is skipped: no weight has changed")
            return
        self.diverged(said)

    def diverged(self, said):
        """End the run (UserError); what was saved stays."""
        again = f"{self.folder} keeps its checkpoint of step {self.saved}; go on"
        if not self.has_saved():
            again = "No step of this run is saved; start anew"
        raise UserError(
            f"{said}. Training has diverged, or the batch is bad. {again} with a lower "
            "--learning_rate, with --warmup_steps, --clip_norm 1 or --on_nonfinite skip"
        )

    def has_saved(self):
        """Whether there is a checkpoint of this run, and not only of one that it replaces."""
        return bool(runs.steps(self.folder)) and not self.replaced

    def save(self, last=False):
        """Write a checkpoint of this step, unless there is one or its weights have diverged.

        If it fails, on a full disk for one, training goes on and it is tried again; with `last`
        it is a UserError.
        """
        if self.saved == self.step:
            return
        if not self.replicas.is_chief:
            self.saved, self.replaced = self.step, ()
            return
        if self.batch is not None:
            # The last loss was that before the update: ask once more, of the weights to be saved.
            first = windows.Batch(*(field[:1] for field in self.batch))
            loss = self.model.score([first]).loss
            if not math.isfinite(loss):
                self.diverged(f"after step {self.step} the loss is {loss}")
        try:
            self.write()
            self.try_again = math.inf
        except UserError as error:
            kept = f"the last checkpoint is that of step {self.saved}"
            kept = kept if self.has_saved() else "no step of this run is saved"
            if last:
                raise UserError(f"{error}. Step {self.step} is not saved, {kept}") from error
            self.try_again = time.monotonic() + TRY_AGAIN
            _say(
                f"gpt2cli: {error}. Training goes on, and a checkpoint is tried again soon; {kept}"
            )

    def write(self):
        """Write the checkpoint, then remove those that need not be kept."""
        config, now = self.config, time.time()
        state = {"step": self.step, "seed": config.seed, "running_loss": self.running_loss}
        state |= {"run": self.id, "best": self.best, "worse": self.worse, **self.validated}
        state |= {"due": self.due, "val_dataset": config.val_dataset, "kept_at": self.kept_at}
        hours = config.keep_every_hours
        if hours and now - self.kept_at >= hours * 3600:
            state |= {"permanent": True, "kept_at": now}
        source = None if self.source == self.folder else self.source
        network, optimizer = self.trainer.model, self.trainer.state()
        checkpoint.save_run(self.folder, network, optimizer, state, source)
        self.saved, self.source, self.kept_at = self.step, self.folder, state["kept_at"]
        replaced, self.replaced = self.replaced, ()
        self.journal.release()
        try:
            kept = runs.prune(self.folder, self.step, config.keep, config.keep_best, replaced)
            checkpoint.name_newest(self.folder, kept)
            with files.replacing(self.folder / "train.json", "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(self.given), file, indent=2)
        except (OSError, UserError) as error:  # the checkpoint is there, which is what counts
            _say(f"gpt2cli: {error}")

    def sample_path(self):
        """The file of this step's samples."""
        return Path(self.config.sample_dir) / self.config.run_name / f"samples-{self.step}"

    def write_samples(self, stop):
        """Write samples/RUN_NAME/samples-STEP, and show them; broken off by `stop`."""
        if not self.replicas.is_chief:
            return
        config = self.config
        explicit = config.top_k is not None
        settings = GenerateOptions(
            length=config.sample_length,
            nsamples=config.sample_num,
            batch_size=config.sample_num,
            top_k=config.top_k if explicit else (0 if config.top_p else 40),
            top_p=config.top_p,
            seed=config.seed,
        )
        vocabulary = self.model.encoder
        starts = vocabulary and vocabulary.start is not None
        # without a start token from one of the text, as nshepperd/gpt-2 train.py
        first = 0 if self.batch is None else int(self.batch.inputs[0, 0])
        prompt = None if starts else [first]
        number = self.step * config.sample_num
        samples = self.model.samples([prompt], settings, number, stop=lambda: stop.received)
        texts = [dataclasses.replace(s, index=i).show("text") for i, s in enumerate(samples)]
        if stop.received:
            return
        self.due = [name for name in self.due if name != "samples"]
        path = self.sample_path()
        print("\n".join(texts), flush=True)
        try:
            with files.replacing(path, "w", encoding="utf-8", errors="replace") as file:
                file.write("\n".join(texts) + "\n")
        except UserError as error:  # days of training are worth more than a sample
            _say(f"gpt2cli: {error}")

    def validate(self, held_out, length, stop):
        """Print the mean loss of --val_batch_count batches, the same ones each time."""
        config = self.config
        sampler = self.sampler(held_out, length, VALIDATION_SEED)
        batches = (
            sampler.batch(number, config.val_batch_size) for number in range(config.val_batch_count)
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
            f"[{self.step}] validation loss={score.loss:.4f} perplexity={perplexity:.2f} "
            f"acc={score.accuracy:.3f}"
        )
        self.record(validation_loss=score.loss, validation_accuracy=score.accuracy)
        self.due = [name for name in self.due if name != "validation"]
        is_finite = math.isfinite(score.loss)
        self.validated = {"validation_loss": score.loss} if is_finite else {}
        if is_finite and (self.best is None or score.loss < self.best["loss"]):
            self.best, self.worse = {"step": self.step, "loss": score.loss}, 0
        else:
            self.worse += 1


def memory_line(parts):
    """The bytes of training.memory_needed, and what is free, in a line."""
    needed = sum(parts.values())
    free = None if engine.GPUS else machine.free_memory()  # a GPU's own is not told
    named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size > 5e7)
    line = f"training takes about {needed / 1e9:.1f} GB of memory ({named})"
    if free is None or needed < free:
        return line
    return (
        f"{line}, and {free / 1e9:.1f} GB are free: the system may end it. Less is taken by "
        "--memory_saving_gradients, --optimizer adafactor, --precision bfloat16, a smaller "
        "--batch_size or --seq_length, --only_train_transformer_layers"
    )


def _step_of(prefix):
    """The step of a checkpoint that another program wrote: in its name, or nshepperd's counter."""
    if named := re.fullmatch(r"model-(\d+)", prefix.name):
        return int(named[1])
    with contextlib.suppress(UserError, ValueError):
        return int(files.read_text(prefix.with_name("counter")))
    return 0


def _say(text):
    print(text, file=sys.stderr, flush=True)

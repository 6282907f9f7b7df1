"""gpt2cli train: fine-tune a model on your own text."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

from gpt2cli import dataset, encoder, files, windows
from gpt2cli.errors import UserError


def run(config):
    """Train until --steps, Ctrl-C or SIGTERM; whichever ends it, the run is saved first.

    Returns:
        The run folder, a Path.
    """
    run_folder = files.run_dir(config.checkpoint_dir, config.run_name, must_exist=False)
    prefix, resumed = starting_point(config, run_folder)
    sizes = files.read_config(prefix.parent)
    dataset.find(config.dataset)
    if config.val_dataset is not None:
        dataset.find(config.val_dataset)
    if config.seq_length > sizes.n_ctx:
        raise UserError(
            f"--seq_length {config.seq_length} is more than the model's n_ctx, {sizes.n_ctx}"
        )

    vocabulary = encoder.of_model(prefix.parent)
    if config.sampling == "documents" and vocabulary and vocabulary.end is None:
        raise UserError(
            "--sampling documents finds them by the end token, and this model has none. Leave "
            "it out, or name one that the text has in hparams.json: end_token"
        )
    n_vocab = encoder.ids_of(prefix.parent, vocabulary)
    tokens = dataset.load(config.dataset, vocabulary, config, n_vocab)
    held_out = None
    if config.val_every:
        held_out = dataset.load(config.val_dataset, vocabulary, config, n_vocab)
    elif config.val_dataset is not None:
        _say("--val_dataset is not used: --val_every is 0")
    with files.locked(run_folder, "train"), stop_signals() as stop:
        # once more, now that nobody else can save: another train may have ended meanwhile
        prefix, resumed = starting_point(config, run_folder)
        run = Run(config, run_folder, prefix, resumed, vocabulary)
        run.train(tokens, held_out, stop)
    if stop.received == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.received:
        sys.exit(128 + stop.received)
    return run_folder


def starting_point(config, run_folder):
    """Where the weights come from: (checkpoint prefix, whether the run goes on from it).

    Raises:
        UserError: there is no such checkpoint, or the run's own would be overwritten.
    """
    saved = files.saved_steps(run_folder)
    if config.restore_from == "latest" and saved:
        if not (run_folder / "hparams.json").exists():  # nshepperd's runs have neither file
            files.copy_description(
                files.model_dir(config.models_dir, config.model_name), run_folder
            )
        return files.find_checkpoint(run_folder), True
    if config.restore_from in ("latest", "fresh"):
        prefix = files.find_checkpoint(files.model_dir(config.models_dir, config.model_name))
    else:
        prefix = files.find_checkpoint(config.restore_from)
        if prefix.parent.resolve() == run_folder.resolve():
            return prefix, True
    if saved and not config.overwrite:
        raise UserError(
            f"{run_folder} has checkpoints, up to step {saved[-1]}. Go on from them with "
            "--restore_from latest, name another --run_name, or replace them with --overwrite"
        )
    return prefix, False


class Run:
    """One training run: model, optimizer, and what is written into its folders.

    Args:
        config: TrainConfig.
        folder: the run's folder.
        prefix: the checkpoint to start from.
        resumed: go on with its step, seed and optimizer state.
        vocabulary: the encoder, or None for a model without one.
    """

    def __init__(self, config, folder, prefix, resumed, vocabulary):
        from gpt2cli import checkpoint, engine, graph, inference, training

        self.folder, self.source, self.checkpoint = folder, prefix.parent, checkpoint
        self.replaced = () if resumed else files.saved_steps(folder)
        _say(f"{prefix}: {engine.describe_devices()}")
        _say(memory_line(training.memory_needed(files.read_config(prefix.parent), config)))
        network = checkpoint.load(prefix, config.precision, weights_precision="float32")
        self.model = inference.Model(graph.Graph(network), vocabulary)
        tensors, state = checkpoint.load_training(prefix) if resumed else ({}, None)
        if resumed and state is None:
            _say("the checkpoint has no optimizer state beside it; the optimizer starts anew")
        slots = {}
        if not tensors and config.optimizer == "adafactor_gpt2_ml":
            slots = checkpoint.load_slots(prefix, config.optimizer)
        state = state or {"step": _step_of(prefix) if resumed else 0}
        seed = config.seed if config.seed is not None else state.get("seed")
        if seed is None:
            seed = inference.new_seed()
            _say(f"seed {seed}")
        self.config = self.given = dataclasses.replace(config, seed=seed)
        self.step = self.saved = state["step"]
        self.log_of = self.step if resumed else -1  # lines after this step are another run's
        self.running_loss = state.get("running_loss", [0.0, 0.0])
        self.trainer = training.Trainer(network, self.config)
        if tensors:
            self.trainer.restore(tensors)
        elif slots and self.trainer.adopt(slots):
            _say("the optimizer goes on with the moments in the checkpoint")
        self.events = training.Events(folder)

    def train(self, tokens, held_out, stop):
        """Take steps until --steps or `stop`; save, sample and validate on the way."""
        length = self.config.seq_length or self.model.config.n_ctx
        rows = self.config.batch_size * self.config.accumulate_gradients
        sampler = self.sampler(tokens, length, self.config.seed)
        if self.config.epochs:
            steps = -(-self.config.epochs * sampler.count // rows)
            self.config = dataclasses.replace(self.config, epochs=0, steps=steps)
            self.trainer.config = self.config
        config = self.config
        _say(
            f"{config.dataset}: {tokens.total:,} tokens; a step reads {rows} x {length}, an epoch "
            f"takes {sampler.count / rows:,.1f} steps; run {self.folder}, step {self.step}"
            + (f" of {config.steps}" if config.steps else "")
        )
        if config.steps and self.step >= config.steps:
            _say(f"the run is at step {self.step} and --steps is {config.steps}: nothing to do")
            return
        if config.val_every and self.step == 0:
            self.validate(held_out, length, stop)
        self.began = self.reported = time.monotonic()
        self.reported_step = self.step
        while not stop.received and (not config.steps or self.step < config.steps):
            n_vocab = self.model.config.n_vocab
            batch = sampler.batch(self.step, rows, config.noise, n_vocab)
            loss, accuracy = self.trainer.step(self.step, batch)
            self.count(loss)
            self.batch = batch
            if self.step % config.print_every == 0 or self.step == config.steps:
                self.report(loss, accuracy, batch.inputs.size)
            if self.step % config.save_every == 0:
                self.save()
            if stop.received:
                break
            paused = time.monotonic()
            if config.sample_every and self.step % config.sample_every == 0:
                self.write_samples(stop)
            if config.val_every and self.step % config.val_every == 0:
                self.validate(held_out, length, stop)
            self.reported += time.monotonic() - paused  # the speed is that of training alone
        self.save()
        self.events.close()
        name = shlex.quote(f"--run_name={config.run_name}")
        _say(
            f"saved {self.folder} at step {self.step}; sample from it with: gpt2cli sample {name}"
            if files.saved_steps(self.folder)
            else "stopped before the first step; nothing is saved"
        )

    def sampler(self, tokens, length, seed):
        """The batches of a text as --sampling asks for."""
        vocabulary, config = self.model.encoder, self.config
        end = vocabulary.end if vocabulary else None
        return tokens.sampler(config.sampling, length, seed, end, config.uer_compat)

    def count(self, loss):
        """Take note of a step and its loss; one that is not finite ends the run."""
        self.check(loss)
        self.step += 1
        # the running average of nshepperd/gpt-2 train.py
        self.running_loss = [self.running_loss[0] * 0.99 + loss, self.running_loss[1] * 0.99 + 1]

    def report(self, loss, accuracy, tokens):
        """Print the line of a step that read `tokens` tokens; the speed is that since the last."""
        now, average = time.monotonic(), self.running_loss[0] / self.running_loss[1]
        speed = tokens * (self.step - self.reported_step) / (now - self.reported)
        self.reported, self.reported_step = now, self.step
        _say(
            f"[{self.step} | {now - self.began:.2f}] loss={loss:.4f} avg={average:.4f} "
            f"acc={accuracy:.3f} {speed:.0f} tokens/s"
        )
        values = {"loss": loss, "accuracy": accuracy, "tokens_per_second": speed}
        self.record(learning_rate=float(self.trainer.optimizer.learning_rate), **values)

    def record(self, **values):
        """Add numbers of this step to TensorBoard's events and to log.jsonl."""
        self.events.write(self.step, **values)
        length = self.config.seq_length or self.model.config.n_ctx
        plain = {name: v if math.isfinite(v) else None for name, v in values.items()}
        line = json.dumps({"step": self.step, "seq_length": length, **plain}) + "\n"
        path = self.folder / "log.jsonl"
        with contextlib.suppress(OSError, UserError):  # a full disk is met at the next save
            if self.log_of is not None and path.exists():
                kept = [text for text in path.open() if json.loads(text)["step"] <= self.log_of]
                with files.replacing(path, "w", encoding="utf-8") as file:
                    file.writelines(kept)
            self.log_of = None
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)

    def check(self, loss):
        """End the run (UserError) where a loss is not finite; what was saved stays."""
        if math.isfinite(loss):
            return
        saved = files.saved_steps(self.folder)
        again = (
            f"{self.folder} keeps its checkpoint of step {self.saved}" if saved else "Start anew"
        )
        raise UserError(
            f"the loss after step {self.step} is {loss}: training has diverged. {again}; go on "
            "with a lower --learning_rate, with --warmup_steps or --clip_norm 1"
        )

    def save(self):
        """Write a checkpoint of this step, unless there is one or its weights have diverged."""
        if self.saved == self.step:
            return
        # The last loss was that before the update: ask once more, of the weights that are saved.
        first = windows.Batch(*(field[:1] for field in self.batch))
        self.check(self.model.score([first]).loss)
        if self.source != self.folder:
            files.copy_description(self.source, self.folder, self.model.config)
            self.source = self.folder
        with files.replacing(self.folder / "train.json", "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self.given), file, indent=2)
        state = {"step": self.step, "seed": self.config.seed, "running_loss": self.running_loss}
        network, optimizer = self.trainer.model, self.trainer.state()
        self.checkpoint.save_run(
            self.folder, network, optimizer, state, self.config.keep, self.replaced
        )
        self.saved, self.replaced = self.step, ()

    def write_samples(self, stop):
        """Write samples/RUN_NAME/samples-STEP, and show them; broken off by `stop`."""
        from gpt2cli.config import GenerateSettings

        config = self.config
        explicit = config.top_k is not None
        settings = GenerateSettings(
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
        prompt = None if starts else [int(self.batch.inputs[0, 0])]
        first = self.step * config.sample_num
        samples = self.model.samples([prompt], settings, first, stop=lambda: stop.received)
        texts = [dataclasses.replace(s, index=i).show("text") for i, s in enumerate(samples)]
        if stop.received:
            return
        path = Path(config.sample_dir) / config.run_name / f"samples-{self.step}"
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
        score = self.model.score(itertools.takewhile(lambda _: not stop.received, batches))
        if stop.received:
            return
        perplexity = math.exp(min(score.loss, 700))
        _say(
            f"[{self.step}] validation loss={score.loss:.4f} perplexity={perplexity:.2f} "
            f"acc={score.accuracy:.3f}"
        )
        self.record(validation_loss=score.loss, validation_accuracy=score.accuracy)


VALIDATION_SEED = 1  # as nshepperd/gpt-2's; not the run's, so that runs can be compared


def memory_line(parts):
    """The bytes of training.memory_needed, and what is free, in a line."""
    from gpt2cli import engine

    needed, free = sum(parts.values()), engine.free_memory()
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


class Stop:
    """A request to stop; `received` is the signal's number, or 0."""

    def __init__(self):
        self.received = 0

    def handle(self, number, frame):
        """The signal handler: a step is finished, samples and validation are broken off."""
        if self.received:  # asked twice: do not wait
            raise KeyboardInterrupt
        self.received = number
        _say("stopping after this step; the run is saved first")


@contextlib.contextmanager
def stop_signals():
    """Turn Ctrl-C and SIGTERM into a Stop while the block runs (in the main thread)."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop.handle) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _say(text):
    print(text, file=sys.stderr, flush=True)

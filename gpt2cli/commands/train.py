"""gpt2cli train: fine-tune a model on your own text."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt2cli import console, machine, paths, signals
from gpt2cli.console import say
from gpt2cli.errors import BusyError, UsageError
from gpt2cli.flags import check
from gpt2cli.options import MAX_SEED, MAX_TOKENS, FolderOptions, TextOptions, check_name

if TYPE_CHECKING:
    from gpt2cli.training.run import Run

STOPPING = "finishing this step, then saving the run and stopping"


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TextOptions, FolderOptions):
    """Fine-tune a model on your own text; Ctrl-C saves and exits.

    Data:
        dataset: file, folder or glob, in any form that `encode` reads, or the .npz or .npy file
            that `encode` wrote.
        sampling: order of the training data: random (windows that begin anywhere), sequential (one
            window after another), or documents (pieces of one document each, shuffled every epoch).
        noise: fraction of input tokens to replace with random ones, to reduce overfitting.
        seed: seed of the data order and the samples (default: random, and printed).

    Model and run:
        model_name: model to start from (default: 124M).
        run_name: name of the run and of its folders in checkpoint/ and samples/.
        restore_from: latest (resume the run's newest checkpoint, else start from the model),
            weights (the same, with the optimizer from scratch), fresh (the model), or the path of a
            checkpoint, run folder or model folder.
        overwrite: let --restore_from fresh replace the checkpoints of an existing run; in
            gpt-2-simple it deletes old checkpoints when a run resumes (see --keep).
        sample_dir: folder in which samples/RUN_NAME/ is created.

    Length:
        steps: total number of steps of the run; 0 trains until Ctrl-C.
        epochs: number of passes over the text, instead of --steps.

    Batch:
        batch_size: sequences in a batch on each device; --accumulate_gradients N reads N such
            batches per step.
        seq_length: tokens in a sequence; 0 uses the model's n_ctx.
        accumulate_gradients: number of batches whose gradients are averaged into one step;
            nshepperd/gpt-2 adds them up, so its steps with --optimizer sgd are N times as long.

    Optimizer:
        optimizer: adam and sgd as in nshepperd/gpt-2; adamw; adafactor needs the least memory
            (arXiv 1804.04235; its rate is relative to the size of the weights, usually 0.001);
            adafactor_gpt2_ml is GPT2_ML's variant (with a plain rate, usually 0.0001).
        learning_rate: peak learning rate.
        lr_schedule: learning rate after the warm-up; linear and cosine reach 0 at the last step.
        warmup_steps: steps over which the learning rate rises from 0.
        weight_decay: weight decay of adamw, on weight matrices only (not on gains, biases and
            embeddings), and of adafactor_gpt2_ml, on embeddings as well.
        clip_norm: global norm to which gradients are scaled down; 0 turns clipping off.
        dropout: fraction of activations dropped in training; OpenAI's code uses none, UER-py 0.1.
        on_nonfinite: reaction to a loss or gradient that is not finite: stop (the last checkpoint
            stays) or skip that step (at most 20 in a row).

    Memory and devices:
        memory_saving_gradients: recompute each layer in the backward pass: less memory, about a
            third more work.
        only_train_transformer_layers: freeze the two embeddings and the last layer norm.
        precision: number format of the activations; weights always stay in float32. bfloat16 saves
            memory, but no time on most CPUs; train says so there.
        strategy: devices that train, each with --batch_size sequences: one, mirrored (all GPUs of
            this host), multiworker (all hosts that TF_CONFIG names; the first writes the run,
            and all must be able to read it), or auto (every device it finds).

    Messages and samples:
        print_every: steps between progress lines; each shows the last step's loss.
        sample_every: steps between samples; 0 writes none.
        sample_length: tokens in a sample.
        sample_num: number of samples each time.
        top_k: sample from the K likeliest tokens; 0 samples from all (default: 40, or 0 if --top_p
            is given).
        top_p: sample from the smallest set of tokens whose probability reaches P; 0 samples from
            all, as in nshepperd/gpt-2.

    Checkpoints:
        save_every: steps between checkpoints.
        keep: number of newest checkpoints to keep; 0 keeps all.
        keep_every_hours: hours between checkpoints that are kept permanently; 0 keeps none.
        keep_best: also save and keep the checkpoint with the lowest validation loss.

    Validation:
        val_dataset: text or encoded file for the validation loss; same forms as --dataset.
        val_fraction: fraction of the documents of --dataset to hold out for validation, chosen by
            --seed; 0 holds out none.
        val_every: steps between validations; 0 turns validation off. Needs --val_dataset or
            --val_fraction; nshepperd/gpt-2 validates on the training text by default.
        val_batch_size: sequences in a validation batch.
        val_batch_count: number of validation batches, the same ones each time.
        patience: stop after N validations without improvement; 0 disables early stopping.

    Environment:
        TF_CONFIG: hosts that train together, in the format of Vertex AI and Kubeflow.

    Examples:
        gpt2cli train data/books.npz --run_name books --steps 2000
        gpt2cli train data/books.txt --val_dataset data/held-out.txt --val_every 100 --keep_best
        gpt2cli train chats.jsonl --run_name chats --loss completion --steps 2000
    """

    dataset: str
    sampling: Literal["random", "sequential", "documents"] = "random"
    noise: float = 0.0
    seed: int | None = None
    model_name: str | None = None
    run_name: str = "run1"
    restore_from: str = "latest"
    overwrite: bool = False
    sample_dir: str = "samples"
    steps: int = 0
    epochs: int = 0
    batch_size: int = 1
    seq_length: int = 0
    accumulate_gradients: int = 1
    optimizer: Literal["adam", "sgd", "adamw", "adafactor", "adafactor_gpt2_ml"] = "adam"
    learning_rate: float = 0.00002
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 0.0
    dropout: float = 0.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    memory_saving_gradients: bool = False
    only_train_transformer_layers: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    strategy: Literal["auto", "one", "mirrored", "multiworker"] = "auto"
    print_every: int = 1
    sample_every: int = 100
    sample_length: int = 1023
    sample_num: int = 1
    top_k: int | None = None
    top_p: float = 0.0
    save_every: int = 1000
    keep: int = 5
    keep_every_hours: float = 0.0
    keep_best: bool = False
    val_dataset: str | None = None
    val_fraction: float = 0.0
    val_every: int = 0
    val_batch_size: int = 2
    val_batch_count: int = 40
    patience: int = 0

    def __post_init__(self) -> None:
        counts = ["batch_size", "accumulate_gradients", "print_every", "sample_num", "save_every"]
        counts += ["val_batch_size", "val_batch_count"]
        amounts = ["steps", "epochs", "seq_length", "weight_decay", "warmup_steps", "clip_norm"]
        amounts += ["sample_every", "keep", "keep_every_hours", "patience", "val_every"]
        check(
            self,
            noise=(0, 1),
            val_fraction=(0, None),
            seed=(0, MAX_SEED),
            sample_length=(1, MAX_TOKENS),
            top_k=(0, MAX_TOKENS),
            top_p=(0, 1),
            **dict.fromkeys(counts, (1, None)),
            **dict.fromkeys(amounts, (0, None)),
        )
        self._check_text()
        check_name("run_name", self.run_name)
        if self.model_name is not None:
            check_name("model_name", self.model_name)
        if self.learning_rate <= 0:
            raise UsageError(f"--learning_rate must be above 0, got {self.learning_rate}")
        if self.dropout < 0 or self.dropout >= 1:
            raise UsageError(f"--dropout must be at least 0 and below 1, got {self.dropout}")
        if self.steps and self.epochs:
            raise UsageError("give --steps or --epochs, not both")
        if self.lr_schedule != "constant" and self.steps <= self.warmup_steps and not self.epochs:
            raise UsageError(
                f"--lr_schedule {self.lr_schedule} needs --steps above --warmup_steps "
                f"{self.warmup_steps}, got {self.steps}"
            )
        for flag in ("patience", "keep_best"):
            if getattr(self, flag) and not self.val_every:
                raise UsageError(f"--{flag} uses the validation loss: add --val_every")
        self._check_validation()

    def _check_validation(self) -> None:
        if self.val_fraction >= 1:
            raise UsageError(f"--val_fraction must be below 1, got {self.val_fraction}")
        if self.val_fraction and self.val_dataset is not None:
            raise UsageError("give --val_dataset or --val_fraction, not both")
        if self.val_fraction and not self.val_every:
            raise UsageError("--val_fraction holds out documents for validation: add --val_every N")
        if self.val_every and self.val_dataset is None and not self.val_fraction:
            raise UsageError(
                "--val_every needs --val_dataset (a text held out of training) or --val_fraction"
            )

    @property
    def validates_with(self) -> str | None:
        """The validation data, as the run's state records it."""
        if self.val_fraction:
            return f"{self.val_fraction} of {self.dataset}"
        return self.val_dataset


def run(options: TrainOptions) -> Path:
    """Train until --steps or a signal, save the run in each case, and return its folder.

    Raises:
        UserError: the run cannot start or continue.
        BusyError: another process trains this run, or another host was asked to stop.
    """
    machine.check_tensorflow("train")
    console.announce(f"reading {options.dataset}")

    from gpt2cli import locks  # after the first line on a terminal
    from gpt2cli.storage import destinations, folders, runs
    from gpt2cli.text import encoder
    from gpt2cli.training import hosts, start

    console.lost.forget()  # those of earlier commands of a Python program
    run_folder = folders.run_dir(options.checkpoint_dir, options.run_name, must_exist=False)
    paths.check_folder_in(options.checkpoint_dir, options.run_name, "checkpoint_dir")
    if options.sample_every:
        paths.check_folder_in(options.sample_dir, options.run_name, "sample_dir")
    destinations.check_path(run_folder)
    cluster = hosts.of_strategy(options.strategy)
    with locks.filling(run_folder, "train") if cluster.is_chief else contextlib.nullcontext():
        if cluster.is_chief:
            runs.clear(run_folder)
        folder, resumed = start.starting_point(options, run_folder)
        vocabulary = encoder.of_model(folder)
        tokens, held_out = start.texts(options, folder, vocabulary)

        from gpt2cli.training import devices  # TensorFlow, after all checks that need none
        from gpt2cli.training.run import Run

        current: Run | None = None
        state: dict[str, Any] = {}
        if cluster.hosts > 1:
            state = start.state_of(folder, resumed)
            if start.is_finished(options, state):  # other hosts may have ended: do not wait
                return run_folder
            hosts.meet(cluster, say)
        with devices.lost_hosts(cluster.hosts, lambda: how_to_resume(options, current)):
            replicas = devices.Replicas(options.strategy, cluster)
            with signals.noted(STOPPING) as stop:  # after TensorFlow has taken SIGTERM
                if cluster.hosts > 1:
                    start.compare(replicas, options, folder, state, tokens, held_out)
                current = Run(
                    options=options,
                    folder=run_folder,
                    start=folder,
                    resumed=resumed,
                    vocabulary=vocabulary,
                    replicas=replicas,
                    tokens=tokens,
                    held_out=held_out,
                    stop=stop,
                    show=show,
                )
                current.train()
    if stop.received:
        raise signals.stopped(stop.received)
    if current.stops:  # not finished, so not 0: a supervisor should start this process again
        raise BusyError(f"another host was asked to stop. {how_to_resume(options, current)}")
    return run_folder


def how_to_resume(options: TrainOptions, run: Run | None) -> str:
    """Return a sentence about the next start, for a training that a host ended."""
    from gpt2cli.storage import runs

    if not (run and run.checkpoints.exist()):
        return "Start all hosts again: this command saved nothing"
    how = "" if options.restore_from == "latest" else " with --restore_from latest"
    return f"Start all hosts again{how} to resume at step {runs.steps(run.checkpoints.folder)[-1]}"


def show(text: str) -> None:
    """Print the samples of a step; OSError if that fails."""
    try:
        print(text, flush=True)
    except OSError:
        console.drop(sys.stdout)
        raise

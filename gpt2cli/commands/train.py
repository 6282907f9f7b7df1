"""gpt2cli train: fine-tune a model on your own text."""

import contextlib
import dataclasses
import hashlib
import json
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Literal

from gpt2cli import __version__, files
from gpt2cli.errors import BusyError, UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import MAX_SEED, MAX_TOKENS, FolderOptions, TextOptions, check_name
from gpt2cli.storage import folders, runs
from gpt2cli.text import corpus as dataset
from gpt2cli.text import encoder
from gpt2cli.training import hosts as cluster


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TextOptions, FolderOptions):
    """Fine-tune a model on your own text; Ctrl-C saves and exits.

    Data:
        dataset: text, .csv or .jsonl file, a folder or glob of them, or the .npz or .npy file that
            `gpt2cli encode` wrote.
        sampling: order of the training data: random (windows that begin anywhere), sequential (one
            window after another), or documents (pieces of one document each, shuffled every epoch).
        noise: fraction of input tokens replaced by random ones, against overfitting.
        seed: seed of the data order and the samples (default: drawn and printed).

    Model and run:
        model_name: model to start from (default: 124M).
        run_name: name of the run: its folder under checkpoint/ and samples/.
        restore_from: starting point: latest (the run's newest checkpoint, else the model), weights
            (the same, with a new optimizer state), fresh (the model), or the path of a checkpoint,
            run folder or model folder.
        overwrite: let --restore_from fresh replace the checkpoints of an existing run.
        sample_dir: folder in which samples/RUN_NAME/ is created.

    Length:
        steps: total number of steps of the run; 0 trains until Ctrl-C.
        epochs: number of passes over the text, instead of --steps.

    Batch:
        batch_size: sequences per step on each device; with --accumulate_gradients, in each of its
            batches.
        seq_length: tokens in a sequence; 0 uses the model's n_ctx.
        accumulate_gradients: number of batches whose gradients are averaged into one step.

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
        precision: number format of the activations; weights always stay in float32.
        strategy: devices that train, each with --batch_size sequences: one, mirrored (all GPUs of
            this host), multiworker (all hosts that TF_CONFIG names; the first writes the run,
            which all must see), or auto (every device it finds).

    Messages and samples:
        print_every: steps between progress lines; each shows the last step's loss.
        sample_every: steps between samples; 0 writes none.
        sample_length: tokens in a sample.
        sample_num: number of samples each time.
        top_k: sample from the K likeliest tokens; 0 samples from all (default: 40, or 0 if --top_p
            is given).
        top_p: sample from the smallest set of tokens whose probability reaches P; 0 samples from
            all.

    Checkpoints:
        save_every: steps between checkpoints.
        keep: number of newest checkpoints to keep; 0 keeps all.
        keep_every_hours: hours after which one more checkpoint is kept for good; 0 keeps none.
        keep_best: also save and keep the checkpoint with the lowest validation loss.

    Validation:
        val_dataset: text or encoded file for the validation loss; same forms as --dataset.
        val_every: steps between validations; 0 turns validation off.
        val_batch_size: sequences in a validation batch.
        val_batch_count: number of validation batches, the same ones each time.
        patience: stop after N validations without improvement; 0 disables early stopping.

    Environment:
        TF_CONFIG: hosts that train together, as Vertex and Kubeflow set it.

    Examples:
        gpt2cli train data/books.npz --run_name books --steps 2000
        gpt2cli train data/books.txt --val_dataset data/held-out.txt --val_every 100 --keep_best
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
    val_every: int = 0
    val_batch_size: int = 2
    val_batch_count: int = 40
    patience: int = 0

    def __post_init__(self) -> None:
        counts = ("batch_size", "accumulate_gradients", "print_every", "sample_num", "save_every")
        counts += ("val_batch_size", "val_batch_count")
        amounts = ("steps", "epochs", "seq_length", "weight_decay", "warmup_steps", "clip_norm")
        amounts += ("sample_every", "keep", "keep_every_hours", "patience", "val_every")
        check(
            self,
            noise=(0, 1),
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
        if self.val_every and self.val_dataset is None:
            raise UsageError("--val_every needs --val_dataset, a text that is not trained on")


def run(config):
    """Train until --steps, Ctrl-C or SIGTERM; whichever ends it, the run is saved first.

    Returns:
        The run folder, a Path.
    """
    run_folder = folders.run_dir(config.checkpoint_dir, config.run_name, must_exist=False)
    hosts = cluster.of_strategy(config.strategy)
    with files.filling(run_folder, "train") if hosts.is_chief else contextlib.nullcontext():
        if hosts.is_chief:
            runs.clear(run_folder)
        prefix, resumed = starting_point(config, run_folder)
        vocabulary = encoder.of_model(prefix.parent)
        tokens, held_out = texts(config, prefix.parent, vocabulary)

        from gpt2cli.training import devices as replicas
        from gpt2cli.training import (  # what can be refused was refused before this import
            run as loop,
        )

        run = None
        if hosts.hosts > 1 and not meet(hosts, config, prefix, resumed, tokens, held_out):
            return run_folder
        with replicas.lost_hosts(hosts.hosts, lambda: goes_on(config, run)):
            together = replicas.Replicas(config.strategy)
            with stop_signals() as stop:  # after TensorFlow, which takes SIGTERM of several hosts
                run = loop.Run(config, run_folder, prefix, resumed, vocabulary, together)
                run.train(tokens, held_out, stop)
    if stop.received == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.received:
        sys.exit(128 + stop.received)
    if run.stops:  # not done, so not 0: what watches this process is to start it again
        raise BusyError(f"another host was asked to stop. {goes_on(config, run)}")
    return run_folder


def texts(config, folder, vocabulary):
    """The windows.Tokens to train on, and those to validate with or None."""
    sizes = folders.read_config(folder)
    dataset.find(config.dataset)
    if config.val_dataset is not None:
        dataset.find(config.val_dataset)
    if config.seq_length > sizes.n_ctx:
        raise UserError(
            f"--seq_length {config.seq_length} is more than the model's n_ctx, {sizes.n_ctx}"
        )
    if config.sampling == "documents" and vocabulary and vocabulary.end is None:
        raise UserError(
            "--sampling documents finds them by the end token, and this model has none. Leave "
            "it out, or name one that the text has in hparams.json: end_token"
        )
    n_vocab = encoder.ids_of(folder, vocabulary)
    tokens = dataset.load(config.dataset, vocabulary, config, n_vocab)
    if config.val_every:
        return tokens, dataset.load(config.val_dataset, vocabulary, config, n_vocab)
    if config.val_dataset is not None:
        _say("--val_dataset is not used: --val_every is 0")
    return tokens, None


def meet(hosts, config, prefix, resumed, tokens, held_out):
    """Meet the other hosts; False if there is nothing to do, which they may have found out before.

    Then they have ended, and would be waited for in vain.
    """
    from gpt2cli.storage import checkpoint

    state = (checkpoint.load_state(prefix) if resumed else None) or {}
    if config.steps and state.get("step", 0) >= config.steps and not state.get("due"):
        _say(f"the run is at step {state['step']} and --steps is {config.steps}: nothing to do")
        return False
    cluster.meet(hosts, card(config, prefix, state, tokens, held_out), _say)
    return True


# A folder may be mounted elsewhere on each host. The name of --val_dataset is in the run's state.
FREE = ("dataset", "models_dir", "checkpoint_dir", "sample_dir", "restore_from", "workers")


def card(config, prefix, state, tokens, held_out):
    """What must be alike on all hosts, see cluster.meet."""
    from gpt2cli import tensorflow as engine

    given = {k: v for k, v in dataclasses.asdict(config).items() if k not in (*FREE, "verbose")}
    kept = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return {f"--{name}": value for name, value in given.items()} | {
        "gpt2cli": __version__,
        "TensorFlow": engine.tf.__version__,
        "GPUs": len(engine.GPUS),
        "goes on from": prefix.name if state else None,
        "checksum of its state": kept,
        "checksum of the checkpoint": files.digest(f"{prefix}.index"),
        "checksum of the text": tokens.fingerprint(),
        "checksum of the validation text": held_out and held_out.fingerprint(),
    }


def goes_on(config, run):
    """What to do when a host was lost."""
    if not (run and run.has_saved()):
        return "Start all hosts again: this command saved nothing"
    how = "" if config.restore_from == "latest" else " with --restore_from latest"
    return f"Start all hosts again{how}: they go on from step {runs.steps(run.folder)[-1]}"


def starting_point(config, run_folder):
    """Where the weights come from: (checkpoint prefix, whether the run goes on from it).

    Raises:
        UserError: there is no such checkpoint, or the run's own would be overwritten.
    """
    saved = runs.steps(run_folder)
    if config.restore_from == "weights" and not saved:
        raise UserError(f"--restore_from weights: {run_folder} has no checkpoint to go on from")
    if config.restore_from in ("latest", "weights") and saved:
        if not (run_folder / "hparams.json").exists():  # nshepperd's runs have neither file
            folders.copy_description(
                folders.model_dir(config.models_dir, config.model_name), run_folder
            )
        needs_all = config.restore_from == "latest"
        return folders.find_checkpoint(run_folder, to_train=needs_all), True
    if config.restore_from in ("latest", "fresh"):
        prefix = folders.find_checkpoint(folders.model_dir(config.models_dir, config.model_name))
    else:
        prefix = folders.find_checkpoint(config.restore_from, to_train=True)
        if prefix.parent.resolve() == run_folder.resolve():
            return prefix, True
    if saved and not config.overwrite:
        raise UserError(
            f"{run_folder} has checkpoints, up to step {saved[-1]}. Go on from them with "
            "--restore_from latest, name another --run_name, or replace them with --overwrite"
        )
    return prefix, False


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

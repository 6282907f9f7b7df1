"""gpt2cli train: fine-tune a model on your own text."""

import contextlib
import dataclasses
import hashlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gpt2cli import __version__, cluster, dataset, encoder, files, folders, runs
from gpt2cli.config import TrainConfig
from gpt2cli.errors import BusyError, UserError
from gpt2cli.windows import Tokens

if TYPE_CHECKING:
    from gpt2cli.loop import Run
    from gpt2cli.replicas import Replicas


def run(config: TrainConfig) -> Path:
    """Train until --steps, Ctrl-C or SIGTERM, save the run in each case, and return its folder.

    Raises:
        UserError: the run cannot start or continue.
        BusyError: another process trains this run, or another host was asked to stop.
    """
    run_folder = folders.run_dir(config.checkpoint_dir, config.run_name, must_exist=False)
    hosts = cluster.of_strategy(config.strategy)
    with files.filling(run_folder, "train") if hosts.is_chief else contextlib.nullcontext():
        if hosts.is_chief:
            runs.clear(run_folder)
        prefix, resumed = starting_point(config, run_folder)
        vocabulary = encoder.of_model(prefix.parent)
        tokens, held_out = texts(config, prefix.parent, vocabulary)

        # all checks that need no TensorFlow came first
        from gpt2cli import checkpoint, loop, replicas

        run: loop.Run | None = None
        state: dict[str, Any] = {}
        if hosts.hosts > 1:
            state = (checkpoint.load_state(prefix) if resumed else None) or {}
            if is_finished(config, state):  # the other hosts may have ended: do not wait for them
                return run_folder
            cluster.meet(hosts, _say)
        with replicas.lost_hosts(hosts.hosts, lambda: how_to_resume(config, run)):
            together = replicas.Replicas(config.strategy)
            with stop_signals() as stop:  # after TensorFlow, which takes SIGTERM on several hosts
                if hosts.hosts > 1:
                    compare(together, config, prefix, state, tokens, held_out)
                run = loop.Run(
                    config=config,
                    folder=run_folder,
                    prefix=prefix,
                    resumed=resumed,
                    vocabulary=vocabulary,
                    replicas=together,
                    tokens=tokens,
                    held_out=held_out,
                    stop=stop,
                )
                run.train()
    if stop.received == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.received:
        sys.exit(128 + stop.received)
    if run.stops:  # not finished, so not 0: a supervisor of this process should start it again
        raise BusyError(f"another host was asked to stop. {how_to_resume(config, run)}")
    return run_folder


def texts(config: TrainConfig, folder: Path, vocabulary: Any) -> tuple[Tokens, Tokens | None]:
    """Read the text to train on, and the text to validate with if there is one.

    Raises:
        UserError: a text is missing or damaged, or does not fit the model.
    """
    sizes = folders.read_config(folder)
    dataset.find(config.dataset)
    if config.val_dataset is not None:
        dataset.find(config.val_dataset)
    if config.seq_length > sizes.n_ctx:
        raise UserError(
            f"--seq_length {config.seq_length} exceeds the model's n_ctx, {sizes.n_ctx}"
        )
    if config.sampling == "documents" and vocabulary and vocabulary.end is None:
        raise UserError(
            "--sampling documents needs an end token, and this model has none. Use another "
            "--sampling, or set end_token in hparams.json to a token that ends each document"
        )
    n_vocab = encoder.ids_of(folder, vocabulary)
    tokens = dataset.load(config.dataset, vocabulary, config, n_vocab)
    if config.val_every:
        return tokens, dataset.load(config.val_dataset, vocabulary, config, n_vocab)
    if config.val_dataset is not None:
        _say("--val_dataset is ignored: --val_every is 0")
    return tokens, None


def is_finished(config: TrainConfig, state: dict[str, Any]) -> bool:
    """Report whether a run's state leaves nothing to do."""
    if not config.steps or state.get("step", 0) < config.steps or state.get("due"):
        return False
    _say(f"the run is at step {state['step']} and --steps is {config.steps}: nothing to do")
    return True


# A folder may be mounted elsewhere on each host. The name of --val_dataset is in the run's state.
LOCAL = ("dataset", "models_dir", "checkpoint_dir", "sample_dir", "restore_from", "workers")


def compare(
    together: "Replicas",
    config: TrainConfig,
    prefix: Path,
    state: dict[str, Any],
    tokens: Tokens,
    held_out: Tokens | None,
) -> None:
    """Check that all hosts have the same versions, then the same flags, texts and checkpoint.

    Raises:
        UserError: they differ.
    """
    from gpt2cli import engine

    versions = {"gpt2cli's version": __version__, "TensorFlow's version": engine.tf.__version__}
    together.compare(versions)  # first, because another version may have other flags
    given = {k: v for k, v in dataclasses.asdict(config).items() if k not in (*LOCAL, "verbose")}
    sealed = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    together.compare(
        {f"--{name}": value for name, value in given.items()}
        | {
            "the checkpoint to resume": prefix.name if state else None,
            "the checksum of its state": sealed,
            "the checksum of the checkpoint": files.digest(f"{prefix}.index"),
            "the checksum of the text": tokens.fingerprint(),
            "the checksum of the validation text": held_out and held_out.fingerprint(),
        }
    )


def how_to_resume(config: TrainConfig, run: "Run | None") -> str:
    """Return a sentence about the next start, for a training that a host ended."""
    if not (run and run.checkpoints.exist()):
        return "Start all hosts again: this command saved nothing"
    how = "" if config.restore_from == "latest" else " with --restore_from latest"
    return f"Start all hosts again{how} to resume at step {runs.steps(run.checkpoints.folder)[-1]}"


def starting_point(config: TrainConfig, run_folder: Path) -> tuple[Path, bool]:
    """Find the checkpoint to start from; return its prefix and whether the run resumes there.

    Raises:
        UserError: the checkpoint is missing, or the run has checkpoints and --overwrite is not set.
    """
    saved = runs.steps(run_folder)
    if config.restore_from == "weights" and not saved:
        raise UserError(f"--restore_from weights: {run_folder} has no checkpoint to resume")
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
            f"{run_folder} has checkpoints, up to step {saved[-1]}. Resume with --restore_from "
            "latest, choose another --run_name, or replace them with --overwrite"
        )
    return prefix, False


class Stop:
    """A request to stop; `received` is the number of the signal, or 0."""

    def __init__(self) -> None:
        self.received = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Finish the step, break off samples and validation; a second signal ends at once."""
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        _say("stopping after this step; saving the run first")


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""gpt2cli train: fine-tune a model on your own text."""

import contextlib
import dataclasses
import hashlib
import json
import signal
import sys
import threading

from gpt2cli import __version__, files
from gpt2cli.errors import BusyError, UserError
from gpt2cli.storage import folders, runs
from gpt2cli.text import corpus as dataset
from gpt2cli.text import encoder
from gpt2cli.training import hosts as cluster


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

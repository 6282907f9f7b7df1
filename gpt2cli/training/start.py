"""What a training run starts from: a checkpoint and texts, the same on all hosts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2cli import __version__, files
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.storage import folders, runs
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text import documents, encoded, encoder, inputs
from gpt2cli.text.batches import Tokens
from gpt2cli.text.encoder import Encoder

if TYPE_CHECKING:
    from gpt2cli.commands.train import TrainOptions
    from gpt2cli.training.devices import Replicas


def starting_point(options: TrainOptions, run_folder: Path) -> tuple[ModelFolder, bool]:
    """Find the checkpoint to start from; return its folder and whether the run resumes there.

    Raises:
        UserError: the checkpoint is missing, or the run has checkpoints and --overwrite is not set.
    """
    saved = runs.steps(run_folder)
    if options.restore_from == "weights" and not saved:
        raise UserError(f"--restore_from weights: {run_folder} has no checkpoint to resume")
    if options.restore_from in ("latest", "weights") and saved:
        if not (run_folder / "hparams.json").exists():  # nshepperd's runs have neither file
            folders.copy_description(
                folders.model_dir(options.models_dir, options.model_name), run_folder
            )
        needs_all = options.restore_from == "latest"
        return folders.open_model(run_folder, to_train=needs_all), True
    if options.restore_from in ("latest", "fresh"):
        folder = folders.open_model(folders.model_dir(options.models_dir, options.model_name))
    else:
        folder = folders.open_model(options.restore_from, to_train=True)
        if folder.path.resolve() == run_folder.resolve():
            return folder, True
    if saved and not options.overwrite:
        raise UserError(
            f"{run_folder} has checkpoints, up to step {saved[-1]}. Resume with --restore_from "
            "latest, choose another --run_name, or replace them with --overwrite"
        )
    return folder, False


def texts(
    options: TrainOptions, folder: ModelFolder, vocabulary: Encoder | None
) -> tuple[Tokens, Tokens | None]:
    """Read the text to train on, and the text to validate with if there is one.

    Raises:
        UserError: a text is missing or damaged, or does not fit the model.
    """
    sizes = folder.known_sizes()
    inputs.find(options.dataset)
    if options.val_dataset is not None:
        inputs.find(options.val_dataset)
    if options.seq_length > sizes.n_ctx:
        raise UserError(
            f"--seq_length {options.seq_length} exceeds the model's n_ctx, {sizes.n_ctx}"
        )
    if options.sampling == "documents" and vocabulary and vocabulary.end is None:
        raise UserError(
            "--sampling documents needs an end token, and this model has none. Use another "
            "--sampling, or set end_token in hparams.json to a token that ends each document"
        )
    n_vocab = encoder.ids_of(folder, vocabulary)
    chat_template = documents.chat_template_of(folder)
    tokens = encoded.load(options.dataset, vocabulary, options, n_vocab, chat_template)
    if options.val_fraction:
        tokens.split(options.val_fraction, 0, vocabulary.end if vocabulary else None)
    if options.val_every and options.val_dataset is not None:
        return tokens, encoded.load(
            options.val_dataset, vocabulary, options, n_vocab, chat_template
        )
    if options.val_dataset is not None:
        say("--val_dataset is ignored: --val_every is 0")
    return tokens, None


def state_of(folder: ModelFolder, resumed: bool) -> dict[str, Any]:
    """Return the state beside a run's checkpoint; empty if the run does not resume."""
    from gpt2cli.storage import reading

    assert folder.checkpoint is not None
    return (reading.load_state(folder.checkpoint) if resumed else None) or {}


def is_finished(options: TrainOptions, state: dict[str, Any]) -> bool:
    """Report whether a run's state leaves nothing to do."""
    if not options.steps or state.get("step", 0) < options.steps or state.get("due"):
        return False
    say(f"the run is at step {state['step']} and --steps is {options.steps}: nothing to do")
    return True


# A folder may be mounted elsewhere on each host. The name of --val_dataset is in the run's state.
LOCAL = ("dataset", "models_dir", "checkpoint_dir", "sample_dir", "restore_from", "workers")


def compare(
    replicas: Replicas,
    options: TrainOptions,
    folder: ModelFolder,
    state: dict[str, Any],
    tokens: Tokens,
    held_out: Tokens | None,
) -> None:
    """Check that all hosts have the same versions, then the same flags, texts and checkpoint.

    Raises:
        UserError: they differ.
    """
    from gpt2cli.tensorflow import tf

    prefix = folder.checkpoint
    assert prefix is not None
    versions = {"gpt2cli's version": __version__, "TensorFlow's version": tf.__version__}
    replicas.compare(versions)  # first, because another version may have other flags
    given = {k: v for k, v in dataclasses.asdict(options).items() if k not in (*LOCAL, "verbose")}
    sealed = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    replicas.compare(
        {f"--{name}": value for name, value in given.items()}
        | {
            "the checkpoint to resume": prefix.name if state else None,
            "the checksum of its state": sealed,
            "the checksum of the checkpoint": files.digest(f"{prefix}.index"),
            "the checksum of the text": tokens.fingerprint(),
            "the checksum of the validation text": held_out and held_out.fingerprint(),
        }
    )

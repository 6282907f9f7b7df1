"""The checkpoints that a training run saves, and those it removes."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

from gpt2cli import files, paths
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import checkpoint, destinations, folders, runs
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.storage.held import HeldFolder
from gpt2cli.training.journal import Journal
from gpt2cli.training.state import Plan, State
from gpt2cli.training.step import Trainer


class Checkpoints:
    """The checkpoints that one run writes into its folder.

    Args:
        place: the run's folder.
        start: the folder with the checkpoint to start from.
        step: the step of that checkpoint.
        resumed: whether it is one of this run.

    Attributes:
        step: the step of the newest checkpoint.
        replaced: steps of another run, which the first checkpoint replaces.
        retry_at: time.monotonic() at which a checkpoint that failed is due.
        lost: the run's folder, if it has disappeared; the run ends with its next checkpoint.
    """

    def __init__(self, place: HeldFolder, start: ModelFolder, step: int, resumed: bool) -> None:
        self.place = place
        self.step = step
        self._is_described = start.path == place.path
        self.replaced: list[int] = [] if resumed else runs.steps(place.path)
        self.retry_at = math.inf
        self.lost: Path | None = None
        self._first = place.path
        self._vocabulary = folders.vocabulary_of(start)  # kept: its files may disappear too

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.place.path

    def exist(self) -> bool:
        """Whether the folder contains a checkpoint of this run, and not of one that it replaces."""
        return bool(runs.steps(self.folder)) and not self.replaced

    def is_saved(self, step: int) -> bool:
        """Whether the newest checkpoint is of this step, and still there."""
        return self.step == step and self.place.find()

    def _move(self, config: ModelConfig) -> None:
        """Continue in a new folder, because the run's own has gone or has an unusable name.

        Raises:
            UserError: the new folder cannot be written.
        """
        lost, new = self.folder, paths.unused(self._first)
        with files.replacing_folder(new) as part:
            folders.write_description(part, config, self._vocabulary)
        self.place.hold(new)
        self.lost, self.replaced, self._is_described = lost, [], True

    def write(
        self,
        plan: Plan,
        state: State,
        trainer: Trainer,
        log: Journal,
    ) -> None:
        """Write a checkpoint, then remove old ones.

        Raises:
            UserError: the checkpoint cannot be written; the old ones stay.
        """
        if not (self.place.find() and destinations.can_be_read(self.folder)):
            self._move(trainer.model.config)
        options, now = plan.options, time.time()
        state.kept_at = min(state.kept_at, now)  # the clock may have been put back
        record, hours = state.record(plan), options.keep_every_hours
        if hours and now - state.kept_at >= hours * 3600:
            record |= {"permanent": True, "kept_at": now}
        new = None if self._is_described else self._vocabulary
        checkpoint.save_run(self.folder, trainer.model, trainer.state(), record, new)
        self._is_described = True
        self.step, state.kept_at = state.step, record["kept_at"]
        self.retry_at = math.inf
        replaced, self.replaced = self.replaced, []
        log.release()
        try:
            kept = runs.prune(self.folder, self.step, options.keep, options.keep_best, replaced)
            checkpoint.name_newest(self.folder, kept)
            with files.replacing(self.folder / "train.json", "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(plan.given), file, indent=2)
        except (OSError, UserError) as error:  # the checkpoint itself is written
            say(f"gpt2cli: {error}")

"""The checkpoints that a training run saves, and those it removes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from pathlib import Path

from gpt2cli import files
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.storage import checkpoint, runs
from gpt2cli.training.journal import Journal
from gpt2cli.training.state import Plan, State
from gpt2cli.training.step import Trainer


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
        self._handle: int | None = None  # stays the folder's, whatever its name becomes
        with contextlib.suppress(OSError):  # Windows opens no folders
            self._handle = os.open(folder, os.O_RDONLY)

    def follow(self) -> None:
        """Continue in the run's folder where somebody has renamed it.

        Raises:
            UserError: it was removed.
        """
        if self._handle is None:
            return
        own = os.fstat(self._handle)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.folder), own):
                return
        try:
            found = Path(os.readlink(f"/proc/self/fd/{self._handle}"))  # Linux alone
            is_there = os.path.samestat(os.stat(found), own)
        except OSError:
            is_there = False
        if not is_there:
            raise UserError(
                f"{self.folder} was moved or removed while it was trained. Put it back, so that "
                "the run can be saved there"
            )
        say(f"{self.folder} was moved to {found}; the run is saved there")
        self.folder = found

    def exist(self) -> bool:
        """Whether the folder contains a checkpoint of this run, and not of one that it replaces."""
        return bool(runs.steps(self.folder)) and not self.replaced

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
        self.follow()
        log.path = self.folder / log.path.name
        options, now = plan.options, time.time()
        state.kept_at = min(state.kept_at, now)  # the clock may have been wrong, and gone back
        record, hours = state.record(plan), options.keep_every_hours
        if hours and now - state.kept_at >= hours * 3600:
            record |= {"permanent": True, "kept_at": now}
        checkpoint.save_run(self.folder, trainer.model, trainer.state(), record, self.source)
        self.step, self.source, state.kept_at = state.step, None, record["kept_at"]
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

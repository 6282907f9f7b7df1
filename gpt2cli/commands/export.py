"""gpt2cli export: the weights of a run, without what only training needs, as a model folder."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.flags import check
from gpt2cli.options import check_name
from gpt2cli.storage import folders, runs


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a run's weights, without the optimizer's state, as a model folder.

    Run and model:
        run_name: run to export.
        dst: folder to create, such as models/NAME.
        step: checkpoint to export: a step, or best for the lowest validation loss among those kept
            (default: the newest).
        overwrite: replace DST if it is a model folder.

    Folders and messages:
        checkpoint_dir: folder that contains the run folders.
        verbose: show TensorFlow's own messages.

    Examples:
        gpt2cli export books models/books
        gpt2cli export books models/books --step best
    """

    run_name: str
    dst: str
    step: str | None = None
    overwrite: bool = False
    checkpoint_dir: str = "checkpoint"
    verbose: bool = False

    def __post_init__(self) -> None:
        check(self)
        check_name("run_name", self.run_name)


def run(config):
    """Write DST, a model folder, from a checkpoint of the run; nobody sees it half done.

    Raises:
        UserError: no such run or step, a damaged one, DST exists or cannot be written.
    """
    folder, dst = folders.run_dir(config.checkpoint_dir, config.run_name), Path(config.dst)
    prefix = folders.find_checkpoint(chosen(folder, config.step))
    if os.path.lexists(dst) and not config.overwrite:
        raise UserError(f"{dst} exists. Name another folder, or replace it with --overwrite")
    is_model = dst.is_dir() and not dst.is_symlink() and folders.config_path(dst)
    is_model = is_model and not runs.steps(dst)
    if os.path.lexists(dst) and not is_model:
        raise UserError(f"{dst} is not a model's folder, so it is not replaced. Name another")
    if dst.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"{dst} is the run's folder or holds it. Name another")

    from gpt2cli.model import network as model
    from gpt2cli.storage import checkpoint  # what can be refused was refused before this import

    with files.replacing_folder(dst) as part:
        folders.copy_vocabulary(folder, part)
        checkpoint.save(checkpoint.load(prefix), part)
    size = sum(path.stat().st_size for path in dst.iterdir())
    count = len(model.weight_shapes(folders.read_config(dst)))
    print(f"{prefix} -> {dst}: {count} weights, {size:,} bytes", file=sys.stderr)


def chosen(folder, step):
    """The run's folder, which means its newest checkpoint, or the prefix of the one of a step."""
    if step is None:
        return folder
    known = runs.steps(folder)
    if step == "best":
        best = runs.best(runs.states(folder))
        if best is None:
            raise UserError(
                f"no checkpoint in {folder} was validated when it was saved. Train with "
                "--keep_best, or name one of " + ", ".join(map(str, known))
            )
        return folder / f"model-{best}"
    if not step.isdecimal() or int(step) not in known:
        named = ", ".join(map(str, known)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}. It has {named}")
    return folder / f"model-{int(step)}"

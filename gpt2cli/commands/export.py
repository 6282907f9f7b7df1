"""gpt2cli export: a run's weights, without the optimizer's state, as a model folder."""

from dataclasses import dataclass
from pathlib import Path

from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.flags import check
from gpt2cli.options import check_name


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


def run(options: ExportOptions) -> None:
    """Write DST, a model folder, from a checkpoint of the run, whole or not at all.

    Raises:
        UserError: no such run or step, a damaged one, or DST exists or cannot be written.
    """
    from gpt2cli import files
    from gpt2cli.storage import destinations, folders

    run_folder = folders.run_dir(options.checkpoint_dir, options.run_name)
    folder = folders.open_model(chosen(run_folder, options.step))
    dst = destinations.check_destination(options.dst, options.overwrite, run_folder)

    from gpt2cli.model.weights import weight_shapes  # wrong input was rejected before this import
    from gpt2cli.storage import checkpoint

    with files.replacing_folder(dst) as part:
        folders.copy_vocabulary(folder, part)
        checkpoint.save(checkpoint.load(folder), part)
    size = sum(path.stat().st_size for path in dst.iterdir())
    count = len(weight_shapes(folder.known_sizes()))
    say(f"{folder.checkpoint} -> {dst}: {count} weights, {size:,} bytes")


def chosen(folder: Path, step: str | None) -> Path:
    """Return the run's folder (its newest checkpoint) or the prefix of a step's checkpoint."""
    from gpt2cli.storage import runs

    if step is None:
        return folder
    known = runs.steps(folder)
    if step == "best":
        best = runs.best(runs.states(folder))
        if best is None:
            raise UserError(
                f"no checkpoint in {folder} was validated when it was saved. Train with "
                "--keep_best, or choose one of " + ", ".join(map(str, known))
            )
        return folder / f"model-{best}"
    if not step.isdecimal() or int(step) not in known:
        named = ", ".join(map(str, known)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}. It has {named}")
    return folder / f"model-{int(step)}"

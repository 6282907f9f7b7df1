"""gpt2cli download: fetch the files of a model, whole or not at all."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from gpt2cli import machine, paths, signals
from gpt2cli.console import announce, say
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import check_name


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """Download a model to models/NAME, or list the released models.

    Model:
        model: 124M, 355M, 774M or 1558M (117M and 345M are older names of the first two), or
            hf:OWNER/NAME for a GPT-2 from the Hugging Face hub (default: list the released models).
        revision: branch, tag or commit of an hf: model (default: main).
        url: mirror to use instead of OpenAI's bucket, with the same layout:
            URL/124M/hparams.json, ...

    Folders and messages:
        models_dir: folder that contains the model folders.
        verbose: show TensorFlow's own messages.

    Environment:
        HF_ENDPOINT: hub to use for hf: models instead of Hugging Face's.
        HF_TOKEN: access token for private and gated hf: models.

    Examples:
        gpt2cli download
        gpt2cli download 124M
        gpt2cli download hf:uer/gpt2-chinese-cluecorpussmall
    """

    model: str | None = None
    revision: str | None = None
    url: str | None = None
    models_dir: str = "models"
    verbose: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.model is not None and self.model.startswith("hf:"):
            if not re.fullmatch(r"hf:[\w.-]+/[\w.-]+", self.model, re.ASCII):
                raise UsageError(
                    f"--model must be hf:OWNER/NAME for a hub model, got {self.model!r}"
                )
            check_name("model", self.model.partition("/")[2])
            if self.url is not None:
                raise UsageError("--url is for mirrors of OpenAI's bucket; for hf: set HF_ENDPOINT")
        elif self.model is not None:
            check_name("model", self.model)
        if self.revision is not None and not (self.model or "").startswith("hf:"):
            raise UsageError("--revision needs a model named hf:OWNER/NAME")
        if self.url is not None and not re.match(r"https?://[^/]", self.url):
            raise UsageError(f"--url must begin with http:// or https://, got {self.url!r}")


def run(options: DownloadOptions) -> None:
    """Download a model into a folder that opens; without a name, print the list.

    A folder whose files all have the size and sha256 recorded in download.json is complete, and the
    network is not used. That takes 0.3 s for 124M and 4 s for 1558M, as every file is read.

    Raises:
        UserError: an unknown name, no such file, a server that keeps failing, damaged files, no
            space, another download into the same folder, a checkpoint that does not open, or a
            model that is not a GPT-2.
    """
    if options.model is not None:
        announce(f"looking for {options.model}")

    from gpt2cli.remote import released  # after the first line on a terminal

    if options.model is None:
        print(released.model_table())
        return
    if options.model.startswith("hf:"):
        folder = download_hub(options.model, options.revision or "main", options.models_dir)
    else:
        folder = download_released(options.model, options.url, options.models_dir)
    command = ["gpt2cli", "sample", "--model_name", folder.name]
    command += ["--models_dir", options.models_dir] if options.models_dir != "models" else []
    say(f"{folder} is complete. Try: {shlex.join(command)}")


def download_released(model: str, url: str | None, models: str) -> Path:
    """Download one of OpenAI's models, or a mirror's model, to models/NAME; return that folder."""
    from gpt2cli import locks
    from gpt2cli.model.sizes import ALIASES, RELEASED
    from gpt2cli.remote import manifest, released

    name = ALIASES.get(model, model)
    if url is None and name not in RELEASED:
        raise UserError(
            f"no released model {name!r}: choose {', '.join(RELEASED)}, "
            "or name a mirror that has it with --url"
        )
    folder = Path(models, name)
    found = manifest.read(folder)
    if not found.get("opened") or released.intact_names(folder, found, name) != set(released.FILES):
        _check_folder(models, name)
        with signals.leaving(lambda: _kept(folder)), locks.filling(folder, "download"):
            released.fetch_model(url or released.BUCKET, name, folder)
            released.open_checkpoint(folder)
    return folder


def download_hub(model: str, revision: str, models: str) -> Path:
    """Download hf:OWNER/NAME and convert it to models/NAME; return that folder.

    The hub's files are fetched into models/.hf-OWNER--NAME, which is kept on failure so that the
    next attempt resumes there.
    """
    machine.check_tensorflow("download hf:OWNER/NAME, which converts the model,")

    import requests

    from gpt2cli import locks
    from gpt2cli.remote import hub, manifest

    name = model.removeprefix("hf:")
    folder, part = Path(models, name.split("/")[1]), f".hf-{name.replace('/', '--')}"
    if folder.exists():
        manifest.check_same(folder, model, revision)
        return folder
    _check_folder(models, folder.name)
    hidden = _check_folder(models, part)
    with signals.leaving(lambda: _kept(hidden)), locks.filling(hidden, "download"):
        repository = hub.look_up(name, revision)
        say(f"downloading {repository.url} to {folder}")
        with requests.Session() as session:
            session.auth = repository.authorize
            hub.fetch(session, repository, hidden, repository.description)
            # These import TensorFlow; a wrong name or a network error was reported before that.
            from gpt2cli.formats import settings, tensors, vocabularies
            from gpt2cli.formats.convert import convert, open_source

            settings.check_hf_config(hidden / "config.json")
            vocabularies.read(hidden)  # rejects a tokenizer that gpt2cli cannot run
            if not any(name.endswith(".safetensors") for name in repository.weights):
                tensors.torch()  # raises a UserError where it is not installed
            hub.fetch(session, repository, hidden, repository.weights)
        source = open_source(hidden, "hf")
        say(f"read {model}, {source.describe()}")
        for warning in source.warnings:
            say(f"{model}: {warning}")

        def record(made: Path) -> None:
            found = {path.name: manifest.record_of(path, None) for path in sorted(made.iterdir())}
            origin = {"url": model, "revision": revision, "commit": repository.commit}
            manifest.write(made, {**origin, "opened": True, "files": found})

        convert(source, folder, finish=record)
        shutil.rmtree(hidden, ignore_errors=True)
    return folder


def _check_folder(models: str, name: str) -> Path:
    """Reject a folder that a model cannot be downloaded to or read from; return its path.

    Raises:
        UserError: see `paths.check_folder` and `destinations.check_path`; or it is a link to a
            folder whose files would be replaced.
    """
    from gpt2cli.storage import destinations

    folder = paths.check_folder_in(models, name, "models_dir")
    destinations.check_path(folder)
    if name.startswith(".") and folder.is_symlink():
        raise UserError(f"{folder} is a link. Remove it, then run the same command again")
    return folder


def _kept(folder: Path) -> str:
    """Return what a stopped download leaves, and how to resume it."""
    size = sum(path.lstat().st_size for path in folder.glob("*"))
    return f"{folder} keeps {size:,} bytes: {signals.AGAIN} to resume"

"""gpt2cli download: the files of a model, whole or not at all."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from gpt2cli.console import say
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import check_name


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """Download a released model to models/NAME, or list the names.

    Model:
        model: 124M, 355M, 774M or 1558M (117M and 345M are older names of the first two), or
            hf:OWNER/NAME for a GPT-2 from the Hugging Face hub; without it, the names are listed.
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
                raise UsageError(f"a hub model is named hf:OWNER/NAME, got {self.model!r}")
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
    """gpt2cli download: a name to a model folder that opens; no name prints the list.

    A model of the hub is fetched into models/.hf-OWNER--NAME, which stays if that fails, so that
    the next attempt goes on with it, and converted from there.

    A folder whose files all have the length and sha256 recorded in download.json is complete, and
    no network is used. Every file is read for that: 0.3 s for 124M, 4 s for 1558M.

    Raises:
        UserError: an unknown name, no such file, a server that keeps failing, damaged files, no
            space, another download into the same folder, a checkpoint that does not open, or a
            model that is no GPT-2.
    """
    from gpt2cli import files
    from gpt2cli.model.sizes import ALIASES, RELEASED
    from gpt2cli.remote import manifest, released

    if options.model is None:
        print(released.model_table())
        return
    if options.model.startswith("hf:"):
        download_hub(options)
        return
    name = ALIASES.get(options.model, options.model)
    if options.url is None and name not in RELEASED:
        raise UserError(
            f"no released model {name!r}: there are {', '.join(RELEASED)}. "
            "For a model of another name give --url, the mirror that has it"
        )
    folder = Path(options.models_dir) / name
    found = manifest.read(folder)
    intact = released.intact_names(folder, found)
    if not (found.get("opened") and intact == set(released.FILES)):
        with files.filling(folder, "download"):
            released.fetch_model(options.url or released.BUCKET, name, folder)
            released.open_checkpoint(folder)
    say_complete(folder, options)


def say_complete(folder, options):
    """The last line: what can be done now."""
    command = ["gpt2cli", "sample", "--model_name", folder.name]
    command += ["--models_dir", options.models_dir] if options.models_dir != "models" else []
    say(f"{folder} is complete. Try: {shlex.join(command)}")


def download_hub(options):
    """hf:OWNER/NAME to models/NAME; see `run`. The revision is recorded with its commit."""
    import requests

    from gpt2cli import files
    from gpt2cli.remote import hub, manifest, transfer

    name, revision = options.model.removeprefix("hf:"), options.revision or "main"
    models = Path(options.models_dir)
    folder, hidden = models / name.split("/")[1], models / f".hf-{name.replace('/', '--')}"
    if folder.exists():
        manifest.check_same(folder, options.model, revision)
        say_complete(folder, options)
        return
    with files.filling(hidden, "download"):
        repository = hub.look_up(name, revision)
        say(f"downloading {repository.url} to {folder}")
        with requests.Session() as session:
            session.auth = repository.authorize
            hub.fetch(session, repository, hidden, repository.description)
            # They bring TensorFlow, but a model of another kind ends here.
            from gpt2cli.formats import convert as formats
            from gpt2cli.formats import statedict

            statedict.check_hf_config(hidden / "config.json")
            if not any(name.endswith(".safetensors") for name in repository.weights):
                statedict.torch()  # raises where it is not installed
            hub.fetch(session, repository, hidden, repository.weights)
        source = formats.open_source(hidden, "hf")
        say(f"read {options.model}, {source.describe()}")
        for warning in source.warnings:
            say(f"{options.model}: {warning}")

        def record(made):
            found = {p.name: transfer.record_of(p, None) for p in sorted(made.iterdir())}
            origin = {"url": options.model, "revision": revision, "commit": repository.commit}
            manifest.write(made, {**origin, "opened": True, "files": found})

        formats.convert(source, folder, finish=record)
        shutil.rmtree(hidden, ignore_errors=True)
    say_complete(folder, options)

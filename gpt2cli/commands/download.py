"""gpt2cli download: the files of a model, whole or not at all.

download.json in a model's folder keeps what came from where, so that a complete one is known again.
"""

import functools
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import requests

from gpt2cli import files
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.model.sizes import ALIASES, RELEASED, ModelConfig
from gpt2cli.options import check_name
from gpt2cli.remote import hub, transfer
from gpt2cli.storage import folders


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


BUCKET = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # openai/gpt-2 download_model.py
PARAMETERS = dict(zip(RELEASED, (124439808, 354823168, 774030080, 1557611200), strict=True))

# The seven of openai/gpt-2 download_model.py. What makes a folder a model to other programs comes
# last, so that a half-finished folder is never taken for one.
FILES = ("encoder.json", "vocab.bpe", "model.ckpt.meta", "model.ckpt.data-00000-of-00001")
FILES += ("model.ckpt.index", "hparams.json", "checkpoint")
OPTIONAL = ("model.ckpt.meta",)  # the TF1 graph; nothing here reads it
MANIFEST = "download.json"  # url, opened, files: name -> bytes, sha256, etag (or null: none there)

# OpenAI's encoder, the same for every released size.
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

MAX_JSON = 1 << 26  # bytes; OpenAI's encoder.json has 1 MB


def run(config: DownloadOptions) -> None:
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
    if config.model is None:
        print(model_table())
        return
    if config.model.startswith("hf:"):
        download_hub(config)
        return
    name = ALIASES.get(config.model, config.model)
    if config.url is None and name not in RELEASED:
        raise UserError(
            f"no released model {name!r}: there are {', '.join(RELEASED)}. "
            "For a model of another name give --url, the mirror that has it"
        )
    folder = Path(config.models_dir) / name
    manifest = read_manifest(folder)
    if not (manifest.get("opened") and intact_names(folder, manifest) == set(FILES)):
        with files.filling(folder, "download"):
            fetch_model(config.url or BUCKET, name, folder)
            open_checkpoint(folder)
    say_complete(folder, config)


def say_complete(folder, config):
    """The last line: what can be done now."""
    command = ["gpt2cli", "sample", "--model_name", folder.name]
    command += ["--models_dir", config.models_dir] if config.models_dir != "models" else []
    transfer.say(f"{folder} is complete. Try: {shlex.join(command)}")


def download_hub(config):
    """hf:OWNER/NAME to models/NAME; see `run`. The revision is recorded with its commit."""
    name, revision = config.model.removeprefix("hf:"), config.revision or "main"
    models = Path(config.models_dir)
    folder, hidden = models / name.split("/")[1], models / f".hf-{name.replace('/', '--')}"
    if folder.exists():
        check_same(folder, config.model, revision)
        say_complete(folder, config)
        return
    with files.filling(hidden, "download"):
        repository = hub.look_up(name, revision)
        transfer.say(f"downloading {repository.url} to {folder}")
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
        transfer.say(f"read {config.model}, {source.describe()}")
        for warning in source.warnings:
            transfer.say(f"{config.model}: {warning}")

        def record(made):
            found = {p.name: transfer.record_of(p, None) for p in sorted(made.iterdir())}
            origin = {"url": config.model, "revision": revision, "commit": repository.commit}
            write_manifest(made, {**origin, "opened": True, "files": found})

        formats.convert(source, folder, finish=record)
        shutil.rmtree(hidden, ignore_errors=True)
    say_complete(folder, config)


def check_same(folder, url, revision):
    """UserError unless a folder is a whole download of this revision of this model."""
    manifest = read_manifest(folder)
    if manifest.get("url") != url:
        raise UserError(
            f"{folder} exists and is not from {url}. Move it away, or choose another --models_dir"
        )
    if revision not in (manifest.get("revision"), manifest.get("commit")):
        raise UserError(
            f"{folder} holds the revision {manifest.get('revision')!r}, not {revision!r}. "
            "Move it away, or choose another --models_dir"
        )
    records = manifest["files"]
    damaged = [n for n in records if not transfer.is_as_recorded(folder / n, records[n])]
    if damaged or not records:
        raise UserError(
            f"{folder} is not as it was downloaded: {', '.join(damaged) or MANIFEST} "
            "changed. Move it away and run the same command again"
        )


def model_table():
    """The released models, one a line; the weights are four bytes a parameter."""
    older = {new: f"  also {old}" for old, new in ALIASES.items()}
    return "name   parameters     size\n" + "\n".join(
        f"{name:5}{count / 1e6:6,.0f} million{4 * count / 1e9:6.1f} GB{older.get(name, '')}"
        for name, count in PARAMETERS.items()
    )


def fetch_model(base, name, folder):
    """Bring every file of the model into `folder`; the manifest grows with each of them."""
    with requests.Session() as session:
        try:
            auth = requests.utils.get_auth_from_url(base)  # used, but never printed or recorded
            session.auth = auth if any(auth) else None
            url = f"{requests.utils.urldefragauth(base).rstrip('/')}/{quote(name)}"
        except ValueError as error:
            raise UserError(f"--url {base!r} is no address: {error}") from None
        manifest = read_manifest(folder)
        records, intact = manifest["files"], intact_names(folder, manifest)
        done = {n: records[n] for n in FILES if n in intact and manifest.get("url") == url}
        transfer.say(
            f"downloading {url} to {folder}" + (f", where {len(done)} of 7 are" if done else "")
        )
        for file in FILES:
            if file not in done:
                # What no record contradicts (OpenAI's own script fetched it) stays if it fits.
                adopt = (folder / file).is_file() and (file in intact or file not in records)
                wanted = transfer.Wanted(
                    f"{url}/{file}",
                    folder / file,
                    functools.partial(content_fault, model=name),
                    optional=file in OPTIONAL,
                    adopt=adopt,
                )
                done[file] = transfer.fetch(session, wanted)
                write_manifest(folder, {"url": url, "opened": False, "files": done})


def open_checkpoint(folder):
    """Check that the weights open and fit hparams.json; UserError says what to do if not."""
    from gpt2cli.storage import (
        checkpoint,  # brings TensorFlow, which the rest of this file does without
    )

    transfer.say("opening the checkpoint")
    (folder / folders.SUMS).unlink(missing_ok=True)  # of files that may have been fetched anew
    try:
        checkpoint.verify(folder)
    except UserError as error:
        raise UserError(
            f"{error}. This is what the server has: delete {folder} and name another with --url"
        ) from error
    folders.write_sums(folder)
    write_manifest(folder, {**read_manifest(folder), "opened": True})


def content_fault(path, model):
    """What is wrong with what a file of a model holds, in words; None if nothing is."""
    name = path.name.removesuffix(".part")
    if model in RELEASED and name in SHA256 and files.digest(path) != SHA256[name]:
        return "its sha256 is not that of OpenAI's file"
    if name == "checkpoint":
        with open(path, "rb") as file:
            return (
                None if b"model_checkpoint_path" in file.read(4096) else "it holds something else"
            )
    if not name.endswith(".json"):
        return None
    try:
        text = files.read_text(path) if transfer.size_of(path) <= MAX_JSON else ""
        values = json.loads(text)
        if name == "hparams.json":
            ModelConfig.from_json(text)
        return None if isinstance(values, dict) else "it holds no JSON object"
    except (UserError, ValueError, RecursionError) as error:
        return f"it cannot be read ({error})"


def read_manifest(folder):
    """download.json, whose "files" is a dictionary in any case."""
    manifest = transfer.read_json(folder / MANIFEST)
    return manifest if isinstance(manifest.get("files"), dict) else {"files": {}}


def write_manifest(folder, manifest):
    """Write download.json; UserError where that cannot be done."""
    with files.replacing(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)


def intact_names(folder, manifest):
    """The files that are as the manifest records them."""
    records = {name: manifest["files"][name] for name in FILES if name in manifest["files"]}
    return {
        name
        for name, record in records.items()
        if (record is None and name in OPTIONAL) or transfer.is_as_recorded(folder / name, record)
    }

"""OpenAI's released models: their names, files and checksums, and how they are fetched."""

import functools
import json
from urllib.parse import quote

import requests

from gpt2cli import files
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.model.sizes import ALIASES, RELEASED, ModelConfig
from gpt2cli.remote import manifest as manifest_file
from gpt2cli.remote import transfer
from gpt2cli.storage import folders

BUCKET = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # openai/gpt-2 download_model.py
PARAMETERS = dict(zip(RELEASED, (124439808, 354823168, 774030080, 1557611200), strict=True))

# The seven of openai/gpt-2 download_model.py. What makes a folder a model to other programs comes
# last, so that a half-finished folder is never taken for one.
FILES = ("encoder.json", "vocab.bpe", "model.ckpt.meta", "model.ckpt.data-00000-of-00001")
FILES += ("model.ckpt.index", "hparams.json", "checkpoint")
OPTIONAL = ("model.ckpt.meta",)  # the TF1 graph; nothing here reads it

# OpenAI's encoder, the same for every released size.
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

MAX_JSON = 1 << 26  # bytes; OpenAI's encoder.json has 1 MB


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
        manifest = manifest_file.read(folder)
        records, intact = manifest["files"], intact_names(folder, manifest)
        done = {n: records[n] for n in FILES if n in intact and manifest.get("url") == url}
        say(f"downloading {url} to {folder}" + (f", where {len(done)} of 7 are" if done else ""))
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
                manifest_file.write(folder, {"url": url, "opened": False, "files": done})


def open_checkpoint(folder):
    """Check that the weights open and fit hparams.json; UserError says what to do if not."""
    from gpt2cli.storage import (
        checkpoint,  # brings TensorFlow, which the rest of this file does without
    )

    say("opening the checkpoint")
    (folder / folders.SUMS).unlink(missing_ok=True)  # of files that may have been fetched anew
    try:
        checkpoint.verify(folder)
    except UserError as error:
        raise UserError(
            f"{error}. This is what the server has: delete {folder} and name another with --url"
        ) from error
    folders.write_sums(folder)
    manifest_file.write(folder, {**manifest_file.read(folder), "opened": True})


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


def intact_names(folder, manifest):
    """The files that are as the manifest records them."""
    records = {name: manifest["files"][name] for name in FILES if name in manifest["files"]}
    return {
        name
        for name, record in records.items()
        if (record is None and name in OPTIONAL) or transfer.is_as_recorded(folder / name, record)
    }

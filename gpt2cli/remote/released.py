"""OpenAI's released models: their names, files and checksums, and how they are fetched."""

import functools
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests

from gpt2cli import files
from gpt2cli.console import say
from gpt2cli.errors import UserError
from gpt2cli.model.sizes import ALIASES, PRESETS, RELEASED, ModelConfig
from gpt2cli.remote import manifest, transfer
from gpt2cli.storage import folders

BUCKET = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # openai/gpt-2 download_model.py
PARAMETERS = dict(zip(RELEASED, (124439808, 354823168, 774030080, 1557611200), strict=True))

# The seven files of openai/gpt-2 download_model.py. Those by which other programs recognize a model
# folder come last, so that they never take an incomplete folder for a model.
FILES = (
    *("encoder.json", "vocab.bpe", "model.ckpt.meta", "model.ckpt.data-00000-of-00001"),
    *("model.ckpt.index", "hparams.json", "checkpoint"),
)
OPTIONAL = ("model.ckpt.meta",)  # the TF1 graph; nothing here reads it

# OpenAI's hparams.json of each model.
SIZES = {
    name: ModelConfig(n_vocab=50257, n_ctx=1024, n_embd=n_embd, n_head=n_head, n_layer=n_layer)
    for name, (n_layer, n_head, n_embd) in PRESETS.items()
    if name in RELEASED
}

# SHA-256 of OpenAI's files, as public sources state them. hparams.json is compared by its values.
# The encoder, which is the same for every size: openai/tiktoken tiktoken_ext/openai_public.py.
ENCODER = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# 124M: MontrealAI/AGI-Alpha-Agent-v0 scripts/download_openai_gpt2.py states all seven. Other
# repositories agree: for the weights, nathanhoulamy/securebench docs/benchmark-conversions/
# TerminalBench/gpt2-codegolf.md; for the rest, the files in finaivip/gpt-2-withdata models/117M.
SHA256: dict[str, dict[str, str]] = {name: ENCODER for name in RELEASED} | {
    "124M": ENCODER
    | {
        "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
        "model.ckpt.data-00000-of-00001": (
            "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"
        ),
        "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
        "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    }
}
NOT_OPENAIS = "OpenAI's file (a model of your own needs another name)"

# Bytes that a file may have. Models on mirrors may have more layers and tokens than the released
# ones, so the limits are far higher: encoder.json has 1,042,301 bytes in all sizes and vocab.bpe
# 456,318; 124M's model.ckpt.meta has 0.5 MB, .index 5 kB, hparams.json 90 bytes, checkpoint 77.
MOST = {
    **dict.fromkeys(("encoder.json", "vocab.bpe", "model.ckpt.meta"), 1 << 26),
    "model.ckpt.index": 1 << 24,
    **dict.fromkeys(("hparams.json", "checkpoint"), 1 << 20),
    "model.ckpt.data-00000-of-00001": 16 * 4 * PARAMETERS["1558M"],
}


def model_table() -> str:
    """Return the released models, one a line; the weights take four bytes a parameter."""
    older = {new: f"  also {old}" for old, new in ALIASES.items()}
    return "name   parameters     size\n" + "\n".join(
        f"{name:5}{count / 1e6:6,.0f} million{4 * count / 1e9:6.1f} GB{older.get(name, '')}"
        for name, count in PARAMETERS.items()
    )


def fetch_model(base: str, name: str, folder: Path) -> None:
    """Fetch every file of a model into `folder`, and record each in the manifest.

    Raises:
        UserError: `base` is not a URL; see `transfer.fetch`.
    """
    with requests.Session() as session:
        try:
            auth = requests.utils.get_auth_from_url(base)  # used, but never printed or recorded
            session.auth = auth if any(auth) else None
            url = f"{requests.utils.urldefragauth(base).rstrip('/')}/{quote(name)}"
        except ValueError as error:
            raise UserError(f"--url {base!r} is not a valid URL: {error}") from None
        found = manifest.read(folder)
        records, intact = found["files"], intact_names(folder, found, name)
        done = {n: records[n] for n in FILES if n in intact and found.get("url") == url}
        present = f" ({len(done)} of {len(FILES)} files are present)" if done else ""
        say(f"downloading {url} to {folder}{present}")
        for file in FILES:
            if file not in done:
                # A file without a record (fetched by OpenAI's own script) is kept if it fits.
                adopt = (folder / file).is_file() and (file in intact or file not in records)
                wanted = transfer.Wanted(
                    f"{url}/{file}",
                    folder / file,
                    most_of(file, name),
                    functools.partial(content_fault, model=name),
                    optional=file in OPTIONAL,
                    adopt=adopt,
                )
                done[file] = transfer.fetch(session, wanted)
                manifest.write(folder, {"url": url, "opened": False, "files": done})


def most_of(file: str, model: str) -> int:
    """Return how many bytes a model's file may have; released weights have four per parameter."""
    if "data" in file and model in PARAMETERS:
        return 4 * PARAMETERS[model]
    return MOST[file]


def open_checkpoint(folder: Path) -> None:
    """Check that the weights fit hparams.json and their own checksums; UserError if not."""
    from gpt2cli.storage import reading  # imports NumPy, which nothing else here needs

    say("reading the weights")
    (folder / folders.SUMS).unlink(missing_ok=True)  # the files may be newer
    try:
        reading.verify(folder)
    except UserError as error:
        raise UserError(
            f"{error}. The files on the server are wrong: delete {folder}, and set another --url"
        ) from error
    folders.write_sums(folder)
    manifest.write(folder, {**manifest.read(folder), "opened": True})


def content_fault(path: Path, model: str, digest: str | None = None) -> str | None:
    """Return a description of the fault in a file of a model; None if there is none.

    `digest` is its SHA-256, if the caller knows it.
    """
    name = path.name.removesuffix(".part")
    known = SHA256.get(model, {}).get(name)
    if known and (digest or files.digest(path)) != known:
        return f"its SHA-256 is not that of {NOT_OPENAIS}"
    if name == "checkpoint":
        with open(path, "rb") as file:
            is_state = b"model_checkpoint_path" in file.read(4096)
        return None if is_state else transfer.OTHER_CONTENT
    if not name.endswith(".json"):
        return None
    try:
        if path.stat().st_size > MOST[name]:
            return f"it has more than {MOST[name]:,} bytes"
        values = files.read_object(path)
        if name == "hparams.json":
            config = ModelConfig.from_json(json.dumps(values))
            if config != SIZES.get(model, config):
                return f"its sizes are not those of {NOT_OPENAIS}"
        return None
    except UserError as error:
        return f"it cannot be read ({error})"


def intact_names(folder: Path, found: dict[str, Any], model: str) -> set[str]:
    """Return the names of the files that fit their records in the manifest and have no fault."""
    records = {name: found["files"][name] for name in FILES if name in found["files"]}
    return {
        name
        for name, record in records.items()
        if (record is None and name in OPTIONAL)
        or (
            manifest.is_as_recorded(folder / name, record)
            and not content_fault(folder / name, model, record["sha256"])
        )
    }

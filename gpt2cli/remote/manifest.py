"""download.json: where a model's files came from, and their checksums."""

import json

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.remote import transfer

MANIFEST = "download.json"  # url, opened, files: name -> bytes, sha256, etag (or null: none there)


def read(folder):
    """download.json, whose "files" is a dictionary in any case."""
    manifest = transfer.read_json(folder / MANIFEST)
    return manifest if isinstance(manifest.get("files"), dict) else {"files": {}}


def write(folder, manifest):
    """Write download.json; UserError where that cannot be done."""
    with files.replacing(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)


def check_same(folder, url, revision):
    """UserError unless a folder is a whole download of this revision of this model."""
    manifest = read(folder)
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

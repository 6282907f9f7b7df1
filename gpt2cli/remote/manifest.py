"""download.json: where a model's files came from, and their checksums.

url         the model on its server, or hf:OWNER/NAME; for the latter also revision and commit
opened      whether the checkpoint was opened and checked
files       file name -> bytes, sha256, etag; null for an optional file that the server lacks
format      1; raise it when earlier versions must not use the folder
gpt2cli     the version that wrote it
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from gpt2cli import __version__, files
from gpt2cli.errors import UserError

MANIFEST = "download.json"
FORMAT = 1

Record = dict[str, Any]  # bytes, sha256, etag


def read(folder: Path) -> dict[str, Any]:
    """Return download.json; without a usable one, a manifest without files.

    Raises:
        NewerFormatError: a later version wrote it in another format.
    """
    manifest: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        manifest = files.read_object(folder / MANIFEST)
    files.check_format(manifest, FORMAT, folder / MANIFEST)
    records = manifest.get("files")
    if isinstance(records, dict) and all(name == Path(name).name for name in records):
        return manifest
    return {"files": {}}


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Write download.json; UserError if that fails."""
    with files.replacing(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**manifest, "format": FORMAT, "gpt2cli": __version__}, file, indent=2)


def record_of(path: Path, etag: str | None) -> Record:
    """Return the record of a file."""
    return {"bytes": path.stat().st_size, "sha256": files.digest(path), "etag": etag}


def is_as_recorded(path: Path, record: Any) -> bool:
    """Return whether a file fits its record; a damaged record fits none."""
    with contextlib.suppress(OSError, KeyError, TypeError):
        # a pipe or a device has no end; os.path.isfile is False for impossible names as well
        return os.path.isfile(path) and record_of(path, record["etag"]) == record
    return False


def check_same(folder: Path, url: str, revision: str) -> None:
    """Reject (UserError) a folder that is not an unchanged download of this revision of a model."""
    manifest = read(folder)
    if manifest.get("url") != url:
        raise UserError(
            f"{folder} exists, but was not downloaded from {url}. Move it away, or choose another "
            "--models_dir"
        )
    if revision not in (manifest.get("revision"), manifest.get("commit")):
        raise UserError(
            f"{folder} contains the revision {manifest.get('revision')!r:.80}, not {revision!r}. "
            "Move it away, or choose another --models_dir"
        )
    records = manifest["files"]
    changed = [name for name in records if not is_as_recorded(folder / name, records[name])]
    if changed or not records:
        raise UserError(
            f"{folder} has changed since the download: {', '.join(changed) or MANIFEST}. "
            "Move it away and run the same command again"
        )

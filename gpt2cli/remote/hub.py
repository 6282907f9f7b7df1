"""The Hugging Face hub: which files of a repository make a GPT-2, and how they are fetched.

huggingface_hub finds the token (HF_TOKEN, or the one of its login). `transfer` fetches the list of
files and the files, because huggingface_hub reads answers of any length, and discards a partial
file when it fails.
"""

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import requests
import urllib3

from gpt2cli import counts, files
from gpt2cli.errors import UserError
from gpt2cli.remote import bodies, transfer

ENDPOINT = "https://huggingface.co"
# The config is first, as it shows whether the model is a GPT-2 at all.
DESCRIPTION = (
    *("config.json", "generation_config.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "spiece.model", "tokenizer.model", "spm.model"),
)
# The weights in one file, or an index and several; the first kind that exists is used.
_PART = "-[0-9]{1,6}-of-[0-9]{1,6}"
WEIGHTS = (
    r"model\.safetensors",
    rf"model({_PART}\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin",
    rf"pytorch_model({_PART}\.bin|\.bin\.index\.json)",
)
# Bytes. GPT-2's own listing has 20 kB, and the largest tokenizer.json on the hub about 35 MB
# (Gemma's). GPT-2's largest weights, of 1.5B, have 6.4 GB; a file may have 16 times as much.
LISTING = 1 << 24
MOST_DESCRIPTION = 1 << 27
MOST_WEIGHTS = 16 * 4 * 1_600_000_000


class Stated(NamedTuple):
    """The hub's description of a file: its size, and its checksum by an algorithm."""

    size: int
    algorithm: str  # sha256, or git: the name of a blob
    checksum: str


@dataclass(frozen=True)
class Repository:
    """A model on the hub at one commit.

    Attributes:
        name: OWNER/NAME.
        url: its page.
        commit: 40 hexadecimal digits.
        files: file name -> Stated, or None where the hub states nothing.
        token: the user's access token, or None.
    """

    name: str
    url: str
    commit: str
    files: dict[str, Stated | None]
    token: str | None

    @property
    def description(self) -> list[str]:
        """The names of the config and tokenizer files."""
        return [name for name in DESCRIPTION if name in self.files]

    @property
    def weights(self) -> list[str]:
        """The names of the files with the weights."""
        found = ([n for n in self.files if re.fullmatch(kind, n)] for kind in WEIGHTS)
        return next(filter(None, found), [])

    def authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the token to a request; `requests` calls this as its `auth`."""
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


def look_up(name: str, revision: str) -> Repository:
    """Return the Repository of OWNER/NAME at a branch, tag or commit.

    Raises:
        UserError: no such model, no access to it, no GPT-2's files in it, or the hub cannot be
            reached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE forbids the network. Unset it to download a model")
    empty = Repository(name, f"{endpoint}/{name}", "", {}, huggingface_hub.get_token())
    repository = _described(empty, _listing(empty, endpoint, revision), endpoint)
    found = repository.files
    if "adapter_config.json" in found and not repository.weights:
        raise UserError(
            f"{repository.url} is a LoRA adapter, not a model. Download its files and its base, "
            "and merge them with: gpt2cli convert ADAPTER DST --base models/BASE"
        )
    if "config.json" not in found or not repository.weights:
        lacking = "weights (.safetensors or pytorch_model.bin)" if "config.json" in found else ""
        names = ", ".join(f"{name:.60}" for name in sorted(found)[:8]) or "nothing"
        raise UserError(
            f"{repository.url} has no {lacking or 'config.json'}, so it is not a transformers "
            f"model; it contains {names}"
        )
    return repository


def _listing(repository: Repository, endpoint: str, revision: str) -> bytes:
    """Return the body of the hub's answer to `GET /api/models/...`; UserError if it fails."""
    page = repository.url
    address = f"{endpoint}/api/models/{repository.name}/revision/{quote(revision, safe='')}"
    try:
        with requests.Session() as session:
            session.auth = repository.authorize
            with bodies.answer_of(session, f"{address}?blobs=true") as response:
                if response.status_code != 200:
                    raise _denial(response, page, endpoint, revision)
                return b"".join(bodies.body_of(response, address, LISTING))
    except (requests.ConnectionError, requests.Timeout, *bodies.INTERRUPTED) as error:
        raise UserError(
            f"cannot reach {endpoint} ({bodies.reason_of(error):.200}). Check the network and "
            "HF_ENDPOINT, and run the same command again"
        ) from error
    except (OSError, ValueError, bodies.TryAgain, urllib3.exceptions.HTTPError) as error:
        raise _no_hub(endpoint, str(error)) from error


def _denial(response: requests.Response, page: str, endpoint: str, revision: str) -> UserError:
    """Return the UserError for an answer that is not a listing."""
    status, code = response.status_code, response.headers.get("X-Error-Code")
    reason = response.headers.get("X-Error-Message") or f"it answered {status}"
    if code == "GatedRepo":
        return UserError(f"you have no access to {page}. {denied(page)}")
    if code == "RevisionNotFound":
        return UserError(f"{page} has no revision {revision!r}. Check --revision")
    if code == "RepoNotFound":
        return UserError(
            f"there is no {page}, or it is private. Check the name; for a private model set "
            "HF_TOKEN to a token that may read it"
        )
    if status in (401, 403):
        return UserError(
            f"{page} does not exist or you have no access ({reason:.200}). Check the name and "
            f"HF_TOKEN. {denied(page)}"
        )
    return _no_hub(endpoint, reason)


def _no_hub(endpoint: str, reason: str) -> UserError:
    """Return the UserError for a server that does not answer like a hub."""
    return UserError(
        f"{endpoint} does not answer like a Hugging Face hub ({reason:.200}). Check HF_ENDPOINT, "
        "or run the same command later"
    )


def _described(repository: Repository, answer: bytes, endpoint: str) -> Repository:
    """Return the repository with the commit and the files that the hub's answer names.

    Raises:
        UserError: a field is missing or has another type.
    """
    try:
        values = files.parse_object(answer, "its answer")
        commit, siblings = values.get("sha"), values.get("siblings") or []
        if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError("it names no commit")
        if not isinstance(siblings, list):
            raise ValueError("it has no list of files")
        found = dict(map(_named, siblings))
    except (UserError, ValueError) as error:
        raise _no_hub(endpoint, str(error)) from None
    return replace(repository, commit=commit, files=found)


def _named(file: Any) -> tuple[str, Stated | None]:
    """Return a file's name, its size and checksum: SHA-256 for a large one, else its git blob.

    Raises:
        ValueError: the hub describes the file in another form.
    """
    name = file.get("rfilename") if isinstance(file, dict) else None
    if not isinstance(name, str):
        raise ValueError("a file has no name")
    lfs = file.get("lfs")
    values = lfs if isinstance(lfs, dict) else file
    algorithm, checksum, digits = "git", file.get("blobId"), 40
    if isinstance(lfs, dict):
        algorithm, checksum, digits = "sha256", lfs.get("sha256"), 64
    size: Any = values.get("size")
    if lfs is None and (checksum is None or size is None):
        return name, None
    is_sum = isinstance(checksum, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", checksum)
    if not is_sum or not counts.is_whole(size, 0, counts.MAX_BYTES):
        raise ValueError(f"it states no valid size and checksum for {name!r:.80}")
    return name, Stated(size, algorithm, str(checksum))


def denied(page: str) -> str:
    """Return the advice for a model or file that the hub denies."""
    return (
        f"If it is gated (Hugging Face asks you to accept its terms), do so at {page}; then set "
        "HF_TOKEN to a token of that account"
    )


def fetch(
    session: requests.Session, repository: Repository, folder: Path, names: Iterable[str]
) -> None:
    """Fetch files of a repository into `folder`, except those that are already there and intact.

    Raises:
        UserError: see `transfer.fetch`.
    """
    for name in names:
        stated = repository.files[name]
        path = folder / name
        if stated is not None and path.is_file() and _fault(path, stated) is None:
            continue
        path.unlink(missing_ok=True)  # from another commit
        wanted = transfer.Wanted(
            f"{repository.url}/resolve/{repository.commit}/{quote(name)}",
            path,
            _most(name, stated),
            functools.partial(_fault, stated=stated),
            mirror="HF_ENDPOINT",
            denied=denied(repository.url),
            hashed=stated is not None,
        )
        transfer.fetch(session, wanted)


def _most(name: str, stated: Stated | None) -> int:
    """Return how many bytes a file may have: those that the hub states, within reason."""
    most = MOST_DESCRIPTION if name in DESCRIPTION or name.endswith(".json") else MOST_WEIGHTS
    if stated is not None and stated.size > most:
        raise UserError(
            f"the hub states {stated.size:,} bytes for {name}, but such a file has at most "
            f"{most:,}, so this is not a GPT-2. Check the name of the model"
        )
    return most if stated is None else stated.size


def _fault(path: Path, stated: Stated | None) -> str | None:
    """Return a description of the fault in a file; None if it is as the hub states."""
    if stated is None:
        return None
    if transfer.size_of(path) != stated.size:
        return f"it has {transfer.size_of(path):,} bytes, but the hub announced {stated.size:,}"
    if stated.algorithm == "git":
        found = files.digest(path, "sha1", b"blob %d\0" % stated.size)
    else:
        found = files.digest(path, stated.algorithm)
    return (
        None
        if found == stated.checksum
        else f"its {stated.algorithm} checksum differs from the hub's"
    )

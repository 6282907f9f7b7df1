"""The Hugging Face hub: which files of a repository make a GPT-2, and how they are fetched.

huggingface_hub reports the files and checks access (HF_ENDPOINT, HF_TOKEN). `transfer` fetches
them, because huggingface_hub discards a partial file when it fails.
"""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import requests

from gpt2cli import console, files
from gpt2cli.errors import UserError
from gpt2cli.remote import transfer

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

ENDPOINT = "https://huggingface.co"
# The config is first, as it shows whether the model is a GPT-2 at all.
DESCRIPTION = (
    *("config.json", "generation_config.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "spiece.model", "tokenizer.model", "spm.model"),
)
# The weights in one file, or an index and several; the first kind that exists is used.
WEIGHTS = (
    r"model\.safetensors",
    r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin",
    r"pytorch_model(-\d+-of-\d+\.bin|\.bin\.index\.json)",
)


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
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
    import huggingface_hub
    from huggingface_hub.utils import logging

    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")
    if not console.verbose:
        logging.set_verbosity_error()
    with _explained(f"{endpoint}/{name}", revision, endpoint):
        api = huggingface_hub.HfApi(endpoint=endpoint)
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=30)
        if not info.sha or not re.fullmatch("[0-9a-f]{40}", info.sha):
            raise ValueError("it names no commit")
    found = {file.rfilename: _stated(file) for file in info.siblings or []}
    token = huggingface_hub.get_token()
    repository = Repository(name, f"{endpoint}/{name}", info.sha, found, token)
    if "adapter_config.json" in found and not repository.weights:
        raise UserError(
            f"{repository.url} is a LoRA adapter, not a model. Download its files and its base, "
            "and merge them with: gpt2cli convert ADAPTER DST --base models/BASE"
        )
    if "config.json" not in found or not repository.weights:
        lacking = "weights (.safetensors or pytorch_model.bin)" if "config.json" in found else ""
        names = ", ".join(sorted(found)[:8]) or "nothing"
        raise UserError(
            f"{repository.url} has no {lacking or 'config.json'}, so it is not a transformers "
            f"model; it contains {names}"
        )
    return repository


def _stated(file: "RepoSibling") -> Stated | None:
    """Return the size and checksum of a file: SHA-256 for a large one, else its git blob."""
    if file.lfs is not None:
        return Stated(file.lfs.size, "sha256", file.lfs.sha256)
    if file.blob_id and file.size is not None:
        return Stated(file.size, "git", file.blob_id)
    return None


@contextlib.contextmanager
def _explained(page: str, revision: str, endpoint: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into a UserError with advice."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"you have no access to {page}. {denied(page)}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{page} has no revision {revision!r}. Check --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no {page}, or it is private. Check the name; for a private model set "
            "HF_TOKEN to a token that may read it"
        ) from error
    except Exception as error:
        # The HTTP library of huggingface_hub was requests, then httpx, and may change again.
        library = type(error).__module__.split(".")[0]
        known = ("httpx", "requests", "urllib3", "huggingface_hub")
        if not isinstance(error, OSError | ValueError) and not library.startswith(known):
            raise
        raise _user_error(error, page, endpoint) from error


def _user_error(error: Exception, page: str, endpoint: str) -> UserError:
    """Return the UserError for a failed request or an unexpected answer of the hub."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    answer = status and (getattr(error, "server_message", None) or f"it answered {status}")
    reason = " ".join((answer or str(error)).split())[:200] or type(error).__name__
    if status in (401, 403):
        return UserError(
            f"{page} does not exist or you have no access ({reason}). Check the name and HF_TOKEN. "
            f"{denied(page)}"
        )
    if status is not None or isinstance(error, ValueError):
        return UserError(
            f"{endpoint} does not answer like a Hugging Face hub ({reason}). Check HF_ENDPOINT, or "
            "run the same command later"
        )
    return UserError(
        f"cannot reach {endpoint} ({reason}). Check the network and HF_ENDPOINT, and run the "
        "same command again"
    )


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
            functools.partial(_fault, stated=stated),
            mirror="HF_ENDPOINT",
            denied=denied(repository.url),
            hashed=stated is not None,
        )
        transfer.fetch(session, wanted)


def _fault(path: Path, stated: Stated | None) -> str | None:
    """Return a description of the fault in a file; None if it is as the hub states."""
    if stated is None:
        return None
    if transfer.size_of(path) != stated.size:
        return f"it has {transfer.size_of(path):,} bytes, but the hub announced {stated.size:,}"
    if stated.algorithm == "git":  # SHA-1 of a header and the content
        content = b"blob %d\0" % stated.size + path.read_bytes()
        found = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    else:
        found = files.digest(path, stated.algorithm)
    return (
        None
        if found == stated.checksum
        else f"its {stated.algorithm} checksum differs from the hub's"
    )

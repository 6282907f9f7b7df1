"""The Hugging Face hub: which files of a repository make a GPT-2, and how they come here.

huggingface_hub answers what there is and who may read it (HF_ENDPOINT, HF_TOKEN). The files come
with `transfer`, because huggingface_hub drops what it has of a file when it fails.
"""

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from gpt2cli import console, files
from gpt2cli.errors import UserError
from gpt2cli.remote import transfer

ENDPOINT = "https://huggingface.co"
# The config first: it shows whether the model is a GPT-2 at all.
DESCRIPTION = (
    *("config.json", "generation_config.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
# The weights in one file, or an index and several; what comes first counts.
WEIGHTS = (
    r"model\.safetensors",
    r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin",
    r"pytorch_model(-\d+-of-\d+\.bin|\.bin\.index\.json)",
)


@dataclass(frozen=True)
class Repository:
    """A model on the hub at one commit.

    Args:
        name: OWNER/NAME.
        url: its page.
        commit: 40 hexadecimal digits.
        files: name -> (bytes, algorithm, checksum) of each file; None where the hub says nothing.
        token: of the user, or None.
    """

    name: str
    url: str
    commit: str
    files: dict
    token: str | None

    @property
    def description(self):
        """The names of the config and the tokenizer's files."""
        return [name for name in DESCRIPTION if name in self.files]

    @property
    def weights(self):
        """The names of the files with the weights."""
        found = ([n for n in self.files if re.fullmatch(kind, n)] for kind in WEIGHTS)
        return next(filter(None, found), [])

    def authorize(self, request):
        """Add the token to a request, as `requests` asks an `auth` to."""
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


def look_up(name, revision):
    """The Repository of OWNER/NAME at a branch, tag or commit.

    Raises:
        UserError: there is none, it is not for this user, no GPT-2's files are in it, or the hub
            cannot be reached.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # it is read when the library is loaded
    import huggingface_hub
    from huggingface_hub.utils import logging

    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")
    if not console.verbose:
        logging.set_verbosity_error()
    with _in_words(f"{endpoint}/{name}", revision, endpoint):
        api = huggingface_hub.HfApi(endpoint=endpoint)
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=30)
        if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
            raise ValueError("it names no commit")
    found = {file.rfilename: _stated(file) for file in info.siblings or []}
    token = huggingface_hub.get_token()
    repository = Repository(name, f"{endpoint}/{name}", info.sha, found, token)
    if "config.json" not in found or not repository.weights:
        lacking = "weights (.safetensors or pytorch_model.bin)" if "config.json" in found else ""
        names = ", ".join(sorted(found)[:8]) or "nothing"
        raise UserError(
            f"{repository.url} has no {lacking or 'config.json'}, so it is no model of transformers"
            f"; it holds {names}"
        )
    return repository


def _stated(file):
    """(bytes, algorithm, checksum) of a file: sha256 of a large one, else that of a git blob."""
    lfs = file.lfs
    if lfs is not None:
        return lfs.size, "sha256", lfs.sha256
    return (file.size, "git", file.blob_id) if file.blob_id and file.size is not None else None


@contextlib.contextmanager
def _in_words(page, revision, endpoint):
    """Turn what huggingface_hub raises into a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{page} is not open to you. {denied(page)}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{page} has no revision {revision!r}. Check --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no {page}, or it is private. Check the name; for a private model set "
            "HF_TOKEN to a token that may read it"
        ) from error
    except Exception as error:
        # The library under huggingface_hub was requests, then httpx, and may change again.
        library = type(error).__module__.split(".")[0]
        if not isinstance(error, OSError | ValueError) and not library.startswith(
            ("httpx", "requests", "urllib3", "huggingface_hub")
        ):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = status and (getattr(error, "server_message", None) or f"it answered {status}")
        reason = " ".join((said or str(error)).split())[:200] or type(error).__name__
        if status in (401, 403):
            raise UserError(
                f"{page} is not there or not open to you ({reason}). Check the name and HF_TOKEN. "
                f"{denied(page)}"
            ) from error
        if status is not None or isinstance(error, ValueError):
            raise UserError(
                f"{endpoint} does not answer as a hub does ({reason}). Check HF_ENDPOINT, or run "
                "the same command later"
            ) from error
        raise UserError(
            f"cannot reach {endpoint} ({reason}). Check the network and HF_ENDPOINT, and run the "
            "same command again"
        ) from error


def denied(page):
    """What to do where the hub refuses a file or a model."""
    return (
        f"If it is gated (Hugging Face asks to accept its terms), do so at {page}; then set "
        "HF_TOKEN to a token of that account"
    )


def fetch(session, repository, folder, names):
    """Bring files of a repository into `folder`; what is there and right is not asked for.

    Raises:
        UserError: see `transfer.fetch`.
    """
    for name in names:
        stated = repository.files[name]
        path = Path(folder) / name
        base = f"{repository.url}/resolve/{repository.commit}"
        wanted = transfer.Wanted(
            f"{base}/{quote(name)}",
            path,
            lambda path, stated=stated: _fault(path, stated),
            mirror="HF_ENDPOINT",
            denied=denied(repository.url),
            hashed=stated is not None,
        )
        if stated is not None and path.is_file() and _fault(path, stated) is None:
            continue
        path.unlink(missing_ok=True)  # of another commit
        transfer.fetch(session, wanted)


def _fault(path, stated):
    """What is wrong with a file, in words; None if it is the one that the hub states."""
    if stated is None:
        return None
    size, algorithm, checksum = stated
    if transfer.size_of(path) != size:
        return f"it has {transfer.size_of(path):,} bytes and the hub stated {size:,}"
    if algorithm == "git":  # the name of a blob: SHA-1 of a heading and the content
        content = Path(path).read_bytes()
        found = hashlib.sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest()
    else:
        found = files.digest(path, algorithm)
    return None if found == checksum else f"its {algorithm} checksum is not the one of the hub"

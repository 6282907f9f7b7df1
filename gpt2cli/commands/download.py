"""gpt2cli download: the files of a model, whole or not at all.

A file is written to NAME.part and renamed when its length and checksums fit. NAME.part.json keeps
what the server said of it, so that a later attempt goes on with the same file or starts again.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import quote

import requests
import urllib3
from tqdm import tqdm

from gpt2cli import files
from gpt2cli.config import ALIASES, RELEASED, DownloadConfig, ModelConfig
from gpt2cli.errors import UserError

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

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0  # seconds; the second is without a byte
TRIES = 5  # failures in a row that brought no new byte
DAMAGED_TRIES = 2  # files that came whole but wrong: each may be 6 GB
BACKOFF = 1.0  # seconds before the second try, then twice as long each time
MAX_WAIT = 300.0  # seconds; a server that asks for more is left alone
CHUNK = 1 << 16  # bytes
MAX_JSON = 1 << 26  # bytes; OpenAI's encoder.json has 1 MB
ABSENT = (403, 404, 410)  # storage services answer 403 where names may not be listed
CUT = (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.ProtocolError)


class TryAgain(Exception):
    """A failure that may pass; `wait` is the number of seconds that the server asked for."""

    def __init__(self, text, wait=None, tries=None):
        super().__init__(text)
        self.wait = wait
        self.tries = tries or TRIES


def run(config: DownloadConfig) -> None:
    """gpt2cli download: a name to a model folder that opens; no name prints the list.

    A folder whose files all have the length and sha256 recorded in download.json is complete, and
    no network is used. Every file is read for that: 0.3 s for 124M, 4 s for 1558M.

    Raises:
        UserError: an unknown name, no such file, a server that keeps failing, damaged files, no
            space, another download into the same folder, or a checkpoint that does not open.
    """
    if config.model is None:
        print(model_table())
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
        with files.locked(folder, "download"):
            fetch_model(config.url or BUCKET, name, folder)
            open_checkpoint(folder)
    command = ["gpt2cli", "sample", "--model_name", name]
    command += ["--models_dir", config.models_dir] if config.models_dir != "models" else []
    say(f"{folder} is complete. Try: {shlex.join(command)}")


def say(text):
    """One line of conversation; standard output is for the list alone."""
    print(text, file=sys.stderr, flush=True)


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
        say(f"downloading {url} to {folder}" + (f", where {len(done)} of 7 are" if done else ""))
        for file in FILES:
            if file not in done:
                # What no record contradicts (OpenAI's own script fetched it) stays if it fits.
                adopt = (folder / file).is_file() and (file in intact or file not in records)
                done[file] = fetch(session, f"{url}/{file}", folder / file, name, adopt)
                write_manifest(folder, {"url": url, "opened": False, "files": done})


def open_checkpoint(folder):
    """Check that the weights open and fit hparams.json; UserError says what to do if not."""
    from gpt2cli import checkpoint  # brings TensorFlow, which the rest of this file does without

    say("opening the checkpoint")
    try:
        checkpoint.verify(folder)
    except UserError as error:
        raise UserError(
            f"{error}. This is what the server has: delete {folder} and name another with --url"
        ) from error
    write_manifest(folder, {**read_manifest(folder), "opened": True})


def fetch(session, url, path, model, adopt):
    """Bring one file, with as many tries as it takes while each brings new bytes.

    urllib3's Retry repeats a request, but a body that was cut has to go on, so the loop is ours.
    Returns the record for the manifest, None for an optional file that the server does not have.
    """
    part, _ = part_of(path)
    failures, best = 0, size_of(part)
    while True:
        try:
            return attempt(session, url, path, model, adopt)
        except TryAgain as error:
            problem = error
        except (requests.ConnectionError, requests.Timeout, *CUT) as error:
            problem = TryAgain(in_words(error))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise UserError(f"cannot fetch {url}: {error}. Check --url") from error
        except OSError as error:
            rest = f"the next attempt goes on after {size_of(part):,} bytes of {path.name}"
            raise UserError(f"{files.cannot_write(path, error)}, and {rest}") from error
        failures = 0 if size_of(part) > best else failures + 1
        best = max(best, size_of(part))
        wait = BACKOFF * 2 ** (failures - 1) if problem.wait is None else problem.wait
        if failures >= problem.tries or wait > MAX_WAIT:
            asked = f" and asks to wait {wait:,.0f} s" if wait > MAX_WAIT else ""
            raise UserError(
                f"cannot fetch {url}: {problem}{asked}. Run the same command later, it "
                "goes on from what is there; or try a mirror with --url"
            )
        say(f"{path.name}: {problem}; trying again in {wait:g} s")
        time.sleep(wait)


def in_words(error):
    """A connection's failure, dug out of the exceptions that requests wraps around it."""
    reason = getattr(next(iter(error.args), None), "reason", error)
    return "the connection was cut" if isinstance(error, CUT) else str(reason).split(": ")[-1]


def attempt(session, url, path, model, adopt):
    """One request for one file, and all checks; what fails leaves a .part to go on from."""
    part, note_path = part_of(path)
    note = read_json(note_path)
    known = note.get("url") == url and note["validator"] and note["bytes"]
    # The last byte is asked for again: so a .part that is whole gets 206 as well, and not 416.
    start = max(size_of(part) - 1, 0) if known else 0
    headers = {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-", "If-Range": note["validator"]} if start else {}
    timeout = (CONNECT_TIMEOUT, READ_TIMEOUT)
    with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code in ABSENT and path.name in OPTIONAL:
            return None
        check_answer(response, url)
        if response.status_code == 200:  # also if the server knows no Range, or the file changed
            start, note = 0, note_of(response, url)
            if adopt and note["bytes"] is not None and not fault_of(path, path.name, model, note):
                return record_of(path, note["etag"])
        elif not (start and is_rest(response, start, note)):
            part.unlink(missing_ok=True)
            raise TryAgain("the file on the server has changed")
        write_body(response, path, start, note)
    return put_in_place(path, model, note)


def put_in_place(path, model, note):
    """Rename a .part that is as it should be and return its record; TryAgain if it is not."""
    part, note_path = part_of(path)
    fault = fault_of(part, path.name, model, note)
    if fault:
        part.unlink()
        raise TryAgain(fault, tries=DAMAGED_TRIES)
    if path.exists():  # damaged, or the user's own fine-tuned weights: not ours to delete
        os.replace(path, path.with_name(path.name + ".old"))
        say(f"{path} was not the server's; it is kept as {path.name}.old")
    os.replace(part, path)
    note_path.unlink()
    return record_of(path, note["etag"])


def check_answer(response, url):
    """Raise TryAgain or UserError for an answer that is not (a part of) the file; 416 passes."""
    status, kind = response.status_code, response.headers.get("Content-Type", "").lower()
    answer = f"the server answered {status} {response.reason}"
    if status in (408, 425, 429) or status >= 500:
        wait = response.headers.get("Retry-After")
        with contextlib.suppress(urllib3.exceptions.InvalidHeader):
            raise TryAgain(answer, wait and urllib3.Retry().parse_retry_after(wait))
        raise TryAgain(answer)
    if status in ABSENT:
        raise UserError(f"{url} is not to be had ({answer}). Check the model's name and --url")
    if status not in (200, 206, 416):
        raise UserError(f"cannot fetch {url}: {answer}. Check --url")
    if status != 416 and re.search("html|xml", kind):
        raise TryAgain(f"{answer} with a page ({kind}), not the file; is there a proxy between?")


def is_rest(response, start, note):
    """Whether a 206 is the rest of the very file that `note` is about."""
    span = f"bytes {start}-{note['bytes'] - 1}/{note['bytes']}"
    same = validator_of(response.headers) in ("", note["validator"])
    return response.headers.get("Content-Range") == span and same


def validator_of(headers):
    """What If-Range may name: a strong ETag or a date (RFC 9110, 13.1.5); empty if neither."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def note_of(response, url):
    """What a 200 says of the whole file: its length, its MD5s, its tag for If-Range."""
    headers = response.headers
    etag, length = headers.get("ETag", ""), headers.get("Content-Length", "")
    validator = validator_of(headers)
    md5 = [headers.get("Content-MD5", "")]
    md5 += re.findall(r"md5=([\w+/=]+)", headers.get("x-goog-hash", ""))
    md5 = [base64.b64decode(text).hex() for text in md5 if re.fullmatch(r"[\w+/]{22}==", text)]
    # S3's ETag is the MD5, unless the file came in parts ("...-7") or is encrypted with own keys.
    if not headers.get("x-amz-server-side-encryption", "").startswith("aws:kms"):
        md5 += re.findall(r'^"([0-9a-f]{32})"$', etag.lower())
    if headers.get("Content-Encoding", "identity") != "identity":
        length, validator, md5 = "", "", []  # they speak of the compressed form
    size = int(length) if length.isdigit() else None
    return {"url": url, "validator": validator, "etag": etag, "bytes": size, "md5": md5}


def write_body(response, path, start, note):
    """Put the body into the .part from byte `start` on; on the disk when this returns."""
    part, note_path = part_of(path)
    total = note["bytes"]
    # In bites, so that a cut takes at most a hundredth of a small file with it; whole chunks where
    # an older .part has to go, so that an error page is known before that.
    bite = CHUNK if total is None or (size_of(part) and not start) else total // 100 + 1
    chunks = response.iter_content(min(CHUNK, bite))
    first = next(chunks, b"")
    if not start and is_page(first):
        raise TryAgain("the server sent a page, not the file; is there a proxy between?")
    needed, free = (total or 0) - start, shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"no space for {path}: {needed:,} bytes needed, {free:,} free. "
            "Free some or choose another --models_dir; what is there is kept"
        )
    bar = {"initial": start, "unit": "B", "unit_scale": True, "disable": None}  # None: no terminal
    with (
        open(part, "r+b" if start else "wb") as file,
        tqdm(desc=path.name, total=total, **bar) as progress,
    ):
        if not start:  # not before the old .part is gone: it must never meet a newer note
            note_path.write_text(json.dumps(note), encoding="utf-8")
        file.truncate(start)
        file.seek(start)
        for chunk in itertools.chain([first], chunks):
            file.write(chunk)
            progress.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())


def is_page(head):
    """Whether a file begins like HTML or XML; weights may begin with a `<`, but not go on so."""
    head = head[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    return re.fullmatch(rb"<[\t\r\n -~]*", head) is not None


def fault_of(path, name, model, note):
    """What is wrong with a finished file, in words; None if it is as stated and can be read."""
    size = size_of(path)
    if note["bytes"] not in (None, size):
        return f"it has {size:,} bytes and the server stated {note['bytes']:,}"
    if note["md5"] and {digest(path, "md5")} != set(note["md5"]):
        return "its MD5 is not the one that the server stated"
    if model in RELEASED and name in SHA256 and digest(path) != SHA256[name]:
        return "its sha256 is not that of OpenAI's file"
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head or is_page(head) or (name == "checkpoint" and b"model_checkpoint_path" not in head):
        return "it holds something else"
    if not name.endswith(".json"):
        return None
    try:
        text = files.read_text(path) if size <= MAX_JSON else ""
        values = json.loads(text)
        if name == "hparams.json":
            ModelConfig.from_json(text)
        return None if isinstance(values, dict) else "it holds no JSON object"
    except (UserError, ValueError, RecursionError) as error:
        return f"it cannot be read ({error})"


def part_of(path):
    """Where a file and the note about it lie until it is whole."""
    return path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")


def read_json(path):
    """The object in a JSON file of ours; an empty one where there is none or it is damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_bytes())
        return values if isinstance(values, dict) else {}
    return {}


def size_of(path):
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def digest(path, algorithm="sha256"):
    """The checksum of a file, in hexadecimal."""
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def record_of(path, etag):
    """What the manifest keeps of a file."""
    return {"bytes": size_of(path), "sha256": digest(path), "etag": etag}


def read_manifest(folder):
    """download.json, whose "files" is a dictionary in any case."""
    manifest = read_json(folder / MANIFEST)
    return manifest if isinstance(manifest.get("files"), dict) else {"files": {}}


def write_manifest(folder, manifest):
    """Write download.json; UserError where that cannot be done."""
    with files.replacing(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)


def intact_names(folder, manifest):
    """The files that are as the manifest records them."""
    intact = set()
    for name in set(FILES) & set(manifest["files"]):
        record = manifest["files"][name]
        with contextlib.suppress(OSError, KeyError, TypeError):
            absent = record is None and name in OPTIONAL
            if absent or record_of(folder / name, record["etag"]) == record:
                intact.add(name)
    return intact

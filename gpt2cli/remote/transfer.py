"""A file from a server to the disk, whole or not at all, and gone on with after a cut.

A file is written to NAME.part and renamed when its length and checksums fit. NAME.part.json keeps
what the server said of it, so that a later attempt goes on with the same file or starts again.
"""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm

from gpt2cli import files
from gpt2cli.console import say
from gpt2cli.errors import UserError

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0  # seconds; the second is without a byte
TRIES = 5  # failures in a row that brought no new byte
DAMAGED_TRIES = 2  # files that came whole but wrong: each may be 6 GB
BACKOFF = 1.0  # seconds before the second try, then twice as long each time
MAX_WAIT = 300.0  # seconds; a server that asks for more is left alone
CHUNK = 1 << 16  # bytes
ABSENT = (403, 404, 410)  # storage services answer 403 where names may not be listed
CUT = (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.ProtocolError)


class TryAgain(Exception):
    """A failure that may pass; `wait` is the number of seconds that the server asked for."""

    def __init__(self, text, wait=None, tries=None):
        super().__init__(text)
        self.wait = wait
        self.tries = tries or TRIES


@dataclass(frozen=True)
class Wanted:
    """One file to bring.

    Args:
        url: where from.
        path: where to.
        fault: function of a finished file's path that says in words what is wrong with it, or None.
        mirror: the setting that names another server: "--url".
        denied: what to do about 401 and 403, where that is not to check name and mirror.
        optional: the server need not have it.
        adopt: a file that is at `path` already stays if it fits what the server says.
        hashed: `fault` knows the file's checksum, so that it may begin like a page of HTML.
    """

    url: str
    path: Path
    fault: Callable
    mirror: str = "--url"
    denied: str | None = None
    optional: bool = False
    adopt: bool = False
    hashed: bool = False


def fetch(session, wanted):
    """Bring one file, with as many tries as it takes while each brings new bytes.

    urllib3's Retry repeats a request, but a body that was cut has to go on, so the loop is ours.
    Returns the record for the manifest, None for an optional file that the server does not have.

    Raises:
        UserError: no such file, no access, a server that keeps failing, a damaged file, no space.
    """
    url, path = wanted.url, wanted.path
    part, _ = part_of(path)
    failures, best = 0, size_of(part)
    while True:
        try:
            return attempt(session, wanted)
        except TryAgain as error:
            problem = error
        except (requests.ConnectionError, requests.Timeout, *CUT) as error:
            problem = TryAgain(in_words(error))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise UserError(f"cannot fetch {url}: {error}. Check {wanted.mirror}") from error
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
                f"goes on from what is there; or try a mirror with {wanted.mirror}"
            )
        say(f"{path.name}: {problem}; trying again in {wait:g} s")
        time.sleep(wait)


def in_words(error):
    """A connection's failure, dug out of the exceptions that requests wraps around it."""
    reason = getattr(next(iter(error.args), None), "reason", error)
    return "the connection was cut" if isinstance(error, CUT) else str(reason).split(": ")[-1]


def attempt(session, wanted):
    """One request for one file, and all checks; what fails leaves a .part to go on from."""
    url, path = wanted.url, wanted.path
    part, note_path = part_of(path)
    note = read_json(note_path)
    known = note.get("url") == url and note["validator"] and note["bytes"]
    # The last byte is asked for again: so a .part that is whole gets 206 as well, and not 416.
    start = max(size_of(part) - 1, 0) if known else 0
    headers = {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-", "If-Range": note["validator"]} if start else {}
    timeout = (CONNECT_TIMEOUT, READ_TIMEOUT)
    with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code in ABSENT and wanted.optional:
            return None
        check_answer(response, wanted)
        if response.status_code == 200:  # also if the server knows no Range, or the file changed
            start, note = 0, note_of(response, url)
            if wanted.adopt and note["bytes"] is not None and not fault_of(path, wanted, note):
                return record_of(path, note["etag"])
        elif not (start and is_rest(response, start, note)):
            part.unlink(missing_ok=True)
            raise TryAgain("the file on the server has changed")
        write_body(response, wanted, start, note)
    return put_in_place(wanted, note)


def put_in_place(wanted, note):
    """Rename a .part that is as it should be and return its record; TryAgain if it is not."""
    path = wanted.path
    part, note_path = part_of(path)
    fault = fault_of(part, wanted, note)
    if fault:
        part.unlink()
        raise TryAgain(fault, tries=DAMAGED_TRIES)
    if path.exists():  # damaged, or the user's own fine-tuned weights: not ours to delete
        os.replace(path, path.with_name(path.name + ".old"))
        say(f"{path} was not the server's; it is kept as {path.name}.old")
    os.replace(part, path)
    note_path.unlink()
    return record_of(path, note["etag"])


def check_answer(response, wanted):
    """Raise TryAgain or UserError for an answer that is not (a part of) the file; 416 passes."""
    url, mirror = wanted.url, wanted.mirror
    status, kind = response.status_code, response.headers.get("Content-Type", "").lower()
    answer = f"the server answered {status} {response.reason}"
    if status in (408, 425, 429) or status >= 500:
        wait = response.headers.get("Retry-After")
        with contextlib.suppress(urllib3.exceptions.InvalidHeader):
            raise TryAgain(answer, wait and urllib3.Retry().parse_retry_after(wait))
        raise TryAgain(answer)
    if status in (401, 403) and wanted.denied:
        raise UserError(f"{url} is not to be had ({answer}). {wanted.denied}")
    if status in ABSENT:
        raise UserError(f"{url} is not to be had ({answer}). Check the model's name and {mirror}")
    if status not in (200, 206, 416):
        raise UserError(f"cannot fetch {url}: {answer}. Check {mirror}")
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


def write_body(response, wanted, start, note):
    """Put the body into the .part from byte `start` on; on the disk when this returns."""
    path = wanted.path
    part, note_path = part_of(path)
    total = note["bytes"]
    # In bites, so that a cut takes at most a hundredth of a small file with it; whole chunks where
    # an older .part has to go, so that an error page is known before that.
    bite = CHUNK if total is None or (size_of(part) and not start) else total // 100 + 1
    chunks = response.iter_content(min(CHUNK, bite))
    first = next(chunks, b"")
    if not start and not wanted.hashed and is_page(first):
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


def fault_of(path, wanted, note):
    """What is wrong with a finished file, in words; None if it is as stated and can be read."""
    size = size_of(path)
    if note["bytes"] not in (None, size):
        return f"it has {size:,} bytes and the server stated {note['bytes']:,}"
    if note["md5"] and not wanted.hashed and {files.digest(path, "md5")} != set(note["md5"]):
        return "its MD5 is not the one that the server stated"
    if not wanted.hashed:
        with open(path, "rb") as file:
            head = file.read(64)
        if not head or is_page(head):
            return "it holds something else"
    return wanted.fault(path)


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


def record_of(path, etag):
    """What the manifest keeps of a file."""
    return {"bytes": size_of(path), "sha256": files.digest(path), "etag": etag}


def is_as_recorded(path, record):
    """Whether a file is the one that `record_of` described; a record of something else is not."""
    with contextlib.suppress(OSError, KeyError, TypeError):
        return record_of(path, record["etag"]) == record
    return False

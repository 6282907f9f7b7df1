"""Fetch a file from a server, whole or not at all, and resume after an interruption.

A file is written to NAME.part and renamed when its length and checksums are right. NAME.part.json
records the server's description of it, so that a later attempt resumes the same file or starts
again.
"""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import urllib3

from gpt2cli import __version__, counts, files, paths
from gpt2cli.console import progress, say
from gpt2cli.errors import UserError
from gpt2cli.remote import bodies
from gpt2cli.remote.manifest import FORMAT, Record, record_of

TRIES = 5  # failures in a row that brought no new byte
BACKOFF = 1.0  # seconds before the second try, then twice as long each time
MAX_WAIT = 300.0  # seconds; a server that asks for a longer wait ends the download
HEAD = 64  # bytes of a file that show whether it is a page
ABSENT = (403, 404, 410)  # storage services answer 403 where names may not be listed
HTML_PAGE = "an HTML page instead of the file; is a proxy intercepting the download?"
OTHER_CONTENT = "it contains something else"

# RFC 9110, 8.8.3. It is sent back in If-Range; real ones are far shorter than 200 characters.
ETAG = re.compile(r'(W/)?"[\x21\x23-\x7e]{0,200}"')
DATE = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,60}")

# The server's description of a whole file, as NAME.part.json records it: url, validator (for
# If-Range), etag, bytes (or None), md5 (a list of checksums).
Note = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """One file to fetch.

    Attributes:
        url: its address.
        path: the file to write.
        most: bytes of the largest file of its kind; the download stops there.
        fault: describes the fault in a finished file, None if there is none.
        mirror: the setting that names another server.
        denied: advice for 401 and 403 (default: check the name and the mirror).
        optional: the server may lack it.
        adopt: keep a file that is already at `path`, if it fits the server's description.
        hashed: `fault` compares a checksum, so the file may even begin like an HTML page.
    """

    url: str
    path: Path
    most: int
    fault: Callable[[Path], str | None]
    mirror: str = "--url"
    denied: str | None = None
    optional: bool = False
    adopt: bool = False
    hashed: bool = False


def fetch(session: requests.Session, wanted: Wanted) -> Record | None:
    """Fetch one file, retrying as long as each attempt brings new bytes.

    urllib3's Retry repeats a request, but an interrupted body must be resumed, hence this loop.

    Returns:
        The record for the manifest; None for an optional file that the server lacks.

    Raises:
        UserError: no such file, no access, a server that keeps failing, a damaged file, no space.
    """
    url, path = wanted.url, wanted.path
    part, _ = part_of(path)
    failures, best = 0, size_of(part)
    while True:
        try:
            return attempt(session, wanted)
        except bodies.TryAgain as error:
            problem = error
        except (requests.ConnectionError, requests.Timeout, *bodies.INTERRUPTED) as error:
            problem = bodies.TryAgain(bodies.reason_of(error))
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise UserError(f"cannot download {url} ({error}). Check {wanted.mirror}") from error
        except OSError as error:
            raise UserError(
                f"{files.cannot_write(path, error)}. The same command resumes after "
                f"{size_of(part):,} bytes of {path.name}"
            ) from error
        failures = 0 if size_of(part) >= best + problem.least else failures + 1
        best = max(best, size_of(part))
        wait = BACKOFF * 2 ** (failures - 1) if problem.wait is None else problem.wait
        if failures >= (problem.tries or TRIES) or wait > MAX_WAIT:
            asked = f" and asks to wait {wait:,.0f} s" if wait > MAX_WAIT else ""
            raise UserError(
                f"cannot download {url}: {problem}{asked}. Run the same command later to resume, "
                f"or choose another server with {wanted.mirror}"
            )
        say(f"{path.name}: {problem}; trying again in {wait:g} s")
        time.sleep(wait)


def attempt(session: requests.Session, wanted: Wanted) -> Record | None:
    """Fetch one file in one request and check it; a failure leaves a .part to resume."""
    url, path = wanted.url, wanted.path
    part, note_path = part_of(path)
    note = read_note(note_path)
    known = note.get("url") == url and note.get("validator") and note.get("bytes")
    # The last byte is requested again, so that a complete .part gets 206 as well, and not 416.
    start = max(size_of(part) - 1, 0) if known else 0
    headers = {"Range": f"bytes={start}-", "If-Range": note["validator"]} if start else {}
    with bodies.answer_of(session, url, headers) as response:
        if response.status_code in ABSENT and wanted.optional:
            return None
        check_answer(response, wanted)
        if response.status_code == 200:  # also if the server ignores Range, or the file changed
            start, note = 0, note_of(response, url)
            if wanted.adopt and note["bytes"] is not None and not fault_of(path, wanted, note):
                return record_of(path, note["etag"])
        elif not (start and is_rest(response, start, note)):
            part.unlink(missing_ok=True)
            raise bodies.TryAgain("the file on the server has changed")
        try:
            write_body(response, wanted, start, note)
        except bodies.TooLong:
            for own in (part, note_path):
                own.unlink(missing_ok=True)  # the first bytes may already be too many
            raise
    return put_in_place(wanted, note)


def put_in_place(wanted: Wanted, note: Note) -> Record:
    """Rename a .part without fault and return its record; TryAgain if there is one."""
    path = wanted.path
    part, note_path = part_of(path)
    fault = fault_of(part, wanted, note)
    if fault:
        part.unlink()
        raise bodies.TryAgain(fault, tries=bodies.DAMAGED_TRIES)
    if path.exists():  # damaged, or the user's own fine-tuned weights: not ours to delete
        old = files.move_away(path)
        say(f"{path} differed from the server's file; the old file was moved to {old.name}")
    os.replace(part, path)
    note_path.unlink()
    return record_of(path, note["etag"])


def check_answer(response: requests.Response, wanted: Wanted) -> None:
    """Raise TryAgain or UserError for an answer without (a part of) the file; 416 passes."""
    status, kind = response.status_code, response.headers.get("Content-Type", "").lower()
    answer = f"the server answered {status} {response.reason or '':.100}".strip()
    if status in (408, 425, 429) or status >= 500:
        wait = response.headers.get("Retry-After")
        with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
            raise bodies.TryAgain(answer, urllib3.Retry().parse_retry_after(wait) if wait else None)
        raise bodies.TryAgain(answer)
    if status not in (200, 206, 416):
        advice = f"Check {wanted.mirror}"
        if status in ABSENT:
            advice = f"Check the model's name and {wanted.mirror}"
        if status in (401, 403) and wanted.denied:
            advice = wanted.denied
        raise UserError(f"cannot download {wanted.url} ({answer}). {advice}")
    if status != 416 and re.search("html|xml", kind):
        raise bodies.TryAgain(f"{answer} with {HTML_PAGE}")


def is_rest(response: requests.Response, start: int, note: Note) -> bool:
    """Return whether a 206 is the rest of the same file that `note` describes."""
    span = f"bytes {start}-{note['bytes'] - 1}/{note['bytes']}"
    same = validator_of(response.headers) in ("", note["validator"])
    is_plain = not bodies.packing_of(response.headers)
    return response.headers.get("Content-Range") == span and same and is_plain


def validator_of(headers: Mapping[str, str]) -> str:
    """Return the value for If-Range: a strong ETag or a date (RFC 9110, 13.1.5), or nothing."""
    etag, date = headers.get("ETag", ""), headers.get("Last-Modified", "")
    if ETAG.fullmatch(etag) and not etag.startswith("W/"):
        return etag
    return date if DATE.fullmatch(date) else ""


def note_of(response: requests.Response, url: str) -> Note:
    """Return the description of the whole file that the headers of a 200 give."""
    headers = response.headers
    etag, length = headers.get("ETag", ""), headers.get("Content-Length", "")
    etag = etag if ETAG.fullmatch(etag) else ""
    validator = validator_of(headers)
    md5 = [headers.get("Content-MD5", "")]
    md5 += re.findall(r"md5=([\w+/=]+)", headers.get("x-goog-hash", ""))
    # ASCII: http.client reads a header's bytes as Latin-1, whose letters are not base64
    is_md5 = re.compile(r"[\w+/]{22}==", re.ASCII).fullmatch
    md5 = [base64.b64decode(text).hex() for text in md5 if is_md5(text)]
    # S3's ETag is the MD5, unless the file was uploaded in parts ("...-7") or is encrypted by KMS.
    if not headers.get("x-amz-server-side-encryption", "").startswith("aws:kms"):
        md5 += re.findall(r'^"([0-9a-f]{32})"$', etag.lower())
    if bodies.packing_of(headers):
        length, validator, md5 = "", "", []  # they describe the compressed form
    size = counts.whole_of(length, counts.MAX_BYTES)
    return {"url": url, "validator": validator, "etag": etag, "bytes": size, "md5": md5}


def write_body(response: requests.Response, wanted: Wanted, start: int, note: Note) -> None:
    """Write the body into the .part from byte `start`; it is on the disk when this returns."""
    path = wanted.path
    part, note_path = part_of(path)
    total = note["bytes"]
    if total is not None and total > wanted.most:
        raise UserError(
            f"{wanted.url} has {total:,} bytes, but this file has at most {wanted.most:,}. Check "
            f"the model's name and {wanted.mirror}"
        )
    most = (wanted.most if total is None else total) - start
    pieces = bodies.body_of(response, wanted.url, most)
    first = next(pieces, b"")
    while is_page(first) and len(first) < HEAD and (piece := next(pieces, b"")):
        first += piece
    if not start and not wanted.hashed and is_page(first):
        raise bodies.TryAgain(f"the server sent {HTML_PAGE}")
    needed, free = (total or 0) - start, shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"no space for {path}: {needed:,} bytes needed, {free:,} free. Free space, or choose "
            "another --models_dir; downloaded bytes are kept"
        )
    with (
        paths.open_own(part, "r+b" if start else "wb") as file,
        progress(total, "B", done=start) as bar,
    ):
        bar.set_description(path.name)
        if not start:  # after the old .part is gone, which must never meet a newer note
            with paths.open_own(note_path, "w", encoding="utf-8") as noted:
                json.dump({**note, "format": FORMAT, "gpt2cli": __version__}, noted)
        file.truncate(start)
        file.seek(start)
        for content in itertools.chain([first], pieces):
            file.write(content)
            bar.update(len(content))
        file.flush()
        os.fsync(file.fileno())


def is_page(head: bytes) -> bool:
    """Return whether a file begins like HTML or XML; weights may begin with `<`, not as text."""
    head = head[:HEAD].lstrip(b"\xef\xbb\xbf \t\r\n")
    return re.fullmatch(rb"<[\t\r\n -~]*", head) is not None


def fault_of(path: Path, wanted: Wanted, note: Note) -> str | None:
    """Return a description of the fault in a finished file; None if there is none."""
    size = size_of(path)
    if note["bytes"] not in (None, size):
        return f"it has {size:,} bytes, but the server announced {note['bytes']:,}"
    if note["md5"] and not wanted.hashed and {files.digest(path, "md5")} != set(note["md5"]):
        return "its MD5 differs from the server's"
    if not wanted.hashed:
        with open(path, "rb") as file:
            head = file.read(HEAD)
        if not head or is_page(head):
            return OTHER_CONTENT
    return wanted.fault(path)


def part_of(path: Path) -> tuple[Path, Path]:
    """Return the paths of an incomplete file and of the note about it."""
    return path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")


def read_note(path: Path) -> Note:
    """Return the note about an incomplete file; {} if it is missing or damaged.

    Raises:
        UserError: see `files.read_own`.
    """
    note = files.read_own(path, FORMAT)
    texts = (note.get(name) for name in ("url", "validator", "etag"))
    validator, size, md5 = note.get("validator"), note.get("bytes"), note.get("md5")
    is_whole = (
        all(isinstance(text, str) for text in texts)
        and (not validator or ETAG.fullmatch(validator) or DATE.fullmatch(validator))
        and (size is None or counts.is_whole(size, 0, counts.MAX_BYTES))
        and isinstance(md5, list)
        and all(isinstance(text, str) for text in md5)
    )
    return note if is_whole else {}


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0

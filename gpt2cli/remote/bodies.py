"""Requests to servers that may be slow, broken or hostile, and the bodies of their answers.

A body must not exceed a size, and is abandoned if almost nothing arrives.
"""

import re
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import requests
import urllib3

from gpt2cli.errors import UserError

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 16  # bytes
DAMAGED_TRIES = 2  # bodies that arrived complete but damaged: each may have 6 GB
WINDOW = 60.0  # seconds over which the speed of a server is measured
SLOWEST = 100  # bytes per second; a slower server has stalled
BROKEN = (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.ProtocolError)
INTERRUPTED = (*BROKEN, urllib3.exceptions.TimeoutError, urllib3.exceptions.SSLError)
PACKED = ("gzip", "x-gzip", "deflate")  # decompressed here, although not asked for
# Rejected. Storage services also state other names, such as aws-chunked, for plain content.
UNKNOWN = ("br", "zstd", "compress", "x-compress")


class TryAgain(Exception):
    """A failure that may pass.

    Args:
        text: the reason.
        wait: the number of seconds for which the server asked.
        tries: failures in a row after which the download ends; None for the usual number.
        least: bytes that an attempt must fetch, or else it counts as a failure.
    """

    def __init__(
        self, text: str, wait: float | None = None, tries: int | None = None, least: int = 1
    ) -> None:
        super().__init__(text)
        self.wait = wait
        self.tries = tries
        self.least = least


class TooLong(UserError):
    """A body is longer than its file can be."""


def answer_of(
    session: requests.Session, url: str, headers: Mapping[str, str] | None = None
) -> requests.Response:
    """Return the answer to a request; its body is not read yet, and that of a redirect never is."""

    def drop_body(response: requests.Response, **_: Any) -> None:
        if response.is_redirect:
            response.close()

    return session.get(
        url,
        headers={"Accept-Encoding": "identity", **(headers or {})},
        stream=True,
        timeout=(CONNECT_TIMEOUT, READ_TIMEOUT),
        hooks={"response": drop_body},
    )


def body_of(response: requests.Response, url: str, most: int) -> Iterator[bytes]:
    """Yield a body in pieces, as they arrive; a compressed body is decompressed in small pieces.

    Raises:
        TryAgain: almost nothing arrives.
        TooLong: it has more than `most` bytes.
        UserError: it is compressed with another method than gzip or deflate.
    """
    left, since, recent = most, time.monotonic(), 0
    unpacker = _unpacker(response, url)
    while raw := response.raw.read1(CHUNK, decode_content=False):
        recent += len(raw)
        if time.monotonic() - since > WINDOW:
            if recent < WINDOW * SLOWEST:
                least = int(WINDOW * SLOWEST)
                raise TryAgain(f"fewer than {SLOWEST} bytes arrive per second", least=least)
            since, recent = time.monotonic(), 0
        for piece in _unpacked(unpacker, raw) if unpacker else [raw]:
            left -= len(piece)
            if left < 0:
                raise TooLong(
                    f"{url} sends more than {most:,} bytes, which is too long for this file. "
                    "Choose another server"
                )
            yield piece
    if unpacker and not unpacker.eof:
        raise TryAgain("its compressed content ends too early")


def _unpacker(response: requests.Response, url: str) -> Any:
    """Return zlib's decompressor for a compressed body; None for any other.

    We ask for no compression, but a server may ignore that.

    Raises:
        UserError: it is compressed with another method than gzip or deflate.
    """
    packing = packing_of(response.headers)
    if not packing:
        return None
    if packing not in PACKED:
        raise UserError(
            f"{url} is compressed with {packing!r:.50}, although gpt2cli asked for no compression. "
            "Choose another server"
        )
    return zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by its first bytes


def packing_of(headers: Mapping[str, str]) -> str:
    """Return the methods with which a body is compressed, or ""."""
    codings = re.split("[, ]+", headers.get("Content-Encoding", "").lower())
    return ", ".join(coding for coding in codings if coding in PACKED + UNKNOWN)


def _unpacked(unpacker: Any, raw: bytes) -> Iterator[bytes]:
    """Decompress some bytes, and yield at most CHUNK bytes at a time; TryAgain if damaged."""
    try:
        while raw and not unpacker.eof:
            yield unpacker.decompress(raw, CHUNK)
            raw = unpacker.unconsumed_tail
        if raw or unpacker.unused_data:
            raise zlib.error
    except zlib.error:
        raise TryAgain("its compressed content is damaged", tries=DAMAGED_TRIES) from None


def reason_of(error: Exception) -> str:
    """Return the reason of a failed connection, which requests wraps in other exceptions."""
    reason = getattr(next(iter(error.args), None), "reason", error)
    interrupted = isinstance(error, BROKEN)
    return "the connection was interrupted" if interrupted else str(reason).split(": ")[-1]

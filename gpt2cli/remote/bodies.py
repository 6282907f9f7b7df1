"""Requests to servers that may be slow, broken or hostile, and the bodies of their answers.

A body ends at a size, and is given up if almost nothing arrives.
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
WINDOW = 60.0  # seconds in which SLOWEST bytes must arrive each second, or the server has stalled
SLOWEST = 100  # bytes
BROKEN = (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.ProtocolError)
INTERRUPTED = (*BROKEN, urllib3.exceptions.TimeoutError, urllib3.exceptions.SSLError)
PACKED = ("gzip", "x-gzip", "deflate")  # what is unpacked, though it was not asked for
# Not unpacked. Storage services also state others, such as aws-chunked, for content as it is.
UNKNOWN = ("br", "zstd", "compress", "x-compress")


class TryAgain(Exception):
    """A failure that may pass.

    Args:
        text: the reason.
        wait: the number of seconds for which the server asked.
        tries: failures in a row after which the file is given up; None for the usual number.
        least: bytes that an attempt must bring in order not to count as a failure.
    """

    def __init__(
        self, text: str, wait: float | None = None, tries: int | None = None, least: int = 1
    ) -> None:
        super().__init__(text)
        self.wait = wait
        self.tries = tries
        self.least = least


class TooLong(UserError):
    """A body has more bytes than its file can have."""


def answer_of(
    session: requests.Session, url: str, headers: Mapping[str, str] | None = None
) -> requests.Response:
    """Return the answer to a request, whose body is not read yet; that of a redirect never is."""

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
    """Yield a body in the pieces in which it arrives; a compressed one is unpacked in small pieces.

    Raises:
        TryAgain: almost nothing arrives.
        TooLong: it has more than `most` bytes.
        UserError: it is compressed by another method than gzip.
    """
    left, since, recent = most, time.monotonic(), 0
    unpacker = _unpacker(response, url)
    while raw := response.raw.read1(CHUNK, decode_content=False):
        recent += len(raw)
        if time.monotonic() - since > WINDOW:
            if recent < WINDOW * SLOWEST:
                least = int(WINDOW * SLOWEST)
                raise TryAgain(f"less than {SLOWEST} bytes arrive each second", least=least)
            since, recent = time.monotonic(), 0
        for piece in _unpacked(unpacker, raw) if unpacker else [raw]:
            left -= len(piece)
            if left < 0:
                raise TooLong(
                    f"{url} sends more than {most:,} bytes, which is more than this file can have. "
                    "Choose another server"
                )
            yield piece
    if unpacker and not unpacker.eof:
        raise TryAgain("its compressed content ends too early")


def _unpacker(response: requests.Response, url: str) -> Any:
    """Return zlib's object for a body that is compressed by gzip; None for one that is not.

    We ask for no compression, but a server may ignore that.

    Raises:
        UserError: it is compressed by another method.
    """
    packing = packing_of(response.headers)
    if not packing:
        return None
    if packing not in PACKED:
        raise UserError(
            f"{url} is compressed by {packing!r:.50}, which we did not ask for. Choose another "
            "server"
        )
    return zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by its first bytes


def packing_of(headers: Mapping[str, str]) -> str:
    """Return the methods by which a body is compressed, or ""."""
    codings = re.split("[, ]+", headers.get("Content-Encoding", "").lower())
    return ", ".join(coding for coding in codings if coding in PACKED + UNKNOWN)


def _unpacked(unpacker: Any, raw: bytes) -> Iterator[bytes]:
    """Yield what some bytes unpack to, at most CHUNK bytes at a time; TryAgain if damaged."""
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

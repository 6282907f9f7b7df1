"""The id of each response, which is in a header and at the end of its line in the log."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from gpt2cli.serving.page import SECURITY

LOG = logging.getLogger(__name__)
PLAIN = re.compile(r"[\w.:-]{1,64}", re.ASCII)


def new_id(wanted: str | None = None) -> str:
    """Return an id for a response: the client's, if it is short and plain, or else a new one."""
    return wanted if wanted and PLAIN.fullmatch(wanted) else uuid.uuid4().hex


def headers_of(name: str) -> list[tuple[bytes, bytes]]:
    """Return the headers that every response has: its id, and limits for browsers."""
    return [(b"x-request-id", name.encode()), *SECURITY]


def write(client: Any, request: str, status: int, rest: str, name: str) -> None:
    """Write the log's line of a response.

    Args:
        client: the client's address and port, or None.
        request: method and path, without control characters.
        status: of the response.
        rest: more about the response.
        name: its id.
    """
    address = client[0] if client else "-"
    LOG.info("%s %a %s %s %s id %s", time.strftime("%F %T"), address, request, status, rest, name)

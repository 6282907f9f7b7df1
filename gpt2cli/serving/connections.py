"""The HTTP server under the application: uvicorn, with limits on connections and slow clients.

uvicorn has no setting for these limits, so this module overrides private methods and attributes of
its H11Protocol. setup.py pins uvicorn to the versions this was tested with.
"""

from __future__ import annotations

import asyncio
import http
import json
import logging
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt2cli.serving import log
from gpt2cli.serving.api import RequestError

if TYPE_CHECKING:
    from gpt2cli.commands.serve import ServeOptions

LOG = logging.getLogger(__name__)
GROUP = 16  # connections that are accepted at once
WAITING = 2048  # connections that may wait for that in the system; uvicorn's default
BETWEEN_LINES = 60.0  # seconds between two warnings about too many open files


class Server(uvicorn.Server):
    """uvicorn's server; it accepts connections in small groups.

    If a group exceeds the limit, it is closed before the next group needs open files.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; more connections than one group may wait in the system."""
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(WAITING)


def make_server(app: Any, options: ServeOptions) -> Server:
    """Return the server of an ASGI app; set its `should_exit` to finish all requests and stop."""
    config = uvicorn.Config(
        app,
        loop="asyncio",  # report_exhaustion knows its messages
        backlog=GROUP,
        http=connection_class(options.max_connections, options.max_idle),
        ws="none",
        proxy_headers=False,  # the server cannot know which proxies to trust
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=options.max_idle,  # type: ignore[arg-type]  # a float works
        timeout_graceful_shutdown=int(options.max_time) + 1,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    return Server(config)


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a log line of uvicorn says something that no line of ours says."""
    return record.msg != "Invalid HTTP request received."


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with limits.

    Attributes:
        max_connections: open connections; further ones get a 503.
        idle: seconds a client may take to send a request's head, counted from the start of the
            connection or from the last response, and seconds it may stop reading a response.
    """

    max_connections: int
    idle: float
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()
        if len(self.connections) > self.max_connections:
            message = f"{self.max_connections} connections are open; try again later"
            headers = {"retry-after": "1"}
            self._close(RequestError(503, message, code="connections_full", headers=headers))

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP; called while the error is handled."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = sys.exc_info()[1]
            status = getattr(error, "error_status_hint", 400)
            reason = str(error).partition(": bytearray(")[0]  # not the bytes themselves
            self._close(RequestError(status, f"the request is not valid HTTP/1.1: {reason}"))
        self.transport.close()  # also if a response has begun, or the request was answered

    def _close(self, error: RequestError) -> None:
        """Answer with an error and close the connection; no application sees the request."""
        if self.cycle is not None:  # it was reading the request's body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        name = log.new_id()
        self.transport.write(_error_bytes(error, name))
        self.transport.close()
        log.write(self.client, "connection", error.status, str(error), name)

    def _should_upgrade(self) -> bool:
        return False  # ignoring an Upgrade is correct, and uvicorn would log two lines

    def data_received(self, data: bytes) -> None:
        # uvicorn stops the timer at the first byte; this waits for a complete head
        self.conn.receive_data(data)
        self.handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._unset_keepalive_if_required()
        else:
            self._start_timer()

    def _start_timer(self) -> None:
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            late = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.idle, late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._cancel_stalled()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(self.idle, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stalled()

    def _cancel_stalled(self) -> None:
        if self._stalled:
            self._stalled.cancel()
        self._stalled = None


def connection_class(max_connections: int, idle: float) -> type[Connection]:
    """Return the Connection with these limits; uvicorn makes the connections."""
    return type("Limited", (Connection,), {"max_connections": max_connections, "idle": idle})


def _error_bytes(error: RequestError, name: str) -> bytes:
    """Return a whole HTTP response, for a connection that reaches no application."""
    body = json.dumps(error.as_json()).encode()
    headers = [
        *((key.encode(), value.encode()) for key, value in (error.headers or {}).items()),
        *log.headers_of(name),
        (b"connection", b"close"),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    lines = [b"HTTP/1.1 %d %s" % (error.status, http.HTTPStatus(error.status).phrase.encode())]
    lines += [key + b": " + value for key, value in headers]
    return b"\r\n".join([*lines, b"", body])


def report_exhaustion(loop: asyncio.AbstractEventLoop) -> None:
    """Make a loop log one line if no file can be opened for a connection.

    asyncio tries again every second, a whole group at once, and would log a traceback each time.
    """
    silent_until = 0.0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal silent_until
        if context.get("message") != "socket.accept() out of system resource":
            loop.default_exception_handler(context)
        elif time.monotonic() >= silent_until:
            silent_until = time.monotonic() + BETWEEN_LINES
            LOG.warning(
                "%s: new connections wait until others close. Raise ulimit -n, or lower "
                "--max_connections",
                context["exception"].strerror,
            )

    loop.set_exception_handler(handle)

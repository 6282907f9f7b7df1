"""The HTTP server under the application: uvicorn, with limits on connections and slow clients.

uvicorn has no setting for these limits, so this module overrides private methods and attributes of
its H11Protocol. setup.py pins uvicorn to the versions this was tested with.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from gpt2cli.commands.serve import ServeOptions

OVERFULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)


def make_server(app: Any, options: ServeOptions) -> uvicorn.Server:
    """Return the server of an ASGI app; set its `should_exit` to finish all requests and stop."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=connection_class(options.max_connections, options.max_idle),
            ws="none",
            proxy_headers=False,  # the server cannot know which proxies to trust
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=options.max_idle,  # type: ignore[arg-type]  # a float works
            timeout_graceful_shutdown=int(options.max_time) + 1,
        )
    )


def connection_class(max_connections: int, idle: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP/1.1 protocol with limits.

    Args:
        max_connections: open connections; further ones get a 503.
        idle: seconds a client may take to send a request's head, counted from the start of the
            connection or from the last response, and seconds it may stop reading a response.
    """

    class Connection(H11Protocol):
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_timer()
            if len(self.connections) > max_connections:
                transport.write(OVERFULL)
                transport.close()

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
                self.timeout_keep_alive_task = self.loop.call_later(idle, late)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unset_keepalive_if_required()
            self._cancel_stalled()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self._stalled or self.loop.call_later(idle, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel_stalled()

        def _cancel_stalled(self) -> None:
            if self._stalled:
                self._stalled.cancel()
            self._stalled = None

    return Connection

"""gpt2cli serve: a web page and OpenAI's completions API."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpt2cli import encoder, folders
from gpt2cli.config import ServeConfig
from gpt2cli.errors import UserError

if TYPE_CHECKING:
    from gpt2cli.inference import Model

LOG = logging.getLogger(__name__)


def run(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish in-flight requests.

    Raises:
        UserError: the extra `serve` is not installed, the port is in use, or the model is missing.
    """
    try:
        from gpt2cli import connections, server
    except ImportError as error:
        raise UserError(
            f"serve needs the package {error.name}, which is not installed. Install all it needs "
            'with: pip install ".[serve]" (or bin/install serve in a clone)'
        ) from None
    if config.api_key is None and os.environ.get("GPT2CLI_API_KEY"):
        config = dataclasses.replace(config, api_key=os.environ["GPT2CLI_API_KEY"])
    prefix = folders.source_checkpoint(config)
    folders.read_config(prefix.parent)
    if not encoder.exists(prefix.parent):
        raise UserError(
            f"{prefix.parent} has no vocabulary; serve needs one to read and write text"
        )
    listener = listen(config.host, config.port)
    if hasattr(signal, "SIGHUP"):  # until the server handles it, it must not end the process
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    from gpt2cli import engine, inference, service  # slow to import: after all cheap checks

    engine.keep_no_memory()

    def load() -> tuple[Model, str]:
        newest = folders.source_checkpoint(config)
        model = inference.load_model(newest, config.precision)
        model.network.read_apart()
        model.warm(config.max_batch)
        return model, newest.name

    def leave() -> None:
        served.should_exit = True

    shared = service.Service(config, load, leave)
    allow_connections(config.max_connections)
    served = connections.make_server(server.make_app(shared), config)
    log = logging.getLogger("gpt2cli")  # the parent of every module's
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    LOG.info("loading %s with %s", prefix, engine.describe_devices(config.precision))
    LOG.info("listening on http://%s:%s/ (Ctrl-C stops the server)", host, port)
    with _terminated():
        served.run(sockets=[listener])
    if shared.failure:
        raise shared.failure


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; raises UserError if that is impossible."""
    try:
        family, kind, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host can have such a name
        reason = getattr(error, "strerror", None) or "no such host"
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}. Choose another with --port or --host"
        ) from None
    return listener


def allow_connections(count: int) -> None:
    """Raise this process' limit of open files to hold this many connections, if permitted."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = count + 256
        if soft != resource.RLIM_INFINITY and soft < needed:
            most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Exit with status 0 after SIGTERM: uvicorn raises the signal again once it is finished."""
    message = "received SIGTERM; all requests are finished"
    before = signal.signal(signal.SIGTERM, lambda *_: LOG.info(message))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

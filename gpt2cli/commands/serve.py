"""gpt2cli serve: a web page and OpenAI's completions API."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import MAX_TOKENS, GeneratorOptions

if TYPE_CHECKING:
    from gpt2cli.inference.generator import LanguageModel

LOG = logging.getLogger(__name__)
KEY = re.compile(r"[!-~]+")  # one word of an HTTP header
HOST = re.compile(r"[\w.-]+|\[?[\da-fA-F.]*:[\da-fA-F:.]*:[\da-fA-F:.]*\]?", re.ASCII)
ORIGIN = re.compile(r"[a-z][a-z\d+.-]*://[\w.:\[\]-]+", re.ASCII | re.IGNORECASE)
RESERVED = 128  # open files besides connections: the model, a reload of it, static files


@dataclass(frozen=True, kw_only=True)
class ServeOptions(GeneratorOptions):
    """Serve one model: a web page and OpenAI's completions API (needs pip install ".[serve]").

    On SIGTERM the server finishes in-flight requests and exits. On SIGHUP it loads the run's newest
    checkpoint, or --checkpoint again.

    Server:
        host: address to listen on; 0.0.0.0 listens on all interfaces.
        port: port to listen on; 0 picks a free one and prints it.
        api_key: require this key (Authorization: Bearer KEY). Prefer the environment variable
            GPT2CLI_API_KEY, which other users of the machine cannot see.
        allowed_hosts: host name to accept besides localhost and --host, such as a proxy's; others
            are rejected (403). With an API key and without this flag, every name is accepted.
        allowed_origins: website whose pages may use the server (CORS), such as
            https://books.example; * allows all and needs an API key. Without this flag, only the
            server's own page may use it.
        log_prompts: include prompts in the log.

    Limits:
        max_batch: samples generated side by side.
        max_queue: samples that may wait for a place in the batch; more are rejected (503).
        max_n: samples per request, over all its prompts.
        max_prompt: tokens in a prompt (default: n_ctx).
        max_tokens: tokens in a sample (default: n_ctx).
        max_body: bytes in a request (413).
        max_time: seconds for a request, including its time in the queue (504).
        max_idle: seconds a client may stay silent before its connection is closed (408 in the
            middle of a request).
        max_connections: simultaneous connections (503); lowered if the limit on open files is
            lower.

    Environment:
        GPT2CLI_API_KEY: API key that requests must send; see --api_key.

    Examples:
        gpt2cli serve --run_name books
        gpt2cli serve --model_name 124M --precision int8 --host 0.0.0.0 --port 8000
    """

    host: str = "127.0.0.1"
    port: int = 5000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    log_prompts: bool = False
    max_batch: int = 16
    max_queue: int = 64
    max_n: int = 16
    max_prompt: int | None = None
    max_tokens: int | None = None
    max_body: int = 1_000_000
    max_time: float = 300.0
    max_idle: float = 30.0
    max_connections: int = 1000

    def __post_init__(self) -> None:
        check(
            self,
            port=(0, 65535),
            max_batch=(1, 1024),
            max_queue=(0, None),
            max_n=(1, None),
            max_prompt=(1, MAX_TOKENS),
            max_tokens=(1, MAX_TOKENS),
            max_body=(100, None),
            max_time=(0.1, 86400),
            max_idle=(0.1, 86400),
            max_connections=(1, 100_000),
        )
        self._check_source()
        if self.api_key is not None:
            _check_key(self.api_key, "--api_key")
        for host in self.allowed_hosts:
            if not HOST.fullmatch(host):
                raise UsageError(
                    f"--allowed_hosts {host} is not a host name: give the name alone, such as "
                    "books.example, without http:// and without a port"
                )
        for origin in self.allowed_origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise UsageError(
                    f"--allowed_origins {origin} is not an origin: give the scheme, the name and "
                    "any unusual port, such as https://books.example, without a path"
                )


def run(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish in-flight requests.

    Raises:
        UserError: the extra `serve` is not installed, the port is in use, or the model is missing.
    """
    from gpt2cli.storage import folders
    from gpt2cli.text import encoder

    try:
        from gpt2cli.serving import connections, routes
    except ImportError as error:
        raise UserError(
            f"serve needs the package {error.name}, which is not installed. Install all it needs "
            'with: pip install ".[serve]" (or bin/install serve in a clone)'
        ) from None
    options = with_key(options)
    folder = folders.open_source(options)
    if not encoder.exists(folder.path):
        raise UserError(f"{folder.path} has no vocabulary; serve needs one to read and write text")
    listener = listen(options.host, options.port)
    if hasattr(signal, "SIGHUP"):  # until the server handles it, it must not end the process
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    from gpt2cli.serving import service  # slow to import: after all cheap checks

    log = logging.getLogger("gpt2cli")  # the parent of every module's
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    options = fitted(options)

    def leave() -> None:
        served.should_exit = True

    shared = service.Service(options, functools.partial(load, options), leave)
    served = connections.make_server(routes.make_app(shared), options)
    _announce(options, listener, str(folder.checkpoint))
    with _terminated():
        served.run(sockets=[listener])
    if shared.failure:
        raise shared.failure


def load(options: ServeOptions) -> tuple[LanguageModel, str]:
    """Return the newest model, ready to answer at full speed, and the name of its checkpoint."""
    from gpt2cli.inference import generator
    from gpt2cli.storage import folders

    newest = folders.open_source(options)
    assert newest.checkpoint is not None
    model = generator.load_for(options, newest)
    model.warm(options.max_batch)
    model.longest_token  # noqa: B018, counted here, not while the first request waits
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # else a large request makes Python look through all of TensorFlow's objects
    return model, newest.checkpoint.name


def _announce(options: ServeOptions, listener: socket.socket, checkpoint: str) -> None:
    """Log the model, the address, and who may use it."""
    from gpt2cli.inference import devices
    from gpt2cli.serving import sites

    address, port = listener.getsockname()[:2]
    host = f"[{address}]" if ":" in address else address
    LOG.info("loading %s with %s", checkpoint, devices.describe(options.precision))
    LOG.info("listening on http://%s:%s/ (Ctrl-C stops the server)", host, port)
    if not (options.api_key or sites.is_loopback(address)):
        LOG.warning(
            "no API key is set: anyone who can reach this address can use the server. To require "
            "one, set GPT2CLI_API_KEY"
        )


def with_key(options: ServeOptions) -> ServeOptions:
    """Return the options with the API key of the environment, unless they have one.

    Raises:
        UserError: that key cannot be sent, or a flag is unsafe without a key.
    """
    if options.api_key is None and "GPT2CLI_API_KEY" in os.environ:
        key = os.environ["GPT2CLI_API_KEY"]
        if not key:
            raise UserError(
                "GPT2CLI_API_KEY is set but empty: set it to the key that requests must send, or "
                "unset it to serve without one"
            )
        _check_key(key, "GPT2CLI_API_KEY")
        options = dataclasses.replace(options, api_key=key)
    if "*" in options.allowed_origins and options.api_key is None:
        raise UserError(
            "--allowed_origins * needs an API key, because without one the pages of every website "
            "could use this server: set GPT2CLI_API_KEY, or name the websites"
        )
    return options


def _check_key(key: str, name: str) -> None:
    if not KEY.fullmatch(key):
        raise UsageError(f"{name} must consist of printable ASCII characters without spaces")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; raises UserError if that is impossible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio sends at once (TCP_NODELAY) only if the socket names its protocol
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host can have such a name
        reason = getattr(error, "strerror", None) or "no such host"
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}. Choose another with --port or --host"
        ) from None
    return listener


def fitted(options: ServeOptions) -> ServeOptions:
    """Return the options with no more connections than this process may have; report a change."""
    most = fit_connections(options.max_connections)
    if most < options.max_connections:
        LOG.warning(
            "--max_connections is lowered from %d to %d, because this process may not open more "
            "files. To allow more, raise ulimit -n",
            options.max_connections,
            most,
        )
    return dataclasses.replace(options, max_connections=most)


def fit_connections(wanted: int) -> int:
    """Return how many connections this process may hold; raise its limit of open files for them."""
    try:
        import resource
    except ImportError:  # not on Unix
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS rejects what it calls permitted
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return min(wanted, max(1, soft - min(RESERVED, soft // 2)))


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Exit with status 0 after SIGTERM: uvicorn raises the signal again once it is finished."""
    message = "received SIGTERM; all requests are finished"
    before = signal.signal(signal.SIGTERM, lambda *_: LOG.info(message))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""gpt2cli serve: a web page and OpenAI's completions API."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass

from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.options import MAX_TOKENS, CheckpointOptions
from gpt2cli.storage import folders
from gpt2cli.text import encoder


@dataclass(frozen=True, kw_only=True)
class ServeOptions(CheckpointOptions):
    """Serve one model: a web page and OpenAI's completions API (needs pip install ".[serve]").

    On SIGTERM the server finishes in-flight requests and exits. On SIGHUP it loads the run's newest
    checkpoint, or --checkpoint again.

    Server:
        host: address to listen on; 0.0.0.0 listens on all interfaces.
        port: port to listen on; 0 picks a free one and prints it.
        api_key: require this key (Authorization: Bearer KEY). Prefer the environment variable
            GPT2CLI_API_KEY, which other users of the machine cannot see.
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
        max_connections: simultaneous connections (503).

    Environment:
        GPT2CLI_API_KEY: the key that requests must carry; see --api_key.

    Examples:
        gpt2cli serve --run_name books
        gpt2cli serve --model_name 124M --precision int8 --host 0.0.0.0 --port 8000
    """

    host: str = "127.0.0.1"
    port: int = 5000
    api_key: str | None = None
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
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise UsageError("--api_key must consist of ASCII letters, digits and signs, no spaces")


def run(config):
    """Serve until SIGTERM or Ctrl-C; what was begun is finished first.

    Raises:
        UserError: the extra is not installed, the port is taken, or there is no such model.
    """
    try:
        from gpt2cli.serving import http as server
    except ImportError as error:
        raise UserError(
            f"serve needs more packages ({error.name} is missing): pip install 'gpt2cli[serve]', "
            "or in a clone bin/install serve"
        ) from None
    if config.api_key is None and os.environ.get("GPT2CLI_API_KEY"):
        config = dataclasses.replace(config, api_key=os.environ["GPT2CLI_API_KEY"])
    prefix = folders.source_checkpoint(config)
    folders.read_config(prefix.parent)
    if not encoder.exists(prefix.parent):
        raise UserError(f"{prefix.parent} has no vocabulary, so there is no text to serve")
    listener = listen(config)
    if hasattr(signal, "SIGHUP"):  # until it means something it must not end us
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    from gpt2cli import tensorflow as engine  # what can be refused was refused before this
    from gpt2cli.inference import generator as inference
    from gpt2cli.serving import service

    engine.keep_no_memory()

    def load():
        newest = folders.source_checkpoint(config)
        model = inference.load_model(newest, config.precision)
        model.network.read_apart()
        model.warm(config.max_batch)
        return model, newest.name

    def leave():
        served.should_exit = True

    shared = service.Service(config, load, leave)
    allow_connections(config.max_connections)
    served = server.make_server(shared)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    _say(f"{prefix}: {engine.describe_devices(config.precision)}")
    _say(f"http://{host}:{port}/ as soon as the model is loaded; Ctrl-C ends it")
    with _terminated():
        served.run(sockets=[listener])
    if shared.failure:
        raise shared.failure


def listen(config):
    """The socket of --host and --port; UserError if it cannot be had."""
    try:
        family, kind, *_, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # the second of a name that no host can have
        reason = getattr(error, "strerror", None) or "no such host"
        raise UserError(
            f"cannot listen on {config.host} port {config.port}: {reason}. Name another with "
            "--port or --host"
        ) from None
    return listener


def allow_connections(count):
    """Let this process have so many connections open, if it may."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = count + 256
        if soft != resource.RLIM_INFINITY and soft < needed:
            most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def _terminated():
    """A SIGTERM that was obeyed is no failure: uvicorn raises it anew once all is finished."""
    before = signal.signal(signal.SIGTERM, lambda *_: _say("terminated; all requests are done"))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text):
    print(text, file=sys.stderr, flush=True)

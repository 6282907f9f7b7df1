"""gpt2cli serve: a web page and OpenAI's completions API."""

import contextlib
import dataclasses
import os
import signal
import socket
import sys

from gpt2cli.errors import UserError
from gpt2cli.storage import folders
from gpt2cli.text import encoder


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

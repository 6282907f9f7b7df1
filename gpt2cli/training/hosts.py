"""The hosts of a distributed training, which TF_CONFIG names."""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpt2cli import counts
from gpt2cli.errors import UserError

PAUSE = 0.5  # seconds between two rounds in which all hosts are called
PATIENCE = 5.0  # seconds to wait for an answer to a call
GREETING = b"gpt2cli\n"
FORM = '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}'


class Cluster(NamedTuple):
    """The hosts that train together.

    Attributes:
        hosts: their number.
        is_chief: whether this host writes the files.
        own: the address of this host, HOST:PORT.
        others: the addresses of the other hosts.
    """

    hosts: int = 1
    is_chief: bool = True
    own: str = ""
    others: tuple[str, ...] = ()


def of_strategy(strategy: str) -> Cluster:
    """Return the hosts for a --strategy: several for multiworker, and for auto with TF_CONFIG.

    Raises:
        UserError: TF_CONFIG is malformed, or missing where it is needed.
    """
    if strategy not in ("auto", "multiworker"):
        return Cluster()
    text = os.environ.get("TF_CONFIG", "")
    try:
        found = json.loads(text.strip() or "{}")
        if not found.get("cluster"):  # Vertex sets it for one host, too
            if strategy == "auto":
                return Cluster()
            raise UserError(
                "--strategy multiworker reads the hosts from TF_CONFIG, which names none. Set it "
                f"on every host, with the same cluster and its own index: {FORM}"
            )
        cluster, task = found["cluster"], found["task"]
        chiefs, workers = list(cluster.get("chief", [])), list(cluster.get("worker", []))
        kind, number = task["type"], task["index"]
        index = counts.whole_of(number) if isinstance(number, str) else number
        if index is None or not counts.is_whole(index):
            raise ValueError(text)
        own, addresses = {"chief": chiefs, "worker": workers}[kind][index], chiefs + workers
        are_distinct = len({_parts(address) for address in addresses}) == len(addresses)
        if len(chiefs) > 1 or not are_distinct or "ps" in cluster:
            raise ValueError(text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"TF_CONFIG is not of the form {FORM}: {text:.200}") from None
    is_chief = kind == "chief" or not (chiefs or index)
    others = tuple(address for address in addresses if address != own)
    return Cluster(hosts=len(addresses), is_chief=is_chief, own=own, others=others)


def meet(cluster: Cluster, say: Callable[[str], object]) -> None:
    """Wait until all other hosts are running this command or are already in TensorFlow.

    TensorFlow waits for missing hosts too, but inside one C++ call: it reports no names to Python,
    and it ignores Ctrl-C and SIGTERM. Here each host greets callers on its own port, on which
    TensorFlow's server follows, and calls all others until every one of them answers. There is no
    time limit; Ctrl-C and SIGTERM end the wait at once.

    Args:
        say: receives a line when the missing hosts change.

    Raises:
        UserError: the port of this host cannot be opened.
    """
    if not cluster.others:
        return
    before: list[str] = []
    reported: list[str] = []
    with _greeting_callers(cluster.own):
        while missing := [address for address in cluster.others if not _answers(address)]:
            # twice in a row: a host that enters TensorFlow closes its port for a moment
            if missing == before and missing != reported:
                say(f"waiting for {', '.join(missing)}")
                reported = missing
            before = missing
            time.sleep(PAUSE)


@contextlib.contextmanager
def _greeting_callers(own: str) -> Iterator[None]:
    """Answer each call to this host's port while the block runs."""
    is_over = threading.Event()

    def greet() -> None:
        while not is_over.is_set():
            with contextlib.suppress(OSError):  # a time-out, or a caller that left
                caller, _ = port.accept()
                with caller:
                    caller.sendall(GREETING)

    with _open_port(own) as port:
        port.settimeout(PAUSE)
        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def _answers(address: str) -> bool:
    """Call a host: whether it waits here, or runs TensorFlow's server."""
    try:
        with socket.create_connection(_parts(address), timeout=PATIENCE) as connection:
            said = connection.recv(len(GREETING))
    except OSError:
        return False
    # gRPC's server begins with HTTP/2's SETTINGS frame, whose fourth byte is 4 (RFC 9113, 6.5)
    return said == GREETING or said[3:4] == b"\x04"


def _open_port(own: str) -> socket.socket:
    """Listen on this host's port, on all interfaces as TensorFlow's server does."""
    port, both = _parts(own)[1], socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"cannot open port {port} for {own}, this host's address in TF_CONFIG: "
            f"{error.strerror or error}. Stop the program that uses the port, or choose another "
            "port on all hosts"
        ) from None


def _parts(address: str) -> tuple[str, int]:
    """Split HOST:PORT or [HOST]:PORT; ValueError for anything else."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and re.fullmatch(r"\d{1,5}", port, re.ASCII) and int(port) < 2**16):
        raise ValueError(address)
    return host.strip("[]"), int(port)

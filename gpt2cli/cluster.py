"""The hosts of a training, as TF_CONFIG names them: Vertex and Kubeflow set it, or a job's file."""

import contextlib
import json
import os
import socket
import threading
import time
from typing import NamedTuple

from gpt2cli.errors import UserError

BETWEEN, PATIENCE = 0.5, 5.0  # seconds between two tries to reach a host, and for one of them
LONGEST = 100_000  # bytes of what a host tells
FORM = '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}'


class Cluster(NamedTuple):
    """Who trains together.

    Attributes:
        hosts: how many there are.
        is_chief: whether this one writes the files.
        own, others: their addresses, HOST:PORT.
    """

    hosts: int = 1
    is_chief: bool = True
    own: str = ""
    others: tuple = ()


def of_strategy(strategy):
    """The Cluster of a --strategy: several hosts for multiworker, and for auto with TF_CONFIG.

    Raises:
        UserError: TF_CONFIG is wrong, or missing where it is needed.
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
                "--strategy multiworker takes the hosts from TF_CONFIG, which names none. On every "
                f"host the same, but for the index: {FORM}"
            )
        cluster, task = found["cluster"], found["task"]
        chiefs, workers = list(cluster.get("chief", [])), list(cluster.get("worker", []))
        kind, index = task["type"], int(task["index"])
        own, addresses = {"chief": chiefs, "worker": workers}[kind][index], chiefs + workers
        once = len({_parts(address) for address in addresses}) == len(addresses)
        if index < 0 or len(chiefs) > 1 or not once or "ps" in cluster:
            raise ValueError(text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"TF_CONFIG is not of the form {FORM}: {text:.200}") from None
    is_chief = kind == "chief" or not (chiefs or index)
    others = tuple(address for address in addresses if address != own)
    return Cluster(len(addresses), is_chief, own, others)


def meet(cluster, card, say):
    """Wait until every other host is here, and compare what each is about to do.

    TensorFlow waits for them too, but says not for whom, hears no Ctrl-C and no SIGTERM meanwhile,
    and hosts that differ end in errors of its network or wait for ever. Each host opens its port,
    on which TensorFlow's server follows, and tells its card to those who come.

    Args:
        card: a JSON object of JSON values, which must be alike on all hosts.
        say: is told of the hosts that are missing.

    Raises:
        UserError: hosts differ, or the port of this one is in use.
    """
    if not cluster.others:
        return
    cards, visitors, over = {}, set(), threading.Event()
    with _door(cluster.own, len(cluster.others)) as door:
        words = (door, json.dumps(card).encode(), visitors, over)
        host = threading.Thread(target=_show, args=words, daemon=True)
        host.start()
        told = None
        while missing := [a for a in cluster.others if a not in cards or a not in visitors]:
            for address in set(missing) - set(cards):
                with contextlib.suppress(OSError, ValueError):
                    cards[address] = _card_of(address, cluster.own)
            absent = [address for address in missing if address not in cards]
            if absent and absent != told:
                say(f"waiting for {', '.join(absent)}")
                told = absent
            time.sleep(BETWEEN)
        over.set()
        host.join()
    card = json.loads(json.dumps(card))  # a tuple is a list there
    for address, other in cards.items():
        keys = sorted(k for k in card.keys() | other.keys() if card.get(k) != other.get(k))
        if keys:
            found = "; ".join(f"{k} {other.get(k)!s:.80}, here {card.get(k)!s:.80}" for k in keys)
            raise UserError(
                f"{address} is not at the same work: {found}. Give all hosts the same command, "
                "and let all see the same texts, model and run folder"
            )


def _door(own, others):
    """The port of HOST:PORT, open for visitors, as TensorFlow's server will have it."""
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    both = both if socket.has_dualstack_ipv6() else {}
    try:
        return socket.create_server(("", _parts(own)[1]), backlog=others + 8, **both)
    except OSError as error:
        raise UserError(
            f"{own} of TF_CONFIG is this host's, and its port cannot be opened: "
            f"{error.strerror or error}. End what uses it, or name another port on all hosts"
        ) from None


def _show(door, card, visitors, over):
    """Tell each visitor the card, and remember the address that it gave, until it is over."""
    door.settimeout(BETWEEN)
    while not over.is_set():
        with contextlib.suppress(OSError, ValueError):
            visitor, _ = door.accept()
            with visitor:
                visitor.settimeout(PATIENCE)
                address = visitor.recv(LONGEST).decode()
                visitor.sendall(card)
                visitors.add(address)


def _card_of(address, own):
    """What the host at an address shows to the one that is `own`; OSError, ValueError."""
    with socket.create_connection(_parts(address), timeout=PATIENCE) as there:
        there.sendall(own.encode())
        card = json.loads(there.makefile("rb").read(LONGEST))
    if not isinstance(card, dict):
        raise ValueError(card)
    return card


def _parts(address):
    """HOST:PORT or [HOST]:PORT -> both; ValueError."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and 0 < int(port) < 2**16):
        raise ValueError(address)
    return host.strip("[]"), int(port)

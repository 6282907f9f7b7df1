"""The hosts of a training, as TF_CONFIG names them: Vertex and Kubeflow set it, or a job's file."""

import contextlib
import json
import os
import re
import selectors
import socket
import time
from typing import NamedTuple

from gpt2cli.errors import UserError

BETWEEN, PATIENCE = 0.5, 5.0  # seconds between two tries to reach a host, and for one of them
LONGEST = 100_000  # bytes of what a host tells
MOST = 1000  # strangers who say nothing at the first host's port
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
    """Wait until all hosts are here at the same moment, and compare what each is about to do.

    TensorFlow waits for them too, but says not for whom, hears no Ctrl-C and no SIGTERM meanwhile,
    and hosts that differ end in errors of its network or wait for ever. Here each host keeps a
    connection to the first one's port, on which TensorFlow's server follows, and is here as long as
    it is open. They speak lines of JSON.

    Args:
        card: a JSON object of JSON values, which must be alike on all hosts.
        say: is told of the hosts that are missing.

    Raises:
        UserError: hosts differ, or the port of this one is in use.
    """
    if not cluster.others:
        return
    card = json.loads(json.dumps(card))  # a tuple is a list there
    with _door(cluster.own, len(cluster.others)) as door:
        if cluster.is_chief:
            difference = _Table(cluster, card, door).gather(say)
    if not cluster.is_chief:
        difference = _sit_down(cluster, card, say)
    if difference:
        raise UserError(
            f"the hosts are not at the same work: {difference}. Give all hosts the same command, "
            "and let all see the same texts, model and run folder"
        )


class _Table:
    """The first host's side of `meet`: who is here."""

    def __init__(self, cluster, card, door):
        self.cluster, self.card, self.door = cluster, card, door
        self.seats, self.cards = {}, {}  # by address: a connection, what it told
        self.heard = {}  # by connection: bytes that are no whole line yet
        self.selector = selectors.DefaultSelector()

    def gather(self, say):
        """Wait for all; what differs, which all are told, or None."""
        told = None
        with self.selector:
            self.selector.register(self.door, selectors.EVENT_READ)
            try:
                while missing := self.missing():
                    if missing != told:
                        say(f"waiting for {', '.join(missing)}")
                        told = missing
                    for key, _ in self.selector.select(BETWEEN):
                        self.receive() if key.fileobj is self.door else self.hear(key.fileobj)
                difference = self.difference()
                self.tell({"difference": difference})
                return difference
            finally:
                for visitor in list(self.heard):
                    self.dismiss(visitor)

    def missing(self):
        """The addresses of those that are not here."""
        return [address for address in self.cluster.others if address not in self.seats]

    def receive(self):
        """Let a visitor in."""
        visitor, _ = self.door.accept()
        visitor.settimeout(PATIENCE)
        _keep_alive(visitor)
        strangers = [one for one in self.heard if one not in self.seats.values()]
        if len(strangers) > MOST:
            self.dismiss(strangers[0])
        self.heard[visitor] = b""
        self.selector.register(visitor, selectors.EVENT_READ)

    def hear(self, visitor):
        """Take what a visitor says: its address and card, and then nothing until it goes."""
        try:
            data = visitor.recv(LONGEST)
            said = self.heard[visitor] + data
            if not data or len(said) > LONGEST:
                raise ValueError(said)
            self.heard[visitor] = said
            if said.endswith(b"\n"):
                told = json.loads(said)
                address, card = told["own"], dict(told["card"])
                if address not in self.cluster.others:
                    raise ValueError(address)
                if address in self.seats:  # it was started again
                    self.dismiss(self.seats[address])
                self.seats[address], self.cards[address] = visitor, card
                self.tell({"missing": self.missing()})
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            self.dismiss(visitor)

    def dismiss(self, visitor):
        """Forget one that has gone, or is no host."""
        if self.heard.pop(visitor, None) is None:
            return
        self.selector.unregister(visitor)
        self.seats = {a: one for a, one in self.seats.items() if one is not visitor}
        visitor.close()

    def tell(self, message):
        for visitor in list(self.seats.values()):
            try:
                visitor.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                self.dismiss(visitor)

    def difference(self):
        """What of the others' cards is not as on this one, in words, or None."""
        found = []
        for address in self.cluster.others:
            mine, other = self.card, self.cards[address]
            for key in sorted(mine.keys() | other.keys()):
                if mine.get(key) != other.get(key):
                    values = f"{other.get(key)!s:.80}, on {self.cluster.own} {mine.get(key)!s:.80}"
                    found.append(f"on {address} {key} is {values}")
        return "; ".join(found)[:2000] or None


def _sit_down(cluster, card, say):
    """Another host's side of `meet`: what differs, or None."""
    chief, told = cluster.others[0], None

    def waiting(missing):
        nonlocal told
        if missing and missing != told:
            say(f"waiting for {', '.join(missing)}")
        told = missing

    while True:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            with socket.create_connection(_parts(chief), timeout=PATIENCE) as there:
                _keep_alive(there)
                there.sendall(json.dumps({"own": cluster.own, "card": card}).encode() + b"\n")
                there.settimeout(None)  # the next line may take hours; a dead host is found
                for line in there.makefile("rb"):
                    message = json.loads(line)
                    if "difference" in message:
                        return message["difference"]
                    waiting([a for a in message["missing"] if a != cluster.own])
        waiting([chief])
        time.sleep(BETWEEN)


def _keep_alive(connection):
    """Have the system find out that the other end is gone, though it did not say so."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # seconds, seconds, times
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


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


def _parts(address):
    """HOST:PORT or [HOST]:PORT -> both; ValueError."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and re.fullmatch(r"\d{1,5}", port, re.ASCII) and int(port) < 2**16):
        raise ValueError(address)
    return host.strip("[]"), int(port)

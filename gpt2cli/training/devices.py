"""The devices that train together: one, all of this host, or those of several hosts.

They are run by tf.distribute: MirroredStrategy on one host, MultiWorkerMirroredStrategy where
TF_CONFIG names several. A replica is a device with a copy of the weights. Each replica computes its
rows of a batch, and all replicas sum their results, so their weights stay equal.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt2cli.errors import UserError
from gpt2cli.tensorflow import GPUS, tf
from gpt2cli.training.hosts import Cluster

# TensorFlow's errors for a connection that broke, or on which nobody answers
GONE = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)


class Replicas:
    """The devices that train, and how they share their results.

    Args:
        kind: "one", "mirrored", "multiworker", or "auto": the cluster if it has more than one host,
            else all GPUs of this host.
        cluster: the hosts, as `hosts.of_strategy` found them.

    Attributes:
        strategy: the tf.distribute.Strategy; with one device the default, which does nothing.
        count: the number of replicas on all hosts.
        hosts: the number of hosts.
        is_chief: whether this host writes the files.

    """

    def __init__(self, kind: str = "one", cluster: Cluster | None = None) -> None:
        cluster = cluster or Cluster()
        self.hosts, self.is_chief = cluster.hosts, cluster.is_chief
        if self.hosts > 1 or kind == "multiworker":
            self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        elif kind == "mirrored" or (kind == "auto" and len(GPUS) > 1):
            devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
            self.strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
        else:
            self.strategy = tf.distribute.get_strategy()
        self.count: int = self.strategy.num_replicas_in_sync

    def spread(self, fields: Sequence[np.ndarray], axis: int) -> list[Any]:
        """Give each replica its rows, which lie along `axis`, of arrays of a whole batch."""
        if self.count == 1:
            return list(fields)

        def share(array: np.ndarray) -> Any:
            parts = np.split(array, self.count, axis)
            distribute = self.strategy.experimental_distribute_values_from_function
            return distribute(lambda context: tf.constant(parts[context.replica_id_in_sync_group]))

        return [share(array) for array in fields]

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on each replica, inside a tf.function; return this host's results."""
        return self.strategy.run(function, arguments)

    def first(self, values: Any) -> Any:
        """Return the result of this host's first replica from those of `run`."""
        local = self.strategy.experimental_local_results
        return tf.nest.map_structure(lambda value: local(value)[0], values)

    def number(self) -> Any:
        """Return this replica's number among all; call it in a function given to `run`."""
        context = tf.distribute.get_replica_context()
        return tf.cast(context.replica_id_in_sync_group, tf.int32)

    def sum(self, tensors: Any) -> Any:
        """Sum tensors over all replicas; call it in a function given to `run`."""
        if self.count == 1:
            return tensors
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)

    def of_chief(self, numbers: Any) -> np.ndarray:
        """Return the chief's whole number, or array of them, on every host; all hosts call it."""
        return self._total(numbers, lambda replica: replica == 0)

    def compare(self, fields: Mapping[str, Any]) -> None:
        """Check that JSON values by name are equal on all hosts; all hosts call it.

        One hash a field is compared with the chief's.

        Raises:
            UserError: a field, or the number of GPUs, differs on any host.
        """
        if self.hosts == 1:
            return
        own = np.array([_hash(value) for value in fields.values()], np.int64)
        try:
            chief = self.of_chief(own)
        except tf.errors.InternalError as error:
            if "joining a group with size" not in str(error):
                raise
            raise UserError(
                f"the hosts differ in their number of GPUs ({len(GPUS)} on this host). Let all "
                "hosts use the same number; CUDA_VISIBLE_DEVICES hides GPUs"
            ) from error
        differs = self._total((own != chief).astype(np.int64), lambda replica: replica >= 0)
        named = [
            f"{name} ({value!s:.80} on this host)"
            for (name, value), count in zip(fields.items(), differs, strict=True)
            if count
        ]
        if named:
            raise UserError(
                f"the hosts differ in {', '.join(named)}. Run the same command on all hosts, with "
                "the same texts, model and run folder"
            )

    def _total(self, numbers: Any, counts: Callable[[Any], Any]) -> np.ndarray:
        """Sum int64 numbers over the replicas whose number `counts`."""
        if self.hosts == 1:
            return np.asarray(numbers)

        @tf.function
        def total(numbers: Any) -> Any:
            def own(numbers: Any) -> Any:
                return self.sum(tf.where(counts(self.number()), numbers, tf.zeros_like(numbers)))

            return self.first(self.run(own, numbers))

        return total(tf.constant(numbers, tf.int64)).numpy()


def _hash(value: Any) -> int:
    """Return 63 bits of the SHA-256 of a JSON value; a tuple is a list."""
    text = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@contextlib.contextmanager
def lost_hosts(hosts: int, advice: Callable[[], str]) -> Iterator[None]:
    """Turn the loss of another host while the block runs into a UserError.

    Errors of this host pass unchanged.

    Args:
        hosts: the number of hosts.
        advice: returns the sentence that follows in the message.
    """
    try:
        yield
    except tf.errors.OpError as error:
        text = str(error)
        aborted = re.search(r"Collective ops is aborted.*", text)
        if hosts == 1 or not (isinstance(error, GONE) or aborted):
            raise
        found = re.search(r"(?:unhealthy|remote target).*?job:(\w+)/.*?task:(\d+)", text, re.S)
        who = f"{found[1]} {found[2]} of TF_CONFIG" if found else "the other hosts"
        reason = f" TensorFlow reports: {aborted[0]:.300}." if aborted and not found else ""
        raise UserError(
            f"lost contact with {who}; check the logs there.{reason} {advice()}"
        ) from error

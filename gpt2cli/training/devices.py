"""The devices that train together: one, those of this host, or those of several hosts.

On tf.distribute: MirroredStrategy, or MultiWorkerMirroredStrategy where TF_CONFIG names the hosts.
A replica is a device with a copy of the weights; each computes its rows of a batch, and what is
summed is summed over all of them, so that their weights stay equal.
"""

import contextlib
import re

import numpy as np

from gpt2cli.errors import UserError
from gpt2cli.tensorflow import GPUS, tf
from gpt2cli.training import hosts as cluster

# what TensorFlow makes of a connection that broke, or that nobody answers on
GONE = (
    *(tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError),
    tf.errors.DeadlineExceededError,
)


class Replicas:
    """Who trains.

    Args:
        kind: "one", "mirrored", "multiworker", or "auto": the hosts of TF_CONFIG if it names more
            than one, else all GPUs of this host.

    Attributes:
        strategy: the tf.distribute.Strategy; with one device the default, which does nothing.
        count: replicas on all hosts.
        hosts: how many there are.
        is_chief: whether this host is the one that writes files.

    Raises:
        UserError: TF_CONFIG is wrong or missing.
    """

    def __init__(self, kind="one"):
        hosts = cluster.of_strategy(kind)
        self.hosts, self.is_chief = hosts.hosts, hosts.is_chief
        if self.hosts > 1 or kind == "multiworker":
            self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        elif kind == "mirrored" or (kind == "auto" and len(GPUS) > 1):
            devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
            self.strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
        else:
            self.strategy = tf.distribute.get_strategy()
        self.count = self.strategy.num_replicas_in_sync

    def spread(self, fields, axis):
        """Arrays of a whole batch -> for each replica its rows, which lie along `axis`."""
        if self.count == 1:
            return fields

        def share(array):
            parts = np.split(array, self.count, axis)
            of = self.strategy.experimental_distribute_values_from_function
            return of(lambda context: tf.constant(parts[context.replica_id_in_sync_group]))

        return [share(array) for array in fields]

    def run(self, function, *arguments):
        """Call a function on every replica, inside a tf.function; what each of this host gives."""
        return self.strategy.run(function, arguments)

    def first(self, values):
        """Of what was given by `run` that of this host's first replica."""
        local = self.strategy.experimental_local_results
        return tf.nest.map_structure(lambda value: local(value)[0], values)

    def number(self):
        """In a function that is run: the number of this replica among all."""
        context = tf.distribute.get_replica_context()
        return tf.cast(context.replica_id_in_sync_group, tf.int32)

    def sum(self, tensors):
        """In a function that is run: tensors summed over all replicas."""
        if self.count == 1:
            return tensors
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)

    def of_chief(self, number):
        """The chief's whole number, on every host."""
        if self.hosts == 1:
            return number

        @tf.function
        def total(number):
            own = tf.where(self.number() == 0, number, tf.zeros_like(number))
            return self.sum(own)

        return int(self.first(self.run(total, tf.constant(number, tf.int64))))


@contextlib.contextmanager
def lost_hosts(hosts, what_now):
    """Tell (UserError) of a host that is lost while the block runs; this one's errors pass.

    Args:
        hosts: how many there are.
        what_now: a function that gives the sentence after it.
    """
    try:
        yield
    except tf.errors.OpError as error:
        text = str(error)
        aborted = re.search(r"Collective ops is aborted.*", text)
        gone = isinstance(error, GONE)
        if hosts == 1 or not (gone or aborted):
            raise
        if not gone:
            raise UserError(
                f"the hosts cannot work together any more; see what the others said, here it was: "
                f"{aborted[0]:.300}. {what_now()}"
            ) from error
        found = re.search(r"(?:unhealthy|remote target).*?job:(\w+)/.*?task:(\d+)", text, re.S)
        who = f"{found[1]} {found[2]} of TF_CONFIG" if found else "another host"
        raise UserError(
            f"{who} has ended, or cannot be reached; see what it said there. {what_now()}"
        ) from error

"""The hosts of a training, as TF_CONFIG names them, which Kubernetes, Slurm and Vertex set."""

import json
import os
from typing import NamedTuple

from gpt2cli.errors import UserError

FORM = '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}'


class Cluster(NamedTuple):
    """hosts: how many there are; is_chief: whether this one writes the files."""

    hosts: int = 1
    is_chief: bool = True


def of_strategy(strategy):
    """The Cluster of a --strategy: several hosts for multiworker, and for auto with TF_CONFIG.

    Raises:
        UserError: TF_CONFIG is wrong, or missing where it is needed.
    """
    text = os.environ.get("TF_CONFIG", "")
    is_set = text.strip() not in ("", "{}")
    if strategy == "multiworker" and not is_set:
        raise UserError(
            "--strategy multiworker takes the hosts from TF_CONFIG, which is not set. On every "
            f"host the same, but for the index: {FORM}"
        )
    if strategy not in ("auto", "multiworker") or not is_set:
        return Cluster()
    try:
        found = json.loads(text)
        cluster, task = found["cluster"], found["task"]
        chiefs, workers = list(cluster.get("chief", [])), list(cluster.get("worker", []))
        kind, index = task["type"], int(task["index"])
        {"chief": chiefs, "worker": workers}[kind][index]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"TF_CONFIG is not of the form {FORM}: {text:.200}") from None
    return Cluster(len(chiefs + workers), kind == "chief" or not (chiefs or index))

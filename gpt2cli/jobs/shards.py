"""The value of --shard: which share of the prompts one command answers."""

import re
from collections.abc import Mapping

from gpt2cli import counts
from gpt2cli.errors import UsageError

# Environment variable with the number of this part -> how to number the parts from 0.
SCHEDULERS = {
    "SLURM_ARRAY_TASK_ID": "Submit the array with --array=0-{last}",
    "JOB_COMPLETION_INDEX": "Give the Kubernetes Job completions: {parts}",
}


def check(shard: str) -> None:
    """Raise UsageError unless the text is PART/PARTS or auto/PARTS."""
    if shard == "auto":
        raise UsageError("--shard auto needs the number of parts: write auto/N, such as auto/8")
    match = re.fullmatch(r"(auto|\d{1,9})/(\d{1,9})", shard, re.ASCII)
    if not match or not 1 <= int(match[1].replace("auto", "1")) <= int(match[2]):
        raise UsageError(f"--shard takes PART/PARTS such as 3/8, or auto/8, not {shard!r}")


def resolve(shard: str, environment: Mapping[str, str]) -> str:
    """Replace `auto` with the part that Slurm or Kubernetes assigned to this process.

    They count from 0. Their numbers are used as they are, so an element of an array that is
    submitted again alone answers the same prompts.

    Raises:
        UsageError: no variable is set, or its value is not the number of a part.
    """
    word, _, parts = shard.partition("/")
    if word != "auto":
        return shard
    name = next((name for name in SCHEDULERS if name in environment), None)
    if name is None:
        raise UsageError(f"--shard {shard} needs {' or '.join(SCHEDULERS)}, and neither is set")
    value, count = environment[name], int(parts)
    number = counts.whole_of(value, most=count - 1)
    wrong = f"{name} is {value!r:.50}" if number is None else None
    if [environment.get(f"SLURM_ARRAY_TASK_{end}") for end in ("MIN", "MAX")] == ["1", str(count)]:
        wrong = f"the array runs from 1 to {count}"
    if number is None or wrong:
        advice = SCHEDULERS[name].format(last=count - 1, parts=count)
        raise UsageError(f"--shard {shard} counts from 0 to {count - 1}, but {wrong}. {advice}")
    return f"{number + 1}/{count}"


def parse(shard: str | None) -> tuple[int, int]:
    """Return (part, parts) of a text without `auto`, parts counted from 0; None is (0, 1)."""
    part, parts = map(int, (shard or "1/1").split("/"))
    return part - 1, parts

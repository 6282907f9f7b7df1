"""Which part of the prompts this process answers."""

import re

from gpt2cli.errors import UsageError


def shard_of_job(shard, environment):
    """A --shard with `auto` in it as PART/PARTS; any other as it is.

    An element's number is its part, counted from 0: those of an array that are done again alone
    answer what they did before.

    Args:
        environment: variables, of which Slurm sets SLURM_ARRAY_TASK_ID, _MIN, _MAX and _COUNT, and
            Kubernetes, in a Job that is Indexed, JOB_COMPLETION_INDEX.

    Raises:
        UsageError: it does not follow from them which part this is.
    """
    match = re.fullmatch(r"auto(?:/(\d{1,9}))?", shard, re.ASCII)
    if not match:
        return shard
    parts = match[1] and int(match[1])

    def number(name):
        text = environment.get(name)
        if text is None or not re.fullmatch(r"\d{1,9}", text, re.ASCII):
            raise UsageError(f"--shard {shard}: {name} is {text!r}, not a number")
        return int(text)

    if "SLURM_ARRAY_TASK_ID" in environment:
        name, given = "SLURM_ARRAY_TASK_ID", "--array=0-{}"
        first, last = (environment.get(f"SLURM_ARRAY_TASK_{end}") for end in ("MIN", "MAX"))
        if parts is None:
            parts = _whole_array(shard, number)
        elif (first, last) == ("1", str(parts)):
            raise UsageError(
                f"--shard {shard}: the array's elements are 1 to {last}, and parts are counted "
                f"from 0. Submit it with --array=0-{parts - 1}"
            )
    elif "JOB_COMPLETION_INDEX" in environment:
        name, given = "JOB_COMPLETION_INDEX", "completions 0 to {}"
        if parts is None:
            raise UsageError("--shard auto: Kubernetes does not tell how many; say --shard auto/8")
    else:
        raise UsageError(
            f"--shard {shard} takes the part from SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX, "
            "and neither is set"
        )
    part = number(name)
    if part >= parts > 0:
        raise UsageError(
            f"--shard {shard}: {name} is {part}, and {parts} parts are counted from 0. "
            f"They are {given.format(parts - 1)}"
        )
    return f"{part + 1}/{parts}"


def _whole_array(shard, number):
    """The elements of Slurm's array, which must be all from 0 on; of some it would be a guess."""
    names = [f"SLURM_ARRAY_TASK_{end}" for end in ("MIN", "MAX", "COUNT")]
    first, last, count = map(number, names)
    if first or count != last + 1:
        raise UsageError(
            f"--shard {shard}: an array of {count} elements from {first} to {last} does not tell "
            "how many parts there are. Say so, as in --shard auto/8 with --array=0-7 or some of it"
        )
    return count

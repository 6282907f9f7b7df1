"""--shard: PART/PARTS, or auto/PARTS with the part that Slurm or Kubernetes assigned."""

import pytest

from gpt2cli.commands import sample
from gpt2cli.commands.sample import SampleOptions
from gpt2cli.errors import UsageError
from gpt2cli.jobs import shards


def slurm(part, first, last):
    """The environment variables of one element of a Slurm array."""
    values = {"ID": part, "MIN": first, "MAX": last}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    "shard, environment, expected",
    [
        ("3/8", {}, "3/8"),
        ("3/8", slurm(5, 0, 7), "3/8"),
        ("auto/8", slurm(3, 0, 7), "4/8"),
        ("auto/8", slurm(3, 3, 5), "4/8"),  # --array=3,5: the failed ones again
        ("auto/8", slurm(5, 3, 5), "6/8"),
        ("auto/8", {"SLURM_ARRAY_TASK_ID": "7"}, "8/8"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "0"}, "1/4"),
    ],
)
def test_a_shard_may_come_from_slurm_or_kubernetes(shard, environment, expected):
    config = SampleOptions(prompts="p.txt", shard=shard, out="o-{shard}.jsonl")
    assert config.shard == shard and config.out == "o-{shard}.jsonl"  # as given
    found = sample.resolved(config, environment)
    assert found.shard == expected and found.out == f"o-{expected.replace('/', '-of-')}.jsonl"


@pytest.mark.parametrize(
    "shard, environment, message",
    [
        ("auto/8", slurm(3, 1, 8), "the array runs from 1 to 8.*--array=0-7"),  # no part 0
        ("auto/8", slurm(8, 8, 8), "SLURM_ARRAY_TASK_ID is '8'.*--array=0-7"),
        ("auto/8", {"SLURM_ARRAY_TASK_ID": "-1"}, "SLURM_ARRAY_TASK_ID is '-1'"),
        ("auto/8", {"SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID is 'x'"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "4"}, "JOB_COMPLETION_INDEX is '4'.*completions: 4"),
        ("auto/8", {}, "SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX, and neither is set"),
    ],
)
def test_an_environment_without_a_valid_part_is_rejected(shard, environment, message):
    with pytest.raises(UsageError, match=f"^--shard {shard} .*{message}"):
        shards.resolve(shard, environment)


@pytest.mark.parametrize(
    "shard", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2", "1/2/3", "١/٢", "auto/0", "auto/", "auto/x"]
)
def test_a_malformed_shard_is_rejected(shard):
    with pytest.raises(UsageError, match="^--shard takes PART/PARTS"):
        SampleOptions(prompts="p.txt", shard=shard)


def test_auto_without_a_number_is_rejected():
    with pytest.raises(UsageError, match="--shard auto needs the number of parts: write auto/N"):
        SampleOptions(prompts="p.txt", shard="auto")


def test_a_shard_needs_prompts():
    for wrong in ({"prompt": "The"}, {"prompts": "p.txt", "nsamples": 0}):
        with pytest.raises(UsageError, match="--shard needs --prompts FILE"):
            SampleOptions(shard="1/2", **wrong)


@pytest.mark.parametrize(
    "value", ["9" * 5000, "\u0663", "\u00b2", "+1", " 1", "1_0", "-0", "1.0", "0x1"]
)
def test_an_odd_number_from_a_scheduler_is_reported_in_one_line(value):
    with pytest.raises(UsageError, match="SLURM_ARRAY_TASK_ID is") as caught:
        shards.resolve("auto/8", {"SLURM_ARRAY_TASK_ID": value})
    assert len(str(caught.value)) < 200

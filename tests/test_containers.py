"""The files in docs/deploy.md: their commands, and how hosts find each other."""

import json
import os
import re
import shlex
import subprocess

import pytest
import yaml
from conftest import ROOT

from gpt2cli import cli
from gpt2cli.training import hosts as cluster

TEXT = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
OBJECTS = [o for kind, text in BLOCKS if kind == "yaml" for o in yaml.safe_load_all(text)]
JOBS = [o for o in OBJECTS if o.get("kind") == "Job"]
SCRIPTS = [text for kind, text in BLOCKS if kind == "sh"]


def commands():
    """Words after the program's name, of every command of the page."""
    for block in (text.replace("\\\n", " ") for text in SCRIPTS):
        for line in block.splitlines():
            if found := re.match(
                r"(?:docker run .*? gpt2cli-(?:[cg]pu|serve)|srun gpt2cli|exec gpt2cli) (.*)", line
            ):
                yield shlex.split(found[1].rstrip("'"))
    for found in OBJECTS:
        yield from (shlex.split(one["command"]) for one in found.get("services", {}).values())
    for job in JOBS:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        yield container["args"]


def test_every_command_is_accepted(monkeypatch):
    for name, value in (("ID", 1), ("MIN", 0), ("MAX", 7), ("COUNT", 8)):  # as Slurm does
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    found = list(commands())
    assert len(found) == 13
    for words in found:
        assert all(isinstance(word, str) for word in words), words
        cli.read_command_line(words)


@pytest.mark.parametrize("job", JOBS, ids=[job["metadata"]["name"] for job in JOBS])
def test_a_job_can_run(job):
    """What Kubernetes would only find out later: volumes that nobody names, users, memory."""
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert mounted.keys() == {one["name"] for one in pod["volumes"]}
    assert mounted["gpt2cli"] == "/gpt2cli" and pod["securityContext"]["runAsNonRoot"]
    if container["resources"]["limits"]["nvidia.com/gpu"] > 1:
        assert mounted["shm"] == "/dev/shm"
    parts = job["spec"].get("completions", 1)
    assert parts == job["spec"].get("parallelism", 1)
    if "--shard" in container["args"]:
        assert f"auto/{parts}" in container["args"]


def test_the_pods_of_a_job_know_each_other(monkeypatch):
    (job,) = (j for j in JOBS if "subdomain" in j["spec"]["template"]["spec"])
    (service,) = (o for o in OBJECTS if o.get("kind") == "Service")
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == pod["subdomain"]
    environment = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert list(environment) == ["INDEX", "TF_CONFIG"]  # a value may name those before it
    count = job["spec"]["completions"]
    assert count > 1
    names = [f"{name}-{number}.{pod['subdomain']}:2222" for number in range(count)]
    for index, own in enumerate(names):
        monkeypatch.setenv("TF_CONFIG", environment["TF_CONFIG"].replace("$(INDEX)", str(index)))
        found = cluster.of_strategy("auto")
        assert (found.hosts, found.own, found.is_chief) == (count, own, index == 0)
        assert {own, *found.others} == set(names)


def test_the_script_for_slurm_names_the_hosts(tmp_path, monkeypatch):
    (script,) = (text for text in SCRIPTS if "TF_CONFIG" in text)
    for name, text in {
        "scontrol": "printf 'node%s\\n' 1 2",
        "srun": 'SLURM_PROCID=1 "$@"',
        "gpt2cli": 'echo "$TF_CONFIG"; echo "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-eu"],
        input=script,
        env=environment | {"SLURM_JOB_NODELIST": "node[1-2]"},
        capture_output=True,
        text=True,
    )
    config, words = done.stdout.splitlines()
    assert json.loads(config)["cluster"] == {"worker": ["node1:2222", "node2:2222"]}
    monkeypatch.setenv("TF_CONFIG", config)
    assert cluster.of_strategy("auto")[:3] == (2, False, "node2:2222")
    assert words.startswith("train --dataset")

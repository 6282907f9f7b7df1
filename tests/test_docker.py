"""The Dockerfiles, read as text; one slow test builds one, without Docker."""

import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from conftest import ROOT, SHARED
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.gpu")
TRY_DOCKERFILE = SHARED / "bin" / "try-dockerfile"


def steps(name):
    """The instructions of a Dockerfile, comments left out and continued lines joined."""
    lines = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and line[0] != "#"]


def arguments(name, instruction):
    """What follows each `instruction` of a Dockerfile."""
    return [step.split(" ", 1)[1] for step in steps(name) if step.startswith(f"{instruction} ")]


def packages_of_setup():
    """install_requires and the extra `serve` of setup.py, which is read, not run."""
    found = []
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        needed = isinstance(node, ast.keyword) and node.arg == "install_requires"
        if needed or (isinstance(node, ast.Assign) and node.targets[0].id == "SERVE"):
            found.append([Requirement(text) for text in ast.literal_eval(node.value)])
    assert len(found) == 2
    return found[0] + found[1]


def pins():
    """docker-constraints.txt as {name: version}."""
    lines = (ROOT / "docker-constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def is_sent(path):
    """Whether .dockerignore lets the builder see a path; the last line that fits decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        anywhere = pattern.startswith("**/")
        names = parts if anywhere else prefixes
        pattern = pattern.removeprefix("**/")
        if any(fnmatch(each, pattern) and each.count("/") == pattern.count("/") for each in names):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_base_and_tensorflow_are_pinned(name):
    (base,) = arguments(name, "FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", base)
    (tensorflow,) = arguments(name, "ARG")
    requirement = Requirement(tensorflow.removeprefix("TENSORFLOW="))
    assert requirement.name == "tensorflow"
    assert requirement.extras == ({"and-cuda"} if name == "Dockerfile.gpu" else set())
    assert str(requirement.specifier) == f"=={pins()['tensorflow']}"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_it_ends_as_a_user_who_is_not_root_with_the_command_as_process_one(name):
    assert steps(name)[-3:] == ["USER 1000:1000", 'ENTRYPOINT ["gpt2cli"]', 'CMD ["--help"]']
    assert arguments(name, "VOLUME") == ["/gpt2cli"]
    assert arguments(name, "WORKDIR")[-1] == "/gpt2cli"


def test_both_have_the_same_steps_but_for_tensorflow():
    cpu, gpu = (steps(name) for name in DOCKERFILES)
    assert len(cpu) == len(gpu)
    differing = [one.split("=")[0] for one, other in zip(cpu, gpu, strict=True) if one != other]
    assert differing == ["ARG TENSORFLOW"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_packages_are_installed_before_the_sources_come(name):
    order = steps(name)
    installed = next(i for i, step in enumerate(order) if "$TENSORFLOW" in step)
    assert [step for step in order[:installed] if step.startswith("COPY")] == [
        "COPY docker-constraints.txt ./"
    ]
    installs = [step for step in order if "pip install" in step]
    assert installs and all("--no-cache-dir" in step for step in installs)
    assert "--constraint docker-constraints.txt" in order[installed]
    named = {canonicalize_name(word) for word in order[installed].split("&&")[0].split()} & set(
        pins()
    )
    needed = {canonicalize_name(package.name) for package in packages_of_setup()} - {"tensorflow"}
    assert named == needed | {"setuptools", "wheel"}


def test_the_pins_are_within_the_ranges_of_setup():
    for requirement in packages_of_setup():
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), (
            requirement
        )


@pytest.mark.parametrize(
    "path",
    (
        ".git/config",
        ".venv/bin/python",
        "checkpoint/run1/model-1.index",
        "data/my.txt",
        "models/124M/model.ckpt.data-00000-of-00001",
        "models/make_tiny.py",
        "samples/run1/samples-1",
        "tests/test_docker.py",
        "gpt2cli/__pycache__/cli.cpython-311.pyc",
        "gpt2cli/commands/__pycache__/train.cpython-311.pyc",
    ),
)
def test_the_builder_is_not_sent(path):
    assert not is_sent(path)


@pytest.mark.parametrize(
    "path",
    (
        "docker-constraints.txt",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "gpt2cli/cli.py",
        "gpt2cli/commands/train.py",
        "models/tiny/model.ckpt.index",
    ),
)
def test_the_builder_is_sent(path):
    assert is_sent(path)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_builder_is_sent_all_that_is_copied(name):
    copies = arguments(name, "COPY")
    assert len(copies) >= 2
    for copied in copies:
        *sources, _ = (word for word in copied.split() if not word.startswith("--"))
        for source in sources:
            assert is_sent(source), source


@pytest.mark.slow
@pytest.mark.skipif(
    not (sys.platform == "linux" and os.geteuid() == 0 and TRY_DOCKERFILE.exists()),
    reason="builds with ../shared/bin/try-dockerfile, as root",
)
def test_the_cpu_image_is_built_and_samples_from_tiny_as_its_own_user():
    tag = "gpt2cli-test"

    def run(*command, timeout):
        command = [str(TRY_DOCKERFILE), *command]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    run("Dockerfile.cpu", tag, timeout=1800)
    try:
        assert run("--run", tag, "id", "-u", timeout=120).strip() == "1000"
        sample = "gpt2cli sample --model_name tiny --length 20 --seed 1".split()
        page = run("--run", tag, "gpt2cli", "serve", "--help", timeout=300)
        assert "--max_batch" in page
        text = run("--run", tag, *sample, timeout=300)
        assert text.startswith("=" * 40 + " SAMPLE 1 " + "=" * 40)
        assert text == run("--run", tag, *sample, timeout=300), "the same seed, another text"
    finally:
        storage = {**os.environ, "STORAGE_DRIVER": "vfs"}
        subprocess.run(["buildah", "rmi", tag], env=storage, capture_output=True, check=False)

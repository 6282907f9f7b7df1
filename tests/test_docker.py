"""The Dockerfiles and what they install, read as text; one slow test builds one, without Docker."""

import ast
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import pytest
import yaml
from conftest import ROOT, SHARED
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.gpu")
STAGES = [("Dockerfile.cpu", ""), ("Dockerfile.cpu", "serve"), ("Dockerfile.gpu", "")]
TRY_DOCKERFILE = SHARED / "bin" / "try-dockerfile"


def steps(name):
    """The instructions of a Dockerfile, comments left out and continued lines joined."""
    lines = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and line[0] != "#"]


def stage(name, wanted):
    """The steps of a stage, or of the last one for "", after those of the stage it starts from."""
    found, last = {}, ""
    for step in steps(name):
        if step.startswith("FROM "):
            _, base, *last = step.split()
            last = last[1] if last else ""
            found[last] = list(found.get(base, []))
        found[last].append(step)
    return found[wanted]


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


def locked(name):
    """requirements/NAME.txt as (requirement, number of checksums) pairs."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.lstrip()[:1] != "#"]
    split = [line.split(" --hash=sha256:") for line in lines]
    hashes = [part.strip() for _, *found in split for part in found]
    assert hashes and all(re.fullmatch("[0-9a-f]{64}", part) for part in hashes)
    return [(Requirement(one.strip()), len(found)) for one, *found in split]


def installed(name, machine):
    """{package: version} of requirements/NAME.txt for Python 3.11 on a kind of machine."""
    target = {
        "platform_machine": machine,
        "sys_platform": "linux",
        "python_version": "3.11",
        "python_full_version": "3.11.16",
    }
    found = [one for one, _ in locked(name) if not one.marker or one.marker.evaluate(target)]
    pins = {canonicalize_name(one.name): one.specifier for one in found}
    assert len(pins) == len(found)
    return {name: Version(str(pin).removeprefix("==")) for name, pin in pins.items()}


IMAGES = [("cpu", "x86_64"), ("cpu", "aarch64"), ("gpu", "x86_64")]
SLIM = [("serve", "x86_64"), ("serve", "aarch64")]  # the stage without TensorFlow
TRAINS = {"tensorflow", "keras"}  # packages that it leaves out, with what only they need


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
def test_the_base_is_pinned_by_digest(name):
    base, *others = arguments(name, "FROM")
    assert [words.split()[0] for words in others] == ["packages"] * len(others)
    base = base.removesuffix(" AS packages")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)


@pytest.mark.parametrize("name", ("cpu", "gpu", "serve"))
def test_every_package_has_one_version_and_checksums(name):
    for requirement, hashes in locked(name):
        assert hashes, requirement
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement


@pytest.mark.parametrize("name, machine", IMAGES + SLIM)
def test_every_package_of_setup_is_in_the_image_within_its_range(name, machine):
    pins = installed(name, machine)
    for requirement in packages_of_setup():
        package = canonicalize_name(requirement.name)
        if name == "serve" and package in TRAINS:
            assert package not in pins
            continue
        if package == "tensorflow" and (name, machine) == ("cpu", "x86_64"):
            package = "tensorflow-cpu"
        assert requirement.specifier.contains(pins[package]), requirement
    assert {"setuptools", "wheel"} <= set(pins), "the image is built without build isolation"


def test_the_images_differ_in_tensorflow_and_cuda_alone():
    slim, arm, gpu = (installed(*image) for image in IMAGES)
    assert arm.pop("tensorflow") == slim.pop("tensorflow-cpu") == gpu.pop("tensorflow")
    assert arm == slim
    only = {name: version for name, version in gpu.items() if name not in arm}
    assert only and all(name.startswith("nvidia-") for name in only)
    assert gpu == {**arm, **only}


def test_the_stage_serve_has_the_versions_of_the_whole_image_and_fewer_packages():
    for machine in ("x86_64", "aarch64"):
        slim, whole = installed("serve", machine), installed("cpu", machine)
        assert slim.items() < whole.items()
        assert not [name for name in slim if name.startswith(("tensorflow", "keras", "h5py"))]


@pytest.mark.parametrize("name, last", STAGES)
def test_it_ends_as_a_user_who_is_not_root_with_the_command_as_process_one(name, last):
    order = stage(name, last)
    assert order[-3:] == ["USER 1000:1000", 'ENTRYPOINT ["gpt2cli"]', 'CMD ["--help"]']
    assert [step for step in order if step.startswith("VOLUME")] == ["VOLUME /gpt2cli"]
    assert [step for step in order if step.startswith("WORKDIR")][-1] == "WORKDIR /gpt2cli"


def test_all_stages_have_the_same_steps_except_for_the_packages():
    cpu, slim, gpu = (
        sorted(s for s in stage(*which) if not s.startswith(("FROM", "ARG"))) for which in STAGES
    )
    (packages,) = (step for step in gpu if "$PACKAGES" in step)
    first, second = sorted((s for s in cpu if "requirements/" in s), key=lambda s: "serve" in s)
    assert first == packages.replace("$PACKAGES", "cpu")
    assert second == packages.replace("$PACKAGES", "serve").partition(" && ")[0]
    assert sorted({*cpu} - {first, second}) == sorted({*gpu} - {packages})
    assert sorted({*cpu} - {first}) == slim


@pytest.mark.parametrize("name, last", STAGES)
def test_packages_are_installed_before_the_sources_and_only_with_checksums(name, last):
    order = stage(name, last)
    installs = [i for i, step in enumerate(order) if "pip install" in step]
    *packages, last = installs
    assert [step for step in order[: packages[0]] if step.startswith("COPY")] == [
        "COPY requirements requirements"
    ]
    assert "COPY gpt2cli gpt2cli" in order[packages[-1] : last]
    for first in packages:
        assert {"--require-hashes", "--only-binary"} <= set(order[first].split())
        assert "-r requirements/" in order[first]
    assert {"--no-deps", "--no-build-isolation", "."} <= set(order[last].split())
    assert all("--no-cache-dir" in order[i] for i in installs)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_nothing_else_is_fetched_while_building(name):
    assert {step.split()[0] for step in steps(name)} <= {
        *("FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "VOLUME", "USER", "ENTRYPOINT", "CMD")
    }
    text = " ".join(step for step in steps(name) if step.startswith(("RUN", "COPY", "ENV", "ARG")))
    assert not re.search(r"https?://|\b(curl|wget|git|apt|apt-get)\b|--from=", text)


def test_workflows_name_actions_by_commit_and_may_only_read():
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
    assert workflows
    for path in workflows:
        text = path.read_text(encoding="utf-8")
        uses = re.findall(r"uses: *(.*)", text)
        assert uses
        for one in uses:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v[\d.]+", one), (path, one)
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}


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
        "requirements/cpu.txt",
        "requirements/gpu.txt",
        "requirements/serve.txt",
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
@pytest.mark.parametrize("name, machine", IMAGES + SLIM)
def test_every_dependency_is_locked_and_has_a_wheel(name, machine, tmp_path):
    uv = pytest.importorskip("uv", reason="needs bin/install supply").find_uv_bin()
    empty = tmp_path / "empty"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, empty], check=True)
    command = [uv, "pip", "install", "--dry-run", "--python", empty, "--only-binary", ":all:"]
    command += ["--python-platform", f"{machine}-manylinux_2_36", "--python-version", "3.11"]
    command += ["--require-hashes", "-r", f"requirements/{name}.txt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen = dict(re.findall(r"^ \+ (\S+)==(\S+)$", done.stderr, re.M))
    assert {name: Version(version) for name, version in chosen.items()} == installed(name, machine)


@pytest.mark.slow
def test_the_same_sources_make_the_same_wheel(tmp_path):
    wheels = []
    for second in (1, 2):
        folder = tmp_path / str(second)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "gpt2cli"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            folder.mkdir(exist_ok=True)
            copy(ROOT / name, folder / name)
        for path in folder.rglob("*"):
            os.utime(path, (1_700_000_000 + 100 * second,) * 2)
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
        subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
        (wheel,) = folder.glob("*.whl")
        wheels.append(wheel.read_bytes())
    assert wheels[0] == wheels[1]


@pytest.mark.slow
@pytest.mark.skipif(
    not (sys.platform == "linux" and os.geteuid() == 0 and TRY_DOCKERFILE.exists()),
    reason="builds with ../shared/bin/try-dockerfile, as root",
)
@pytest.mark.parametrize("target", ["serve", ""])
def test_the_cpu_image_is_built_and_samples_from_tiny_as_its_own_user(tmp_path, target):
    tag = "gpt2cli-test"

    def run(*command, timeout):
        command = [str(TRY_DOCKERFILE), *command]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    # The script builds on its own Debian, which has another digest.
    text = (ROOT / "Dockerfile.cpu").read_text(encoding="utf-8")
    (tmp_path / "Dockerfile").write_text(re.sub("@sha256:[0-9a-f]+", "", text), encoding="utf-8")
    chosen = ["--target", target] if target else []
    run(str(tmp_path / "Dockerfile"), tag, *chosen, timeout=1800)
    try:
        assert run("--run", tag, "id", "-u", timeout=120).strip() == "1000"
        sample = ["gpt2cli", "sample", "--model_name", "tiny", "--length", "20", "--seed", "1"]
        page = run("--run", tag, "gpt2cli", "serve", "--help", timeout=300)
        assert "--max_batch" in page
        text = run("--run", tag, *sample, timeout=300)
        assert text.startswith("=" * 40 + " SAMPLE 1 " + "=" * 40)
        assert text == run("--run", tag, *sample, timeout=300), "the same seed, another text"
    finally:
        storage = {**os.environ, "STORAGE_DRIVER": "vfs"}
        subprocess.run(["buildah", "rmi", tag], env=storage, capture_output=True, check=False)

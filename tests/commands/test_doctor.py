"""`doctor`: findings, and advice for each problem."""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt2cli import tensorflow
from gpt2cli.commands import doctor

CARD = "NVIDIA H100 80GB HBM3, 81559, 80994, 550.54.15"
LISTED = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5d2c7f1a-0000)"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Pretend there are no GPUs; return a function that installs an nvidia-smi."""
    for name in ("CUDA_VISIBLE_DEVICES", "TF_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(doctor, "KERNEL_DRIVER", tmp_path / "no version")
    monkeypatch.setattr(doctor, "WSL", tmp_path / "no dxg")
    monkeypatch.setattr(tensorflow, "GPUS", [])

    def install_nvidia_smi(code):
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{code}\n")
        (programs / "nvidia-smi").chmod(0o755)

    return install_nvidia_smi


def test_a_machine_without_problems(cli, workdir, monkeypatch):
    monkeypatch.setattr(doctor.machine, "free_memory", lambda: 8e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=9e9, total=1e10))
    monkeypatch.setattr(doctor.machine, "gains_by_bfloat16", lambda: False)
    result = cli("doctor")
    assert "training with --precision bfloat16 is no faster" in result.stdout
    assert result.returncode == 0 and "->" not in result.stdout and result.stderr == ""
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert tensorflow.tf.__version__ in lines["tensorflow"] and "CPU:0 computes" in result.stdout
    assert f"litert       {version('ai-edge-litert')}, computes with XNNPACK" in result.stdout
    assert "runs sample, interactive, evaluate and serve, on a CPU" in result.stdout
    assert "runs train, convert, export and init\n" in result.stdout
    assert "tiny" in lines["models"] and "none" in lines["runs"]
    assert f"of {os.cpu_count()} cores" in lines["processor"]
    assert "8.0 GB free" in lines["memory"] and "9.0 GB free" in lines["disk"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"TF_CONFIG": "nonsense"}, "TF_CONFIG is not of the form"),
        ({"XDG_CACHE_HOME": "nowhere"}, "set XDG_CACHE_HOME"),
    ],
)
def test_a_problem_gives_advice_and_a_status(cli, workdir, monkeypatch, change, said):
    monkeypatch.setattr(doctor.machine, "free_memory", lambda: 8e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=9e9))
    monkeypatch.setattr(doctor, "end_of_import", lambda verbose, module: None)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    result = cli("doctor")
    assert result.returncode == 1 and "1 problem found" in result.stderr
    (advice,) = (line for line in result.stdout.splitlines() if "->" in line)
    assert said in advice


NATIVE = """
raise ImportError('''Traceback (most recent call last):
  File "pywrap_tensorflow.py", line 73, in <module>
ImportError: libcudart.so.12: cannot open shared object file: No such file or directory


Failed to load the native TensorFlow runtime.
If you need help, create an issue and include the stack trace above this error message.''')"""


@pytest.mark.parametrize(
    "code, said, advice",
    [
        (NATIVE, "exit status 1, ImportError: libcudart.so.12: cannot open", "bin/install gpu"),
        (
            "raise ModuleNotFoundError(\"No module named 'tensorflow'\")",
            "exit status 1, ModuleNotFoundError: No module",
            "pip install tensorflow",
        ),
        (
            "import os; os.write(2, b'no AVX\\n'); os.kill(os.getpid(), 4)",
            "SIGILL, no AVX",
            "such as AVX",
        ),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL", "out of memory"),
        ("import os; os.write(2, b'no AVX\\n'); os.abort()", "SIGABRT, no AVX", "such as AVX"),
        ("raise RuntimeError", "exit status 1, RuntimeError", "--force-reinstall"),
    ],
)
def test_the_rest_is_reported_where_tensorflow_cannot_be_imported(
    shell, workdir, machine, code, said, advice
):
    machine(f"echo '{CARD}'")
    (workdir / "packages" / "tensorflow").mkdir(parents=True)
    (workdir / "packages" / "tensorflow" / "__init__.py").write_text(code)
    path = os.pathsep.join([str(workdir / "packages"), str(Path(doctor.__file__).parents[2])])
    result = shell("doctor", env={"PYTHONPATH": path})
    assert result.returncode == 1 and "found; see the lines marked ->" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    lines = result.stdout.splitlines()
    names = [line.split()[0] for line in lines if line[0] != " "]
    start = [
        "gpt2cli",
        "packages",
        "extras",
        "processor",
        "memory",
        "disk",
        "cache",
        "nvidia-smi",
        "litert",
    ]
    assert names == [*start, "tensorflow", "models", "runs"]
    (number,) = (i for i, line in enumerate(lines) if line.startswith("tensorflow"))
    assert f"cannot be imported: {said}" in lines[number] and advice in lines[number + 1]


def test_verbose_shows_the_whole_output_of_the_import(capfd, monkeypatch):
    monkeypatch.setattr(doctor, "outcome", lambda *words: (1, "first\nlast"))
    assert doctor.end_of_import(False, "gpt2cli.tensorflow") == "exit status 1, last"
    assert capfd.readouterr().err == ""
    doctor.end_of_import(True, "gpt2cli.tensorflow")
    assert capfd.readouterr().err == "first\nlast\n"


def test_an_import_that_hangs_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.01)
    assert "not finished in 0.01 seconds" in doctor.end_of_import(False, "gpt2cli.tensorflow")


def test_memory_is_reported_beside_that_of_gpus(monkeypatch, machine):
    monkeypatch.setattr(tensorflow, "GPUS", ["a GPU"])
    machine(f"echo '{CARD}'; echo 'NVIDIA GB10, [N/A], [N/A], 580.95'")
    (finding,) = doctor.check_memory()
    assert finding.name == "memory" and "GB free" in finding.found
    first, second = doctor.check_nvidia_smi()
    assert first.found == "NVIDIA H100 80GB HBM3, 84.9 of 85.5 GB free, driver 550.54.15"
    assert second.found == "NVIDIA GB10, driver 580.95"


def test_a_missing_nvidia_smi_is_left_out_and_a_failing_one_reported(monkeypatch, machine):
    assert not list(doctor.check_nvidia_smi())
    machine("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    (finding,) = doctor.check_nvidia_smi()
    assert "version mismatch" in finding.found and finding.advice is None
    machine("kill -9 $$")
    assert next(doctor.check_nvidia_smi()).found == "fails: -9"
    machine("echo a warning")
    assert not list(doctor.check_nvidia_smi())
    monkeypatch.setattr(doctor, "SMI_SECONDS", 0.2)
    machine("exec /bin/sleep 9")
    assert "not finished in 0.2 seconds" in next(doctor.check_nvidia_smi()).found


def unseen(monkeypatch, driver="550.54.15", cuda=True, missing=(), visible=None):
    """Return the finding where there is a driver and TensorFlow sees no GPU."""
    monkeypatch.setattr(doctor, "driver_version", lambda: driver)
    monkeypatch.setattr(doctor, "can_load", lambda name: name not in missing)
    monkeypatch.setattr(tensorflow.tf.test, "is_built_with_cuda", lambda: cuda)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (finding,) = doctor.check_gpus(tensorflow)
    assert driver in finding.found
    return finding


@pytest.mark.parametrize(
    "case, said",
    [
        ({"cuda": False}, "TensorFlow for CUDA"),
        ({}, "--gpus all"),
        ({"missing": doctor.CUDA_LIBRARIES}, "missing: libcuda.so.1, libcudart.so.12"),
        ({"missing": ["libcuda.so.1"]}, "--gpus all"),
        ({"visible": "-1"}, "unset it"),
        ({"visible": ""}, "unset it"),
        ({"driver": "525.60.11"}, "update the driver: CUDA 12 needs 525.60.13"),
        ({"driver": "525.60.13"}, "--gpus all"),
        ({"driver": "470.256.02", "missing": ["libcudnn.so.9"]}, "update the driver"),
        ({"driver": "unknown"}, "--gpus all"),
        ({"visible": "9"}, "may name no GPU: fix or unset it"),
    ],
)
def test_a_gpu_that_tensorflow_does_not_see(monkeypatch, case, said):
    assert said in unseen(monkeypatch, **case).advice


@pytest.mark.parametrize(
    "visible, exists",
    [
        ("0", True),
        ("GPU-5d2c7f1a", True),
        ("MIG-77aa", True),
        ("9", False),
        ("9,0", False),  # CUDA stops at the first that does not exist
        ("GPU-0000", False),
        ("NoDevFiles", False),
    ],
)
def test_a_cuda_visible_devices_that_names_no_gpu_is_reported(
    monkeypatch, machine, visible, exists
):
    machine(f"echo '{LISTED}'; echo '  MIG 1g.10gb Device 0: (UUID: MIG-77aa-0000)'")
    advice = unseen(monkeypatch, visible=visible).advice
    assert ("fix or unset it" in advice) != exists and ("--verbose" in advice) == exists
    assert exists or f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine" in advice


def test_a_driver_that_nvidia_smi_cannot_reach_does_not_blame_docker(monkeypatch, machine):
    machine("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert "restart the machine" in unseen(monkeypatch).advice


def test_the_driver_is_found_in_the_kernel_and_in_wsl(monkeypatch, machine):
    (finding,) = doctor.check_gpus(tensorflow)
    assert finding.found == "none (no NVIDIA driver)" and finding.advice is None
    doctor.WSL.touch()
    monkeypatch.setattr(doctor, "can_load", lambda name: False)
    (finding,) = doctor.check_gpus(tensorflow)
    assert "WSL2" in finding.found and "no NVIDIA driver" not in finding.found
    monkeypatch.setattr(doctor, "can_load", lambda name: name == "libcuda.so.1")
    assert doctor.driver_version() == "unknown"
    machine("echo 'NVIDIA GeForce GTX 1660, 6144, 5900, 566.36'")
    assert doctor.driver_version() == "566.36"
    doctor.KERNEL_DRIVER.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05")
    assert doctor.driver_version() == "535.104.05"


@pytest.mark.parametrize(
    "loads, megabytes, advices",
    [(True, 1000, []), (False, 1000, ["nvidia-nccl"]), (True, 64, ["--shm-size 1g"])],
)
def test_several_gpus_need_nccl_and_shared_memory(monkeypatch, loads, megabytes, advices):
    asked = []
    monkeypatch.setattr(doctor, "can_load", lambda name: asked.append(name) or loads)
    size = SimpleNamespace(total=megabytes * 1e6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: size)
    found = list(doctor.check_several_gpus())
    assert asked == ["libnccl.so.2"] and f"{megabytes:,} MB" in found[1].found
    given = [finding.advice for finding in found if finding.advice]
    assert len(given) == len(advices)
    assert all(a in g for a, g in zip(advices, given, strict=True))


@pytest.mark.parametrize("count", [1, 2])
def test_nccl_is_checked_only_for_several_gpus(monkeypatch, count):
    gpu = SimpleNamespace(name="/physical_device:GPU:0")
    details = SimpleNamespace(get_device_details=lambda gpu: {"compute_capability": (9, 0)})
    tf = SimpleNamespace(config=SimpleNamespace(experimental=details))
    found = [f.name for f in doctor.check_gpus(SimpleNamespace(GPUS=[gpu] * count, tf=tf))]
    assert found == (["gpu"] if count == 1 else ["gpu", "gpu", "nccl", "/dev/shm"])


@pytest.mark.parametrize(
    "workers, said",
    [
        (["a:2222"], "1 host; this one (a:2222) writes the run"),
        (["b:1", "a:2222"], "2 hosts; this one (a:2222) computes"),
    ],
)
def test_the_hosts_of_tf_config_are_counted_and_this_one_named(monkeypatch, workers, said):
    task = {"type": "worker", "index": workers.index("a:2222")}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": workers}, "task": task}))
    assert [finding.found for finding in doctor.check_hosts()] == [said]


@pytest.mark.parametrize(
    "error, said",
    [
        ("libdevice not found at ./x.bc", "xla_gpu_cuda_data_dir"),
        ("out of memory", "see the message"),
    ],
)
def test_a_device_that_does_not_compile_gives_its_error_and_advice(monkeypatch, error, said):
    def fail(*_, **__):
        raise RuntimeError(error)

    monkeypatch.setattr(tensorflow.tf, "function", fail)
    _, device, *_ = doctor.check_devices(tensorflow)
    assert error in device.found and said in device.advice


def test_a_missing_library_cannot_be_loaded():
    assert doctor.can_load("libc.so.6") and not doctor.can_load("libnothing.so.99")


def test_names_are_printed_with_their_escapes():
    finding = doctor.Finding("model", "a\x1b[2J\n\u202eb", "mv \u2066x")
    assert str(finding).splitlines()[0].endswith("a\\x1b[2J\\n\\u202eb")
    assert str(finding).endswith("-> mv \\u2066x") and str(finding).count("\n") == 1


def test_a_machine_without_tensorflow_has_a_line_and_no_problem(cli, workdir, monkeypatch):
    monkeypatch.setattr(doctor.machine, "free_memory", lambda: 8e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=9e9, total=1e10))
    monkeypatch.setattr(doctor.machine, "has_tensorflow", lambda: False)
    result = cli("doctor")
    assert result.returncode == 0 and "->" not in result.stdout
    line = "tensorflow   is not installed; train, convert, export and init need it, and so do GPUs"
    assert line in result.stdout
    monkeypatch.setattr(doctor, "driver_version", lambda: "550.54.15")
    _, gpu = doctor.check_tensorflow(verbose=False)
    assert "550.54.15" in gpu.found and "bin/install gpu" in gpu.advice


@pytest.mark.parametrize(
    "product, said, advice",
    [
        ((0.0, True), "computes with XNNPACK", None),
        ((0.0, False), "computes without XNNPACK", "64-bit Arm"),
        ((0.1, True), "computes wrong numbers", "another machine"),
        ((float("nan"), True), "computes wrong numbers", "another machine"),
    ],
)
def test_litert_is_checked_by_a_product(monkeypatch, product, said, advice):
    monkeypatch.setattr(doctor, "end_of_import", lambda verbose, module: None)
    monkeypatch.setattr(doctor, "product_of_litert", lambda: product)
    found = next(doctor.check_litert(verbose=False))
    assert said in found.found and (advice is None) is (found.advice is None)
    assert advice is None or advice in found.advice


def test_a_litert_that_cannot_be_imported_or_fails_has_advice(monkeypatch):
    monkeypatch.setattr(doctor, "end_of_import", lambda verbose, module: "SIGILL")
    (found,) = doctor.check_litert(verbose=False)
    assert "cannot be imported: SIGILL" in found.found and "ai-edge-litert" in found.advice
    monkeypatch.setattr(doctor, "end_of_import", lambda verbose, module: None)
    monkeypatch.setattr(doctor, "product_of_litert", lambda: 1 / 0)
    (found,) = doctor.check_litert(verbose=False)
    assert "division by zero" in found.found and "--verbose" in found.advice

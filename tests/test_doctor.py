"""`doctor`: what is there, and for what is wrong what to do."""

import os

import pytest

from gpt2cli import engine
from gpt2cli.commands import doctor


def test_a_machine_that_is_well(cli, workdir, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    result = cli("doctor")
    assert result.returncode == 0 and "->" not in result.stdout and result.stderr == ""
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert engine.tf.__version__ in lines["tensorflow"] and "CPU:0 computes" in result.stdout
    assert "tiny" in lines["models"] and "none" in lines["runs"]
    assert f"of {os.cpu_count()} cores" in lines["processor"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"TF_CONFIG": "nonsense"}, "TF_CONFIG is not of the form"),
        ({"XDG_CACHE_HOME": "nowhere"}, "set XDG_CACHE_HOME"),
    ],
)
def test_what_is_wrong_has_an_advice_and_a_status(cli, workdir, monkeypatch, change, said):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    result = cli("doctor")
    assert result.returncode == 1 and "1 thing to mend" in result.stderr
    (advice,) = (line for line in result.stdout.splitlines() if "->" in line)
    assert said in advice


@pytest.mark.parametrize(
    "cuda, loads, hidden, said",
    [
        (False, True, None, "TensorFlow for CUDA"),
        (True, True, None, "--gpus all"),
        (True, False, None, "missing: libcuda.so.1, libcudart.so.12"),
        (True, True, "-1", "unset it"),
    ],
)
def test_a_gpu_that_tensorflow_does_not_see(monkeypatch, cuda, loads, hidden, said):
    monkeypatch.setattr(engine, "GPUS", [])
    monkeypatch.setattr(doctor, "driver_version", lambda: "550.54")
    monkeypatch.setattr(doctor, "can_load", lambda name: loads)
    monkeypatch.setattr(engine.tf.test, "is_built_with_cuda", lambda: cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (finding,) = doctor.gpus(None)
    assert "550.54" in finding.found and said in finding.advice


def test_a_libdevice_that_xla_does_not_find_is_named():
    assert "xla_gpu_cuda_data_dir" in doctor._libdevice_advice("libdevice not found at ./x.bc")
    assert doctor._libdevice_advice("out of memory") is None


def test_a_library_that_is_not_there_cannot_be_loaded():
    assert doctor.can_load("libc.so.6") and not doctor.can_load("libnothing.so.99")

"""Generation on a CPU: no part of it imports TensorFlow, and all of it runs where there is none."""

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, TINY, lively

from gpt2cli import machine
from gpt2cli.inference import devices, generator
from gpt2cli.inference.engines import litert_convert, skeletons
from gpt2cli.model.sizes import PRESETS, ModelConfig
from gpt2cli.model.weights import weight_shapes
from gpt2cli.storage import checkpoint

# A search for a module that nothing here may ask for ends the process.
FORBIDDEN = """
import sys


class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "keras", "pandas"):
            raise SystemExit(f"something asks for {name}")


sys.meta_path.insert(0, Forbidden())
"""
# As if it was not installed.
MISSING = """
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        is_hidden = name.split(".")[0] in ("tensorflow", "keras")
        return None if is_hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)
"""
RUN = """
from gpt2cli.cli import main


def run(*words):
    try:
        main(words)
    except SystemExit as end:
        return end.code
    return 0
"""


def python(code, folder, **environment):
    """Run code in a process that sees no GPU; its standard input has two lines."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**os.environ, **hidden},
        input="The kettle\nA letter\n",
        capture_output=True,
        text=True,
        timeout=120,
    )


EVERYTHING = (
    FORBIDDEN
    + RUN
    + """
import json, os, signal, threading, time, urllib.request
import gpt2cli
from gpt2cli.commands import serve

short = ("--model_name", "tiny", "--length", "3", "--seed", "1")
assert run("sample", "The kettle", *short) == 0
for precision in ("float32", "bfloat16", "int8"):
    job = ("--format", "jsonl", "--out", f"{precision}.jsonl", "--precision", precision)
    assert run("sample", "--prompts", "prompts.txt", *job, *short) == 0
assert run("interactive", *short) == 0
assert run("encode", "prompts.txt", "prompts.npz", "--model_name", "tiny") == 0
assert run("evaluate", "prompts.txt", "--model_name", "tiny") == 0
assert run("evaluate", "prompts.npz", "--model_name", "tiny") == 0

model = gpt2cli.load_model("models/tiny")
assert len(model.generate("The", length=3, seed=1)[0].tokens) == 3
assert model.logits([1, 2]).shape == (2, model.config.n_vocab)
assert model.loss([1, 2, 3]) > 0
assert gpt2cli.evaluate("prompts.txt", model_name="tiny")["tokens"] > 0


def ask(port):
    body = json.dumps({"prompt": "The", "max_tokens": 2}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    answer = None
    while answer is None:
        try:
            answer = urllib.request.urlopen(request).read().decode()
        except OSError:  # still loading
            time.sleep(0.02)
    print(answer)
    os.kill(os.getpid(), signal.SIGTERM)


def listen(host, port):
    socket = first(host, port)
    threading.Thread(target=ask, args=[socket.getsockname()[1]], daemon=True).start()
    return socket


first, serve.listen = serve.listen, listen
assert run("serve", "--model_name", "tiny", "--port", "0") == 0
assert not [name for name in sys.modules if name.split(".")[0] in ("tensorflow", "keras")]
print("no TensorFlow")
"""
)


def test_all_that_generates_and_measures_runs_without_importing_tensorflow(prompts):
    done = python(EVERYTHING, prompts)
    assert done.returncode == 0, done.stderr
    *_, answer, last = done.stdout.splitlines()
    assert last == "no TensorFlow"
    assert json.loads(answer)["usage"]["completion_tokens"] == 2
    for precision in ("float32", "bfloat16", "int8"):
        lines = (prompts / f"{precision}.jsonl").read_text().splitlines()
        assert [len(json.loads(line)["tokens"]) for line in lines] == [3] * 5


def another_size(folder):
    """Write a model of a size that is not shipped, with the vocabulary of models/tiny."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("model*", "checkpoint", "SHA*"))
    checkpoint.save(lively(ModelConfig(2048, 16, 8, 2, 1)), folder)


NOT_INSTALLED = (
    MISSING
    + RUN
    + """
assert run("train", "prompts.txt", "--model_name", "tiny", "--steps", "1") == 1
assert run("convert", "models/tiny", "hf", "--to", "hf") == 1
assert run("export", "run1", "models/copy") == 1
assert run("init", "new", "--vocab", "models/tiny") == 1
assert run("sample", "The", "--model_name", "other", "--length", "3", "--temperature", "0") == 1
assert run("download", "hf:someone/something") == 1
assert run("sample", "The", "--model_name", "tiny", "--length", "3", "--temperature", "0") == 0
"""
)


def test_where_tensorflow_is_not_installed_each_error_names_what_to_do(prompts, monkeypatch):
    another_size(prompts / "models" / "other")
    done = python(NOT_INSTALLED, prompts, XDG_CACHE_HOME=str(prompts), CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("gpt2cli: ")]
    names = ["train", "convert", "export", "init", "a model of", "download hf:"]
    for name, error in zip(names, errors, strict=True):
        assert error.startswith(f"gpt2cli: {name}") and "pip install tensorflow" in error
    assert "1 layer, 8 wide" in errors[4] and str(prompts / "gpt2cli") in errors[4]
    assert "on CPU (a GPU needs TensorFlow, which is not installed)" in done.stderr
    assert len(done.stdout.splitlines()) == 2  # the sample of tiny
    assert sorted(path.name for path in prompts.glob("models/*")) == ["other", "tiny"]


def test_another_size_imports_tensorflow_once_and_says_so(cli, workdir, monkeypatch):
    another_size(workdir / "models" / "other")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir))
    words = ("sample", "The", "--model_name", "other", "--length", "3", "--seed", "1")
    first = cli(*words)
    assert first.returncode == 0
    assert "converted with TensorFlow, once for each size" in first.stderr
    code = FORBIDDEN + RUN + f"sys.exit(run(*{words}))"
    second = python(code, workdir, XDG_CACHE_HOME=str(workdir))
    assert second.returncode == 0 and second.stdout == first.stdout
    assert "converted" not in second.stderr


def test_the_shipped_programs_are_current():
    done = subprocess.run(
        [sys.executable, ROOT / "bin" / "programs", "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_released_sizes_tiny_and_gpt2_ml_are_shipped():
    assert {"124M", "355M", "774M", "1558M", "distil", "tiny"} <= set(PRESETS)
    sizes = [ModelConfig(1, 1, width, heads, depth) for depth, heads, width in PRESETS.values()]
    for config in [*sizes, ModelConfig(1, 1, 1536, 24, 48, arch="gpt2_ml")]:
        for part in ("layers", "head"):
            assert (skeletons.SHIPPED / skeletons.file_name(part, config)).is_file()


@pytest.mark.parametrize("part", [pytest.param("layers", marks=pytest.mark.slow), "head"])
def test_a_shipped_program_is_what_the_graph_is_converted_to(part):
    config = ModelConfig.from_json((TINY / "hparams.json").read_bytes())
    shipped = (skeletons.SHIPPED / skeletons.file_name(part, config)).read_bytes()
    made = litert_convert.convert(part, config)
    kept = skeletons.Skeleton.unpacked(shipped[32:])  # after its checksum
    assert made.places == kept.places and made.vocabulary == kept.vocabulary
    assert made.content == kept.content
    assert skeletons.packed(made, part, config) == shipped


@pytest.mark.parametrize("visible, found", [(None, False), ("", False), ("-1", False), ("0", True)])
def test_a_gpu_is_looked_for_where_cuda_visible_devices_allows_it(monkeypatch, visible, found):
    monkeypatch.setattr(os, "listdir", lambda path: ["null", "nvidiactl"])
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.may_have_gpu() is found
    assert bool(machine.gpus()) is found


@pytest.mark.parametrize("device", ["/dev/nvidia0", "/dev/dxg", "/dev/kfd", "tensorflow-plugins"])
@pytest.mark.parametrize("visible", [None, ""])
def test_a_device_of_any_maker_may_be_a_gpu_unless_all_are_hidden(monkeypatch, device, visible):
    names = [device.removeprefix("/dev/")] if device.startswith("/dev/nvidia") else []
    monkeypatch.setattr(os, "listdir", lambda path: names)
    monkeypatch.setattr(os.path, "exists", lambda path: path == device)
    monkeypatch.setattr(os.path, "isdir", lambda path: path.endswith(device))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.may_have_gpu() is (visible is None)


@pytest.mark.parametrize(
    "gpu, installed, precision, said",
    [
        (False, True, "auto", "no GPU was found"),
        (False, False, "auto", "no GPU was found"),
        (True, True, "int8", "--precision int8 always runs there"),
        (True, False, "auto", "a GPU needs TensorFlow, which is not installed"),
        (True, True, "auto", "this TensorFlow is built without CUDA"),
    ],
)
def test_a_line_gives_the_reason_for_the_cpu(monkeypatch, gpu, installed, precision, said):
    from gpt2cli import tensorflow

    monkeypatch.setattr(machine, "gpus", lambda: ["0"] if gpu else [])
    monkeypatch.setattr(machine, "may_have_gpu", lambda: gpu)
    monkeypatch.setattr(machine, "has_tensorflow", lambda: installed)
    monkeypatch.setattr(tensorflow, "GPUS", [])
    monkeypatch.setattr(tensorflow.tf.test, "is_built_with_cuda", lambda: False)
    line = devices.describe(precision)
    assert line.startswith("LiteRT 2.3") and line.endswith(f" on CPU ({said})")
    assert devices.gpus(precision) == []
    assert devices.wastes_gpu(precision) is (gpu and not installed)


def test_a_job_says_that_a_gpu_is_not_used(cli, prompts, monkeypatch):
    monkeypatch.setattr(machine, "has_tensorflow", lambda: False)
    words = ("sample", "--prompts", "prompts.txt", "--model_name", "tiny", "--length", "3")
    for visible, name in (("0", "with"), ("", "without")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        result = cli(*words, "--format", "jsonl", "--out", f"{name}.jsonl")
        assert result.returncode == 0
        assert ("a GPU needs TensorFlow" in result.stderr) is (name == "with")


def test_loading_counts_each_weight_once(monkeypatch):
    counts = []

    class Bar:
        def __init__(self, total, unit, delay):
            self.total = total

        def __enter__(self):
            return self

        def __exit__(self, *_):
            counts.append((self.total, self.done))

        done = 0

        def update(self, number):
            self.done += number

    monkeypatch.setattr(generator, "progress", Bar)
    model = generator.load_model(TINY)
    size = 4 * sum(math.prod(shape) for shape in weight_shapes(model.config).values())
    assert counts == [(size, size)]

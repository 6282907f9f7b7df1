"""LiteRT's programs against TensorFlow's graph, and int8 against integers multiplied in NumPy."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, compiled, lively

from gpt2cli import machine, tensorflow
from gpt2cli.errors import UserError
from gpt2cli.inference import devices
from gpt2cli.inference.engines import litert_convert, litert_program
from gpt2cli.inference.engines.litert import LitertEngine
from gpt2cli.inference.engines.xla import XlaEngine
from gpt2cli.inference.generator import LanguageModel, load_model
from gpt2cli.inference.rows import Generation
from gpt2cli.model.network import GPT2
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.options import GenerateOptions
from gpt2cli.tensorflow import tf

OPENAI = ModelConfig(n_vocab=97, n_ctx=300, n_embd=48, n_head=3, n_layer=2)
GPT2_ML = ModelConfig(97, 300, 48, 3, 2, arch="gpt2_ml", n_inner=80)  # with the exact GELU
TEXT = np.random.default_rng(0).integers(97, size=300).astype(np.int32)


@pytest.fixture(scope="module", params=[OPENAI, GPT2_ML], ids=lambda config: config.arch)
def network(request):
    return lively(request.param)


@pytest.fixture(scope="module")
def ours(network):
    return compiled("lite", network)


def test_logits_and_losses_are_those_of_the_graph(network, ours):
    expected = network(TEXT[None])[0].numpy()
    np.testing.assert_allclose(ours.logits(TEXT), expected, atol=2e-4)
    inputs, targets = np.stack([TEXT[:-1], TEXT[::-1][:-1]]), np.stack([TEXT[1:], TEXT[::-1][1:]])
    weight = np.random.default_rng(1).random(inputs.shape, np.float32)
    found = ours.sums(inputs, targets, weight)
    expected = compiled("graph", network).sums(inputs, targets, weight)
    np.testing.assert_allclose(found, [float(x) for x in expected], rtol=1e-5)


def test_rows_of_any_length_are_read_together_and_go_on_alone(network, ours):
    """The caches grow on the way."""
    rows = [TEXT[:7], TEXT[50:176], TEXT[:120], TEXT[3:4]]
    logits, cache = ours.read(rows, 300)
    for at in range(8):
        position = np.array([len(row) for row in rows], np.int32)
        expected = [network(row[None])[0, -1] for row in rows]
        np.testing.assert_allclose(logits, expected, atol=2e-4)
        token = np.array([row[at] for row in (TEXT[:50],) * len(rows)], np.int32)
        rows = [np.append(row, t).astype(np.int32) for row, t in zip(rows, token, strict=True)]
        logits, cache = ours.feed(cache, token, position)


def test_two_texts_may_be_continued_in_turn(ours):
    alone = LanguageModel(ours, None)
    expected = [list(alone.generate([t], length=150, temperature=0)[0].tokens) for t in (3, 4)]
    options = GenerateOptions(length=150, temperature=0)
    streams = [alone.samples([[t]], options) for t in (3, 4)]
    rows = [alone.begin(0, [t], options, seed=1) for t in (3, 4)]
    growing = [Generation(ours, [row]) for row in rows]
    while not all(generation.is_empty() for generation in growing):
        for generation in growing:
            generation.step(7)
        alone.logits(TEXT[:20])
    assert [row.continuation for row in rows] == expected
    assert [next(stream).tokens for stream in streams] == expected


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_rows_numbers_are_the_same_whatever_its_batch(network, precision):
    """To the last bit."""
    ours = LitertEngine(network.config, lambda name, _: network.weights[name].numpy(), precision)
    rows = [TEXT[:9], TEXT[40:190], TEXT[7:8]]
    logits, cache = ours.read(rows, 200)
    alone = [ours.read([row], 200) for row in rows]
    for at in range(3):
        np.testing.assert_array_equal(logits, [one[0][0] for one in alone])
        position = np.array([len(row) + at for row in rows], np.int32)
        logits, cache = ours.feed(cache, TEXT[position], position)
        alone = [
            ours.feed(one[1], TEXT[[place]], place[None])
            for one, place in zip(alone, position, strict=True)
        ]


def eight_bits(x):
    """x [N, E] as XNNPACK sees it: each row in 255 steps from its least to its largest, with 0."""
    low, high = np.minimum(x.min(-1), 0)[:, None], np.maximum(x.max(-1), 0)[:, None]
    step = (high - low) / 255
    zero = np.rint(-128 - low / step)
    return (np.clip(np.rint(x / step) + zero, -128, 127) - zero) * step


def test_int8_multiplies_what_numpy_does(network):
    ours = LitertEngine(network.config, lambda name, _: network.weights[name].numpy(), "int8")
    x = np.random.default_rng(2).normal(0.3, 1, [5, 48]).astype(np.float32)
    numbers, scale = litert_program.quantize(network.wte.numpy())
    expected = eight_bits(x).astype(np.float64) @ (numbers * scale[:, None]).T
    np.testing.assert_allclose(ours._logits(x), expected, atol=1e-4)
    assert np.abs(x @ network.wte.numpy().T - expected).max() > 1e-3  # eight bits are not 32


def test_quantized_numbers_are_the_nearest_and_columns_of_zeros_stay():
    matrix = np.array([[0.5, -1.27, 0.3], [0, 0, 0], [1e-9, 2e-9, 127e-9]], np.float32)
    numbers, scale = litert_program.quantize(matrix)
    assert numbers.tolist() == [[50, -127, 30], [0, 0, 0], [1, 2, 127]]
    np.testing.assert_allclose(numbers * scale[:, None], matrix, rtol=1e-5)


def test_a_damaged_skeleton_on_the_disk_is_made_again(network, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compiled("lite", network).logits(TEXT[:20])
    kept = sorted((tmp_path / "gpt2cli").iterdir())
    assert len(kept) == 2
    for path in kept:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    np.testing.assert_array_equal(compiled("lite", network).logits(TEXT[:20]), first)
    monkeypatch.setattr(litert_convert, "convert", None)  # not called again
    np.testing.assert_array_equal(compiled("lite", network).logits(TEXT[:20]), first)
    for path in kept:
        path.unlink()
    (tmp_path / "gpt2cli").rmdir()
    (tmp_path / "gpt2cli").write_text("a file where the folder should be")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    np.testing.assert_array_equal(compiled("lite", network).logits(TEXT[:20]), first)


PROMPTS = """
import sys
import numpy as np
import gpt2cli

model, random = gpt2cli.load_model(sys.argv[1]), np.random.default_rng(0)


def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


for number in range(220):
    prompt = random.integers(2000, size=random.integers(1, 120)).tolist()
    model.generate([prompt] * random.integers(1, 4), length=3, batch_size=3, top_k=40)
    if number in (69, 219):
        print(resident())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_stays_flat_over_two_hundred_prompts():
    command = [sys.executable, "-c", PROMPTS, str(TINY)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    early, late = map(int, result.stdout.split())
    assert late - early < 4000  # kB


def test_int8_and_bfloat16_cost_little_on_a_real_text(cli, tmp_path):
    """The price that docs/generation.md names: half a per cent of the loss."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "docs" / "training.md").read_text(encoding="utf-8"), encoding="utf-8")
    losses = {}
    for precision in ("auto", "float32", "bfloat16", "int8"):
        words = ("evaluate", text, "--model_name", "tiny", "--models_dir", TINY.parent)
        result = cli(*words, "--precision", precision, "--format", "json")
        losses[precision] = json.loads(result.stdout)["loss"]
    assert losses["auto"] == losses["float32"]  # two models, loaded one after the other
    for precision in ("bfloat16", "int8"):
        assert losses[precision] != losses["float32"]
        assert losses[precision] == pytest.approx(losses["float32"], rel=0.005)


@pytest.mark.parametrize("home", [None, "relative", "/proc/nobody"])
def test_without_a_home_to_write_to_nothing_is_kept(tmp_path, monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home or "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home or "~"))
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(n_vocab=11, n_ctx=8, n_embd=8, n_head=2, n_layer=1)
    assert compiled("lite", lively(config)).logits(np.array([3, 4])).shape == (2, 11)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    class Full:
        def fileno(self):
            return 0

        def seek(self, place):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(litert_program, "_nameless_file", lambda: Full())
    config = ModelConfig(n_vocab=11, n_ctx=8, n_embd=8, n_head=2, n_layer=1)
    with pytest.raises(UserError, match=r"no room .*No space left on device.*XDG_CACHE_HOME"):
        compiled("lite", lively(config))


def test_ctrl_c_between_two_shapes_leaves_a_model_that_works(network, monkeypatch):
    ours = compiled("lite", network)
    ours.logits(TEXT[:9])
    expected = ours.logits(TEXT[:20])
    model = ours._layers._model
    run = model.run

    def interrupted(*tensors):
        run(*tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours.read([TEXT[:30]], 64)
    monkeypatch.undo()
    np.testing.assert_array_equal(ours.logits(TEXT[:20]), expected)


def test_threads_take_turns(network):
    plain = LanguageModel(compiled("lite", network), None)
    jobs = [dict(prompts=[[n]], length=20 + n, seed=n, nsamples=1 + n % 3) for n in range(12)]
    alone = [[s.tokens for s in plain.generate(**job)] for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda job: [s.tokens for s in plain.generate(**job)], jobs)
        assert list(found) == alone


def test_the_device_and_the_precision_choose_how_a_model_runs(monkeypatch):
    for gpus, precision, kind in (
        ([], "auto", LitertEngine),
        ([], "float32", LitertEngine),
        ([], "bfloat16", LitertEngine),
        ([], "int8", LitertEngine),
        (["a card"], "bfloat16", XlaEngine),
        (["a card"], "auto", XlaEngine),
        (["a card"], "int8", LitertEngine),
    ):
        monkeypatch.setattr(tensorflow, "GPUS", gpus)
        monkeypatch.setattr(machine, "may_have_gpu", lambda gpus=gpus: bool(gpus))
        assert type(load_model(TINY, precision).network) is kind
        if kind is LitertEngine:
            assert " on CPU (" in devices.describe(precision)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_sample_writes_in_every_precision(cli, precision):
    words = ["sample", "--model_name", "tiny", "--models_dir", TINY.parent, "--prompt", "The"]
    words += ["--length", 12, "--temperature", 0, "--format", "jsonl"]
    plain, small = (
        json.loads(cli(*words, *more).stdout)["tokens"] for more in ([], ["--precision", precision])
    )
    assert len(small) == 12 and small[:3] == plain[:3]


def test_bfloat16_on_a_cpu_is_float32_with_rounded_weights(network):
    exact = {name: variable.numpy() for name, variable in network.weights.items()}
    short = tf.bfloat16.as_numpy_dtype
    rounded = GPT2(network.config, lambda name, _: exact[name].astype(short))
    rounded = GPT2(network.config, lambda name, _: tf.cast(rounded.weights[name], tf.float32))
    ours = LitertEngine(network.config, lambda name, _: exact[name], "bfloat16").logits(TEXT[:30])
    np.testing.assert_allclose(ours, rounded(TEXT[None, :30])[0], atol=2e-4)
    assert np.abs(ours - network(TEXT[None, :30])[0]).max() > 1e-3

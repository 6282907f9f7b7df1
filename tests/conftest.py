"""Small models and vocabularies that every test can use; nothing is fetched."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# A shell that starts the tests in the background has Ctrl-C ignored, and every process below it
# inherits that; the tests that send it need it as on a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
# keeps the skeletons of skeletons.py out of the user's own cache
os.environ["XDG_CACHE_HOME"] = str(ROOT / ".pytest_cache" / "home")
SHARED = ROOT.parent / "shared"
TINY = ROOT / "models" / "tiny"

# Results of the original programs: a subset that is always here, and the full set. A test never
# skips the subset: without one of its files it fails.
GOLDEN = Path(__file__).parent / "golden"
FULL = SHARED / "golden"
FULL_DATA = SHARED / "data"
needs_full = pytest.mark.skipif(
    not (FULL.is_dir() and FULL_DATA.is_dir()),
    reason="no full set of results in ../shared; tests/golden is compared",
)
GOLDEN_MODELS = {
    "gpt2-openai": ("a-l2-h4-e16-c96", "a-l3-h3-e15-c128", "a-l12-h3-e24-c96-v601"),
    "gpt2_ml": ("a-clue-l2-h3-e24-p80", "a-bert-l3-h2-e16-p64"),
    "uer": ("a-l2-h3-e24-c128",),
}
FULL_VOCABULARIES = {
    "a-clue-l2-h3-e24-p80": "clue-vocab.txt",
    "a-bert-l3-h2-e16-p64": "google_zh_vocab.txt",
    "a-l2-h3-e24-c128": "google_zh_vocab.txt",
}


def golden_models(program):
    """Parameters: the folder of each model of a program, the first also from the subset.

    The others are slow tests.
    """
    names = GOLDEN_MODELS[program]
    subset = pytest.param(GOLDEN / program / names[0], id=f"subset-{names[0]}")
    full = [
        pytest.param(
            FULL / program / name,
            id=f"full-{name}",
            marks=needs_full if name == names[0] else [needs_full, pytest.mark.slow],
        )
        for name in names
    ]
    return [subset, *full]


def golden_vocabulary(folder):
    """The vocab.txt of a golden Chinese model."""
    if GOLDEN in folder.parents:
        return folder.parent / "vocab.txt"
    return FULL_DATA / "bert-zh" / FULL_VOCABULARIES[folder.name]


@pytest.fixture(
    scope="session",
    params=[pytest.param(GOLDEN, id="subset"), pytest.param(FULL, id="full", marks=needs_full)],
)
def results(request):
    """The folder of the original programs' results: the subset, then the full set."""
    return request.param


@pytest.fixture(scope="session")
def gpt2(results):
    """GPT-2's vocabulary; beside the subset, the tokens that its texts can need."""
    from gpt2cli.text import encoder

    return encoder.load(FULL_DATA / "gpt2" if results == FULL else GOLDEN / "bpe")


@pytest.fixture(scope="session")
def google_zh(results, tmp_path_factory):
    """BERT's Chinese vocabulary; beside the subset, the tokens that its texts can need."""
    from gpt2cli.text import encoder

    folder = tmp_path_factory.mktemp("google_zh")
    if results == FULL:
        shutil.copy(FULL_DATA / "bert-zh" / "google_zh_vocab.txt", folder / "vocab.txt")
    else:
        ids = json.loads((GOLDEN / "wordpiece" / "vocab.json").read_text(encoding="utf-8"))
        tokens = [f"[not in the subset {index}]" for index in range(max(ids.values()) + 1)]
        for token, index in ids.items():
            tokens[index] = token
        (folder / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    return encoder.load(folder)


@pytest.fixture(scope="session")
def golden():
    """The folder of the original programs' full results; without it the test is skipped."""
    if not FULL.is_dir():
        pytest.skip("needs the full set of results in ../shared/golden")
    return FULL


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """The folder with OpenAI's encoder.json and vocab.bpe; without it the test is skipped."""
    if not (FULL_DATA / "gpt2").is_dir():
        pytest.skip("needs GPT-2's whole vocabulary in ../shared/data/gpt2")
    return FULL_DATA / "gpt2"


def check_golden(network, expected):
    """Compare logits within 1e-4 and losses within 1e-5 with those of an expected.npz.

    The subset has no losses of GPT2_ML, which depend on every id of the vocabulary, but the logits
    of the next tokens that they are made of.
    """
    from gpt2cli.tensorflow import tf

    count = int(expected["n_seq"])
    assert count >= 2
    for i in range(count):
        tokens = expected[f"seq{i}_tokens"]
        logits = network(tokens[None])[0].numpy()
        if f"seq{i}_logits" in expected:
            np.testing.assert_allclose(logits, expected[f"seq{i}_logits"], atol=1e-4)
        else:
            columns = logits[:, expected["cols"]]
            np.testing.assert_allclose(columns, expected[f"seq{i}_logits_cols"], atol=1e-4)
        if f"seq{i}_target_logits" in expected:
            targets = logits[np.arange(len(tokens) - 1), tokens[1:]]
            np.testing.assert_allclose(targets, expected[f"seq{i}_target_logits"], atol=1e-4)
            if f"seq{i}_lse" not in expected:
                continue
        log_sum = tf.reduce_logsumexp(logits, -1)
        np.testing.assert_allclose(log_sum, expected[f"seq{i}_lse"], atol=1e-4)
        if len(tokens) > 1:
            nats, _ = network.losses(network.hidden(tokens[None, :-1])[0], tokens[None, 1:])
            loss = float(tf.reduce_mean(nats))
            assert loss == pytest.approx(float(expected[f"seq{i}_loss"]), abs=1e-5)


def lively(config, seed=3):
    """Weights far from their gentle initial values, so that a wrong formula shows."""
    from gpt2cli.model.network import GPT2

    noise = np.random.default_rng(seed)
    spread = {"g": (1, 0.3), "gamma": (1, 0.3), "wte": (0, 0.15), "word_embed": (0, 0.15)}
    spread |= {"wpe": (0, 0.05), "pos_embed": (0, 0.05)}

    def initial(name, shape):
        mean, deviation = spread.get(name.rsplit("/", 1)[1], (0, 0.3))
        return noise.normal(mean, deviation, shape).astype(np.float32)

    return GPT2(config, initial)


@pytest.fixture(scope="session")
def network():
    """Two layers, 32 wide, 97 tokens, a window of 24; random, lively weights."""
    from gpt2cli.model.sizes import ModelConfig

    return lively(ModelConfig(n_vocab=97, n_ctx=24, n_embd=32, n_head=4, n_layer=2))


def compiled(kind, network):
    """A GPT2 in an engine: "graph" for XLA, or "lite" for LiteRT with a copy of its weights."""
    from gpt2cli.inference.engines.litert import LitertEngine
    from gpt2cli.inference.engines.xla import XlaEngine

    if kind == "graph":
        return XlaEngine(network)
    return LitertEngine(network.config, lambda name, _: network.weights[name].numpy())


@pytest.fixture(scope="session", params=["lite", "graph"])
def either(request, network):
    """`network` in both engines."""
    return compiled(request.param, network)


@pytest.fixture(scope="session")
def plain_model(network):
    """`network` as a LanguageModel without a vocabulary."""
    from gpt2cli.inference.generator import LanguageModel

    return LanguageModel(compiled("lite", network), None)


@pytest.fixture(scope="session")
def either_model(either):
    """`either` as a LanguageModel without a vocabulary."""
    from gpt2cli.inference.generator import LanguageModel

    return LanguageModel(either, None)


@pytest.fixture(scope="session")
def tiny():
    """models/tiny as a LanguageModel, with its vocabulary."""
    import gpt2cli

    return gpt2cli.load_model(TINY)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty current folder with models/tiny in it."""
    shutil.copytree(TINY, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PROMPTS = ["The kettle", "A letter", "In the garden", "At night", "The old man"]


@pytest.fixture
def prompts(workdir):
    """The current folder, with a file of prompts."""
    (workdir / "prompts.txt").write_text("".join(f"{text}\n" for text in PROMPTS))
    return workdir


@pytest.fixture
def cli(capsys, monkeypatch, tiny):
    """Run a command line in this process; gives exit status, standard output, standard error.

    models/tiny is loaded and compiled once for all tests, which takes most of a command's time; the
    tests that start a process of their own load it as users do.
    """
    from gpt2cli.cli import main
    from gpt2cli.inference import generator

    load_model = generator.load_model

    def load_once(path, precision="auto", vocabulary=None, **more):
        prefix = getattr(path, "checkpoint", path)  # of a ModelFolder
        is_tiny = str(prefix) == str(TINY / "model.ckpt") and precision == "auto"
        return tiny if is_tiny else load_model(path, precision, vocabulary, **more)

    monkeypatch.setattr(generator, "load_model", load_once)

    def run(*words):
        status = 0
        handlers = {number: signal.getsignal(number) for number in (1, 2, 15)}
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            status = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, out, err)

    return run


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """A file system of that size, where this machine lets us make one."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no file system of our own can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def shell():
    """Run `python -m gpt2cli` as its own process, as a user would."""

    def run(*words, **options):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        return subprocess.run(
            [sys.executable, "-m", "gpt2cli", *map(str, words)],
            capture_output=True,
            env=environment,
            text="input" not in options or isinstance(options["input"], str),
            timeout=300,
            **options,
        )

    return run

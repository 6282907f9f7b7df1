"""Other programs on our files. Each lives in a virtual environment of its own; minutes, so slow."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

from gpt2cli import checkpoint, model
from gpt2cli.config import ModelConfig

SCRIPT = ROOT / "tests" / "peer_gpt_2_simple.py"


@pytest.fixture(scope="session")
def gpt_2_simple():
    """The Python of a venv with gpt-2-simple 0.8.1; GPT_2_SIMPLE_PYTHON names one that is there."""
    if os.environ.get("GPT_2_SIMPLE_PYTHON"):
        return os.environ["GPT_2_SIMPLE_PYTHON"]
    folder = ROOT / ".venv-gpt-2-simple"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        needs = ["tensorflow==2.21.0", "toposort", "tqdm", "regex", "requests"]
        subprocess.run([*pip, *needs], check=True)
        # it asks for a tensorflow below 2.16 on paper, but runs on this one
        subprocess.run([*pip, "--no-deps", "gpt-2-simple==0.8.1"], check=True)
        (folder / "ready").touch()
    return str(python)


@pytest.mark.slow
def test_gpt_2_simple_reads_our_run_and_we_go_on_from_its(gpt_2_simple, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    # it always trains on windows of 1,024 tokens, which is more than models/tiny has
    sizes = ModelConfig(n_vocab=2048, n_ctx=1024, n_embd=48, n_head=4, n_layer=3)
    folder = tmp_path / "models" / "wide"
    for name in ("encoder.json", "vocab.bpe"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((TINY / name).read_bytes())
    checkpoint.save(model.GPT2(sizes, model.random_weights(sizes)), folder)
    text = (ROOT / "README.md").read_text() + (ROOT / "gpt2cli" / "config.py").read_text()
    (tmp_path / "text.txt").write_text(text)

    flags = ("--model_name", "wide", "--sample_every", 0, "--learning_rate", 0.003)
    ours = cli("train", "text.txt", *flags, "--seq_length", 256, "--batch_size", 4, "--steps", 25)
    assert ours.returncode == 0, ours.stderr

    def peer(*words):
        result = subprocess.run(
            [gpt_2_simple, SCRIPT, *map(str, words)], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    for prompt in ("The model", "def run(config):\n    ", "gpt2cli train"):
        theirs = json.loads(peer("continue", "checkpoint", "run1", prompt, 60).split("RESULT ")[1])
        sample = cli(
            *("sample", "--run_name", "run1", "--prompt", prompt, "--length", 60),
            *("--temperature", 0, "--format", "jsonl"),
        )
        found = json.loads(sample.stdout)
        assert found["tokens"] == theirs["ids"]
        assert prompt + found["text"] == theirs["text"]

    peer("finetune", "checkpoint", "run1", "models", "wide", "text.txt", 3)
    assert (tmp_path / "checkpoint" / "run1" / "model-28.index").exists()
    again = cli("train", "text.txt", *flags, "--seq_length", 256, "--batch_size", 4, "--steps", 30)
    assert again.returncode == 0 and "[29 |" in again.stderr and "[28 |" not in again.stderr

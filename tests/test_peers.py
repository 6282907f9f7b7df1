"""Other programs on our files. Each has its own virtual environment; slow, as it takes minutes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY

import gpt2cli
from gpt2cli.model.network import GPT2, random_weights
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import checkpoint

SCRIPT = ROOT / "tests" / "peer_gpt_2_simple.py"


def python_with(name, *installs):
    """Return the Python that NAME_PYTHON names, or one of a venv made with these installs."""
    if os.environ.get(f"{name.upper()}_PYTHON"):
        return os.environ[f"{name.upper()}_PYTHON"]
    folder = ROOT / f".venv-{name.replace('_', '-')}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for words in installs:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True)
        (folder / "ready").touch()
    return str(python)


@pytest.fixture(scope="session")
def gpt_2_simple():
    """The Python of a venv with gpt-2-simple 0.8.1; GPT_2_SIMPLE_PYTHON overrides it."""
    needs = ["tensorflow==2.21.0", "toposort", "tqdm", "regex", "requests"]
    # its metadata requires TensorFlow below 2.16, but it runs on this one
    return python_with("gpt_2_simple", needs, ["--no-deps", "gpt-2-simple==0.8.1"])


@pytest.mark.slow
def test_gpt_2_simple_reads_our_run_and_we_resume_its_run(gpt_2_simple, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    # it always trains on windows of 1,024 tokens, more than models/tiny has
    sizes = ModelConfig(n_vocab=2048, n_ctx=1024, n_embd=48, n_head=4, n_layer=3)
    folder = tmp_path / "models" / "wide"
    for name in ("encoder.json", "vocab.bpe"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((TINY / name).read_bytes())
    checkpoint.save(GPT2(sizes, random_weights(sizes)), folder)
    text = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
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


@pytest.fixture(scope="session")
def transformers():
    """The Python of a venv with transformers 5.23; TRANSFORMERS_PYTHON overrides it."""
    return python_with("transformers", ["transformers==5.23.0", "torch", "safetensors"])


ENGLISH = ["Hello, world! It's 2026.", "  two spaces\n\nand\ttabs ", "naïve café 😀 你好", ""]
CHINESE = ["今天天气不错", "GPT2 模型！Hello, world.", "café ２０２４年１２月", "𠮷野家 が", ""]


@pytest.mark.slow
def test_transformers_reads_our_conversions_without_warnings_and_we_read_its_files(
    transformers, golden, gpt2_vocabulary, tmp_path, cli
):
    chinese = gpt2_vocabulary.parent / "bert-zh" / "google_zh_vocab.txt"
    cased = tmp_path / "vocabulary"
    cased.mkdir()
    (cased / "vocab.txt").write_bytes(chinese.read_bytes())
    (cased / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    jobs = []
    for name, source, vocabulary, texts in (
        ("tiny", TINY, None, ENGLISH),
        ("bpe", golden / "gpt2-openai" / "a-l2-h4-e16-c96", gpt2_vocabulary, ENGLISH),
        ("ids", golden / "gpt2-openai" / "a-l12-h3-e24-c96-v601", None, []),
        ("uer", golden / "uer" / "a-l2-h3-e24-c128", chinese, CHINESE),
        ("cased", golden / "uer" / "a-l2-h3-e24-c128", cased, CHINESE),
    ):
        flags = ("--vocab", vocabulary) if vocabulary else ()
        for words in (
            ("convert", source, tmp_path / name, *flags),
            ("convert", tmp_path / name, tmp_path / f"{name}-hf", "--to", "hf"),
        ):
            result = cli(*words)
            assert result.returncode == 0, result.stderr
        folder = str(tmp_path / name)
        job = {"folder": f"{folder}-hf", "save": f"{folder}-theirs", "texts": texts}
        jobs.append({**job, "ids": [5, 500, 77, 0, 9]})
    result = subprocess.run(
        [transformers, ROOT / "tests" / "peer_transformers.py"],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr == ""
    answers = json.loads(result.stdout)
    found = {job["folder"]: answer for job, answer in zip(jobs, answers, strict=True)}
    for job in jobs:
        answer, folder = found[job["folder"]], job["folder"].removesuffix("-hf")
        ours = gpt2cli.load_model(folder)
        np.testing.assert_allclose(ours.logits(job["ids"]), answer["logits"], atol=1e-4)
        if job["texts"]:
            assert answer["ids"] == [ours.encoder.encode(text) for text in job["texts"]]
            pad = 0 if ours.encoder.banned else None
            assert answer["special"] == [ours.encoder.start, ours.encoder.end, pad]
            assert answer["generation"] == ours.encoder.end
        else:
            assert answer["special"] == [None, None, None]
        assert cli("convert", job["save"], f"{folder}-back").returncode == 0
        back = gpt2cli.load_model(f"{folder}-back")
        np.testing.assert_array_equal(back.logits(job["ids"]), ours.logits(job["ids"]))
        if job["texts"]:
            assert answer["ids"] == [back.encoder.encode(text) for text in job["texts"]]
            assert (back.encoder.start, back.encoder.end) == (ours.encoder.start, ours.encoder.end)
    assert found[f"{tmp_path / 'cased'}-hf"]["ids"] != found[f"{tmp_path / 'uer'}-hf"]["ids"]

"""Other programs on our files. Each has its own virtual environment; slow, as it takes minutes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY
from foreign import KINDS

import gpt2cli
from gpt2cli.model.network import GPT2
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import random_weights
from gpt2cli.storage import checkpoint
from gpt2cli.storage.folders import open_folder
from gpt2cli.text import tokenizer_files

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


SIZES = dict(n_ctx=64, n_embd=32, n_head=4, n_layer=2)
PROMPTS = {
    "english": ["The kettle", " half past", "it's 1999 or", "naïve café ﬁne", "<|user|>The"],
    "chinese": ["今天天气", "hello 我们去"],
}


def hub_model(folder, make, cli, **config):
    """A Hugging Face folder with random weights and the tokenizer that `make` returns."""
    tokenizer = make()
    n_vocab = tokenizer.get_vocab_size()
    sizes = ModelConfig(n_vocab=n_vocab, **SIZES)
    weights = random_weights(sizes, seed=3)

    def peaked(name, shape):
        return weights(name, shape) * (12 if name == "model/wte" else 3)

    checkpoint.save(GPT2(sizes, peaked), folder.with_name(f"{folder.name}-made"))
    assert cli("convert", f"{folder}-made", folder, "--to", "hf").returncode == 0
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (folder / "generation_config.json").unlink()
    return n_vocab


@pytest.mark.slow
def test_the_text_generation_pipeline_continues_as_sample_does(transformers, tmp_path, cli):
    """Seventeen kinds of tokenizer; each is kept byte for byte by a conversion there and back."""
    jobs = []
    for number, (name, (make, _)) in enumerate(KINDS.items()):
        folder = tmp_path / f"m{number}"
        end = {"bert": 3, "unigram": 1}.get(name.split(",")[0], 0)
        hub_model(folder, make, cli, bos_token_id=end, eos_token_id=[end, 300])
        ours = tmp_path / f"m{number}-ours"
        assert cli("convert", folder, ours).returncode == 0
        assert cli("convert", ours, tmp_path / f"m{number}-back", "--to", "hf").returncode == 0
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / f"m{number}-back" / file).read_bytes() == (
                folder / file
            ).read_bytes()
        prompts = PROMPTS["english"] + PROMPTS["chinese"]
        jobs.append({"folder": str(folder), "prompts": prompts, "length": 24})
    compared = texts = 0
    for job, answers in zip(jobs, pipeline(transformers, jobs), strict=True):
        model = gpt2cli.load_model(f"{job['folder']}-ours")
        described = tokenizer_files.describe(open_folder(job["folder"]))
        if described.around()[1]:
            continue  # their pipeline continues after [SEP] or </s>
        compared += 1
        samples = model.generate(
            job["prompts"], length=24, temperature=0, special="token", batch_size=7
        )
        for sample, (ids, text) in zip(samples, answers, strict=True):
            is_ended = ids[-1] in model.encoder.ends
            assert sample.tokens == (ids[:-1] if is_ended else ids)
            # theirs prints an end token that is ordinary text, and leaves special tokens out
            special = set(model.encoder.added.values())
            if not special & {*sample.tokens} and not (is_ended and ids[-1] not in special):
                assert sample.text == text
                texts += 1
    assert compared >= 11 and texts > 60


@pytest.mark.slow
def test_uer_s_documented_way_continues_as_sample_does(
    transformers, gpt2_vocabulary, tmp_path, cli
):
    chinese = gpt2_vocabulary.parent / "bert-zh" / "google_zh_vocab.txt"
    sizes = ModelConfig(n_vocab=21128, **SIZES)
    weights = random_weights(sizes, seed=3)
    checkpoint.save(
        GPT2(sizes, lambda n, s: weights(n, s) * (12 if n == "model/wte" else 3)), tmp_path / "made"
    )
    assert cli("convert", tmp_path / "made", tmp_path / "ours", "--vocab", chinese).returncode == 0
    assert cli("convert", tmp_path / "ours", tmp_path / "hf", "--to", "hf").returncode == 0
    job = {"folder": str(tmp_path / "hf"), "length": 24}
    plain = {**job, "prompts": PROMPTS["chinese"]}
    typed = {**job, "prompts": [f"[CLS]{text}" for text in PROMPTS["chinese"]], "bert": True}
    model = gpt2cli.load_model(tmp_path / "ours")
    for answers, prompts in zip(
        pipeline(transformers, [plain, typed]), (plain, typed), strict=True
    ):
        samples = model.generate(prompts["prompts"], length=24, temperature=0)
        for sample, (ids, text) in zip(samples, answers, strict=True):
            assert sample.tokens == [i for i in ids if i != model.encoder.end]
            assert sample.text.replace(" ", "") == text.replace(" ", "")


def pipeline(transformers, jobs):
    """Return what transformers' text-generation pipeline makes of each job."""
    result = subprocess.run(
        [transformers, ROOT / "tests" / "peer_pipeline.py"],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)

"""gpt2cli init as a command: a model that trains, reproducible weights, rejected input."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY
from tokenizers import ByteLevelBPETokenizer, normalizers

from gpt2cli.commands.init import InitOptions, layer_sizes
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import weight_shapes
from gpt2cli.storage import checkpoint, folders, runs
from gpt2cli.text import encoder

SMALL = ("--n_layer", 2, "--n_head", 2, "--n_embd", 16, "--n_ctx", 32)
CHINESE = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n今\n天\nA\n"


@pytest.fixture
def chinese(workdir):
    """Write vocab/vocab.txt, which keeps case."""
    (workdir / "vocab").mkdir()
    (workdir / "vocab/vocab.txt").write_text(CHINESE, encoding="utf-8")
    (workdir / "vocab/tokenizer_config.json").write_text('{"do_lower_case": false}')
    return workdir / "vocab"


def weights(folder):
    return {name: v.numpy() for name, v in checkpoint.load(folder).weights.items()}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_new_model_has_sizes_vocabulary_and_random_weights(cli, workdir):
    result = cli("init", "new", "--vocab", "models/tiny", *SMALL)
    assert result.returncode == 0 and result.stdout == "", result.stderr
    folder = workdir / "models" / "new"
    assert sorted(contents(folder)) == [
        *(
            "SHA256SUMS",
            "checkpoint",
            "encoder.json",
            "hparams.json",
            "model.ckpt.data-00000-of-00001",
        ),
        *("model.ckpt.index", "vocab.bpe"),
    ]
    sizes = ModelConfig(n_vocab=2048, n_ctx=32, n_embd=16, n_head=2, n_layer=2)
    assert folders.read_config(folder) == sizes
    for name in ("encoder.json", "vocab.bpe"):
        assert (folder / name).read_bytes() == (TINY / name).read_bytes()
    n_weights = sum(np.prod(shape) for shape in weight_shapes(sizes).values())
    assert f"{n_weights:,} random parameters (seed 0), {4 * n_weights:,} bytes" in result.stderr
    assert "n_layer 2, n_head 2, n_embd 16, n_ctx 32, n_vocab 2048" in result.stderr
    assert "gpt2cli train --dataset FILE --model_name new" in result.stderr
    assert sorted(p.name for p in (workdir / "models").iterdir()) == ["new", "tiny"]


def test_weights_have_the_deviations_of_openais_initial_ones(cli, workdir):
    flags = ("--n_layer", 2, "--n_head", 2, "--n_embd", 128, "--n_ctx", 256)
    assert cli("init", "new", "--vocab", "models/tiny", *flags).returncode == 0
    found = weights(workdir / "models/new")
    assert len(found) == 2 * 12 + 4  # twelve a layer, two embeddings, the last norm's two
    for name, value in found.items():
        leaf = name.rsplit("/", 1)[1]
        if value.ndim == 1:
            assert (value == (leaf == "g")).all(), name
            continue
        expected = {"wte": 0.02, "wpe": 0.01}.get(leaf, 0.02)
        if name.endswith("c_proj/w"):
            expected /= np.sqrt(2 * 2)  # two projections a layer
        assert value.std() == pytest.approx(expected, rel=0.03), name
        assert abs(value.mean()) < 5 * expected / np.sqrt(value.size), name
    different = {value.tobytes() for value in found.values() if value.ndim > 1}
    assert len(different) == 2 + 4 * 2


def test_the_same_seed_gives_the_same_bytes(cli, workdir):
    for name, *seed in (("a",), ("b", "--seed", 0), ("c", "--seed", 7)):
        assert cli("init", name, "--vocab", "models/tiny", *SMALL, *seed).returncode == 0
    a, b, c = (contents(workdir / "models" / name) for name in "abc")
    assert a == b
    data = "model.ckpt.data-00000-of-00001"
    assert a.pop(data) != c.pop(data) and a["hparams.json"] == c["hparams.json"]


def test_train_starts_from_a_new_model(cli, workdir, chinese):
    (workdir / "text.txt").write_text("今天 A 天今\n" * 50, encoding="utf-8")
    assert cli("init", "new", "--vocab", chinese, *SMALL).returncode == 0
    result = cli(
        *("train", "text.txt", "--model_name", "new", "--steps", 1, "--sample_every", 0),
        *("--seed", 1, "--seq_length", 16),
    )
    assert result.returncode == 0, result.stderr
    loss = float(result.stderr.partition("loss=")[2].split()[0])
    assert loss == pytest.approx(np.log(7), abs=0.1)  # it knows nothing yet
    run = workdir / "checkpoint/run1"
    assert runs.steps(run) == [1]
    assert not encoder.load(run).lower_case and encoder.load(run).n_vocab == 7


@pytest.mark.parametrize(
    "name, size, wanted",
    [
        ("345M", None, (24, 16, 1024)),
        ("774M", None, (36, 20, 1280)),
        ("tiny", None, (4, 5, 160)),
        ("mine", None, (12, 12, 768)),
        ("mine", "345M", (24, 16, 1024)),
        ("345M", "tiny", (4, 5, 160)),
    ],
)
def test_the_name_of_a_size_makes_that_size(name, size, wanted):
    assert layer_sizes(InitOptions(name=name, vocab="v", size=size)) == wanted


def test_a_new_model_with_a_released_name_says_that_it_is_not_the_released_one(cli, workdir):
    result = cli("init", "345M", "--vocab", "models/tiny", *SMALL)
    assert result.returncode == 0, result.stderr
    assert "345M has random weights. For OpenAI's, use: gpt2cli download 345M" in result.stderr
    assert "n_layer 2, n_head 2, n_embd 16" in result.stderr


def test_sizes_come_from_a_preset_and_single_flags_override_them(cli, workdir):
    flags = ("--size", "tiny", "--n_layer", 1, "--n_ctx", 8, "--n_vocab", 2100)
    assert cli("init", "new", "--vocab", "models/tiny", *flags).returncode == 0
    expected = ModelConfig(n_vocab=2100, n_ctx=8, n_embd=160, n_head=5, n_layer=1)
    assert folders.read_config(workdir / "models/new") == expected
    assert encoder.of_model(workdir / "models/new").n_vocab == 2048


@pytest.mark.parametrize("given", ["folder", "vocab.txt", "any_name.txt", "config"])
def test_a_wordpiece_vocabulary_is_given_as_folder_or_file(cli, workdir, chinese, given):
    kept_case = given != "any_name.txt"  # other files beside it may not belong to it
    if given == "any_name.txt":
        (chinese / "vocab.txt").rename(chinese / given)
    if given == "config":
        (chinese / "tokenizer_config.json").unlink()
        sizes = ModelConfig(7, 8, 8, 2, 1, extra={"lower_case": False, "end_token": "今", "a": 1})
        (chinese / "hparams.json").write_text(sizes.to_json())
    path = chinese / given if given.endswith(".txt") else chinese
    assert cli("init", "new", "--vocab", path, *SMALL).returncode == 0
    new = workdir / "models/new"
    vocabulary = encoder.of_model(new)
    assert vocabulary.lower_case == (not kept_case)
    assert (new / "vocab.txt").read_text(encoding="utf-8") == CHINESE
    if given == "config":
        assert folders.read_config(new).extra == {"lower_case": False, "end_token": "今"}
        assert vocabulary.end == 4
    else:
        assert folders.read_config(new).extra == ({"lower_case": False} if kept_case else {})


def test_new_tokens_and_a_foreign_tokenizer_are_taken_over(cli, workdir):
    theirs = ByteLevelBPETokenizer(str(TINY / "encoder.json"), str(TINY / "vocab.bpe"))
    theirs.normalizer = normalizers.Lowercase()
    theirs.save(str(workdir / "tokenizer.json"))
    flags = ("--add_token", "<|user|>", "--add_token", "<|bot|>")
    result = cli("init", "new", "--vocab", workdir / "tokenizer.json", *flags, *SMALL)
    assert result.returncode == 0, result.stderr
    vocabulary = encoder.of_model(workdir / "models/new")
    assert folders.read_config(workdir / "models/new").n_vocab == 2050
    assert vocabulary.encode("<|user|>THE<|bot|>", special=True) == [
        2048,
        *vocabulary.encode("the"),
        2049,
    ]


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_one_file_of_a_bpe_stands_for_both(cli, workdir, names):
    (workdir / "bpe").mkdir()
    for source, name in zip(("encoder.json", "vocab.bpe"), names, strict=True):
        shutil.copy(TINY / source, workdir / "bpe" / name)
    for number, given in enumerate(names):
        result = cli("init", f"new{number}", "--vocab", workdir / "bpe" / given, *SMALL)
        assert result.returncode == 0, result.stderr
        assert {"encoder.json", "vocab.bpe"} < set(contents(workdir / "models" / f"new{number}"))
    (workdir / "bpe" / names[1]).unlink()
    result = cli("init", "new", "--vocab", workdir / "bpe" / names[0], *SMALL)
    assert result.returncode == 1 and f"has only {names[0]}" in result.stderr
    assert not (workdir / "models/new").exists()


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (("--n_embd", 30, "--n_head", 4), 2, "--n_embd 30 is not a multiple of --n_head 4"),
        (("--n_head", 7), 2, "--n_embd 768 is not a multiple of --n_head 7"),
        (("--n_vocab", 2047), 1, "--n_vocab 2047 is less than the 2048 tokens of models/tiny"),
        (("--vocab", "nothing"), 1, "no vocabulary at "),
        (("--vocab", "text.txt"), 1, "text.txt lacks [UNK], [CLS], [SEP]"),
        (("--vocab", "models"), 1, "/models: it needs encoder.json and vocab.bpe"),
        (("--models_dir", "text.txt"), 1, "cannot write text.txt"),
    ],
)
def test_unfit_input_is_rejected_and_leaves_nothing(cli, workdir, flags, status, message):
    (workdir / "text.txt").write_text("just\ntext\n")
    flags = flags if "--vocab" in flags else ("--vocab", "models/tiny", *flags)
    result = cli("init", "new", *flags)
    assert result.returncode == status and message in result.stderr
    assert ".part" not in result.stderr
    assert [p.name for p in (workdir / "models").iterdir()] == ["tiny"]


def test_an_existing_model_is_replaced_only_on_request(cli, workdir):
    new = workdir / "models/new"
    assert cli("init", "new", "--vocab", "models/tiny", *SMALL).returncode == 0
    (new / "notes.txt").write_text("the old model's")
    before = contents(new)
    result = cli("init", "new", "--vocab", "models/tiny", *SMALL, "--seed", 3)
    assert result.returncode == 1 and "models/new exists" in result.stderr
    assert contents(new) == before
    # the new model may keep the vocabulary of the one it replaces
    result = cli("init", "new", "--vocab", "models/new", *SMALL, "--seed", 3, "--overwrite")
    assert result.returncode == 0, result.stderr
    after = contents(new)
    assert "notes.txt" not in after and after["encoder.json"] == before["encoder.json"]
    assert after["model.ckpt.data-00000-of-00001"] != before["model.ckpt.data-00000-of-00001"]
    assert sorted(p.name for p in (workdir / "models").iterdir()) == ["new", "tiny"]


def test_an_interruption_leaves_the_old_model(cli, workdir, monkeypatch):
    assert cli("init", "new", "--vocab", "models/tiny", *SMALL).returncode == 0
    before = contents(workdir / "models/new")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write", interrupt)
    result = cli("init", "new", "--vocab", "models/tiny", *SMALL, "--overwrite")
    assert result.returncode == 130
    assert contents(workdir / "models/new") == before
    assert sorted(p.name for p in (workdir / "models").iterdir()) == ["new", "tiny"]


def test_an_interruption_between_the_two_renames_restores_the_old_model(cli, workdir, monkeypatch):
    assert cli("init", "new", "--vocab", "models/tiny", *SMALL).returncode == 0
    before = contents(workdir / "models/new")
    rename = os.rename

    def interrupted(source, target):
        if str(source).endswith(".part"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    result = cli("init", "new", "--vocab", "models/tiny", *SMALL, "--overwrite", "--seed", 3)
    assert result.returncode == 130
    assert contents(workdir / "models/new") == before
    assert sorted(p.name for p in (workdir / "models").iterdir()) == ["new", "tiny"]


def test_a_full_disk_is_reported_before_the_work(cli, workdir, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    monkeypatch.setattr(checkpoint, "save", None)
    result = cli("init", "new", "--vocab", "models/tiny", "--size", "1558M")
    assert result.returncode == 1
    # 1,557,611,200 of the release, less the embeddings of 48,209 tokens
    needed = 4 * (1_557_611_200 - 1600 * (50257 - 2048))
    assert f"cannot write models/new/model.ckpt: it needs {needed:,} bytes" in result.stderr
    assert "the disk has only 1,000,000 free" in result.stderr
    assert [p.name for p in (workdir / "models").iterdir()] == ["tiny"]


def test_hparams_are_plain_json_that_other_programs_read(cli, workdir):
    assert cli("init", "new", "--vocab", "models/tiny", *SMALL).returncode == 0
    values = json.loads((workdir / "models/new/hparams.json").read_text())
    assert values == {"n_vocab": 2048, "n_ctx": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}


@pytest.mark.parametrize("command", ["init", "export", "convert"])
def test_a_folder_that_is_no_model_is_not_replaced(cli, workdir, command):
    """Not even one with a config.json, which many programs have."""
    folder = workdir / "models" / "project"
    folder.mkdir()
    (folder / "config.json").write_text('{"name": "mine"}')
    (folder / "data.txt").write_text("mine")
    words = {
        "init": ("project", "--vocab", "models/tiny", "--n_layer", 1, "--n_head", 1, "--n_embd", 8),
        "export": ("run", folder),
        "convert": ("models/tiny", folder),
    }[command]
    shutil.copytree("models/tiny", "checkpoint/run")
    result = cli(command, *words, "--overwrite")
    assert result.returncode == 1 and "is not a model folder" in result.stderr
    assert (folder / "data.txt").read_text() == "mine"

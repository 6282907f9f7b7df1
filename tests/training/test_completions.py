"""--loss completion: the loss counts completion tokens only, compared with float64 in NumPy."""

import json
import re
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from conftest import lively

from gpt2cli.commands.train import TrainOptions
from gpt2cli.errors import UserError
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import checkpoint, folders
from gpt2cli.text import encoder, marks
from gpt2cli.training.run import Run

PAIRS = [
    {"prompt": "The kettle clicked off at half past six, ", "completion": "and a letter came."},
    {"prompt": "class A:\n", "completion": "    def run(self):\n        return 1\n"},
    {"prompt": "In the garden", "completion": " at night the old man sat, and sat, and sat."},
    {"prompt": "Why?", "completion": " No."},
]
LENGTH, ROWS = 24, 2
FLAGS = ("--model_name", "mini", "--seq_length", LENGTH, "--batch_size", ROWS, "--sample_every", 0)
FLAGS += ("--sampling", "sequential", "--learning_rate", 0.001, "--seed", 1)
LINE = re.compile(r"^\[(\d+) \| [\d.]+\] loss=([\d.]+) ", re.M)


@pytest.fixture
def mini(workdir):
    """models/mini with lively weights, its vocabulary, and the records."""
    sizes = ModelConfig(n_vocab=2048, n_ctx=64, n_embd=32, n_head=2, n_layer=1)
    checkpoint.save(lively(sizes), workdir / "models/mini")
    folders.copy_vocabulary(workdir / "models/tiny", workdir / "models/mini")
    (workdir / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return workdir


def losses(result):
    assert result.returncode == 0, result.stderr
    return {int(step): float(loss) for step, loss in LINE.findall(result.stderr)}


def expected_loss(folder, first):
    """Mean loss in nats of the completions in the windows from `first` on, in float64.

    Args:
        folder: of the weights.
        first: number of the first of the ROWS windows of LENGTH predictions.
    """
    vocabulary = encoder.load(folder)
    ids, is_learnt = [], []
    for pair in PAIRS:
        for text, learnt in ((pair["prompt"], False), (pair["completion"], True)):
            own = vocabulary.encode(text)
            ids += own
            is_learnt += [learnt] * len(own)
        ids.append(vocabulary.end)
        is_learnt.append(True)
    weights = {name: v.numpy() for name, v in checkpoint.load(folder).weights.items()}
    nats, count = 0.0, 0
    for row in range(first, first + ROWS):
        window = np.array(ids[row * LENGTH : (row + 1) * LENGTH + 1])
        scores = oracle.log_softmax(oracle.logits(weights, 2, window[:-1]))
        for place, target in enumerate(window[1:]):
            if is_learnt[row * LENGTH + 1 + place]:
                nats -= scores[place, target]
                count += 1
    assert 0 < count < ROWS * LENGTH
    return nats / count


@pytest.mark.parametrize("way", ["text", ".npz", pytest.param(".npy", marks=pytest.mark.slow)])
def test_only_completions_count_in_the_loss_also_after_resuming(cli, mini, way):
    flags = ("--loss", "completion")
    dataset = "pairs.jsonl"
    if way != "text":
        dataset = f"pairs{way}"
        result = cli("encode", "pairs.jsonl", dataset, "--model_name", "mini", *flags)
        assert "tokens count in the loss; the others are only read" in result.stderr
        flags = ()  # the file keeps what is learnt
    first = losses(cli("train", dataset, *FLAGS, *flags, "--steps", 1))
    assert first[1] == pytest.approx(expected_loss("models/mini", 0), abs=1e-4)
    second = losses(cli("train", dataset, *FLAGS, *flags, "--steps", 2))
    assert sorted(second) == [2]
    # the weights of step 1, the second two windows
    assert cli("export", "run1", "models/one", "--step", 1).returncode == 0
    assert second[2] == pytest.approx(expected_loss("models/one", ROWS), abs=1e-4)
    if way == "text":
        whole = losses(cli("train", "pairs.jsonl", *FLAGS, "--steps", 1, "--run_name", "all"))
        assert abs(whole[1] - first[1]) > 1e-2


def test_evaluate_measures_the_completions_alone(cli, mini):
    command = ("evaluate", "pairs.jsonl", "--model_name", "mini", "--format", "json")
    whole, alone = (
        json.loads(cli(*command, "--loss", loss).stdout) for loss in ("all", "completion")
    )
    vocabulary = encoder.load("models/mini")
    learnt = sum(len(vocabulary.encode(pair["completion"])) + 1 for pair in PAIRS)
    assert alone["tokens"] == learnt < whole["tokens"]
    assert alone["loss"] != pytest.approx(whole["loss"], abs=1e-3)
    ids = np.arange(1, 90, dtype=np.int32)
    np.save("first.npy", np.append(ids[:1], marks.read_only(ids[1:])))
    result = cli("evaluate", "first.npy", "--model_name", "mini")
    assert result.returncode == 1 and "no token that counts in the loss follows" in result.stderr


def test_a_step_without_a_token_to_learn_changes_nothing(cli, mini):
    """Windows 0 and 1 are outside the loss; 2 and 3 count in it."""
    ids = np.arange(1, 4 * LENGTH + 2, dtype=np.int32)
    ids[: 2 * LENGTH + 1] = marks.read_only(ids[: 2 * LENGTH + 1])
    np.save("half.npy", ids)
    result = cli("train", "half.npy", *FLAGS, "--steps", 3, "--save_every", 1)
    found = losses(result)
    assert sorted(found) == [2], result.stderr
    assert all(np.isfinite(loss) for loss in found.values())
    for step in (1, 3):
        assert f"step {step}: skipped; no token of its batch counts in the loss" in result.stderr
    before = checkpoint.load("models/mini").weights
    first = checkpoint.load("checkpoint/run1/model-1").weights
    assert all((first[name].numpy() == v.numpy()).all() for name, v in before.items())


def test_a_validation_without_a_token_to_learn_is_rejected(cli, mini):
    ids = np.arange(1, 900, dtype=np.int32)
    np.save("a.npy", ids)
    ids[:-1] = marks.read_only(ids[:-1])
    np.save("b.npy", ids)
    flags = ("--val_dataset", "b.npy", "--val_every", 1, "--val_batch_count", 1)
    result = cli("train", "a.npy", *FLAGS, "--steps", 1, *flags)
    assert result.returncode == 1
    assert "no token of the validation batches counts in the loss" in result.stderr


def test_a_fraction_of_the_documents_is_kept_for_validation(cli, mini):
    (mini / "lines.txt").write_text("".join(f"line {n} of the text\n" for n in range(40)))
    command = ("train", "lines.txt", "--lines", *FLAGS[:-2], "--val_batch_count", 2)
    command += ("--val_fraction", 0.1, "--val_every", 2)
    result = cli(*command, "--steps", 2)
    assert losses(result), result.stderr
    said = re.search(r"--val_fraction 0.1: 4 of 40 documents \(.*\), chosen by .*", result.stderr)
    assert said and result.stderr.count("validation loss=") == 2
    again = cli(*command, "--steps", 4)
    assert sorted(losses(again)) == [3, 4]
    assert said[0] in again.stderr  # the run's own seed
    command = command[:-4]
    fraction, every = ("--val_fraction", 0.1), ("--val_every", 2)
    for flags, message in (
        (
            (*fraction, *every, "--val_dataset", "lines.txt"),
            "give --val_dataset or --val_fraction, not both",
        ),
        (fraction, "add --val_every"),
        ((*every, "--val_fraction", 1), "--val_fraction must be below 1"),
        ((*every, "--val_fraction", -0.1), "--val_fraction must be at least 0"),
    ):
        result = cli(*command, *flags, "--steps", 5)
        assert result.returncode == 2 and message in result.stderr, result.stderr
    result = cli("train", "pairs.jsonl", *FLAGS, "--val_every", 2, "--steps", 1)
    assert "--val_every needs --val_dataset (a text held out of training) or" in result.stderr
    (mini / "book.txt").write_text("One document. " * 20)
    result = cli("train", "book.txt", *FLAGS, *fraction, *every, "--run_name", "b", "--steps", 1)
    assert result.returncode == 1 and "contains 1 document" in result.stderr


@pytest.mark.parametrize(
    "seed, fraction, outcome",
    [
        (None, 0.1, 5),
        (5, 0.1, 5),
        (6, 0.1, "it would validate with documents that it was trained on: leave out --seed"),
        (5, 0.2, "it may have trained on some that it now validates with"),
        (6, 0.0, 6),
    ],
)
def test_a_resumed_run_holds_out_the_same_documents(seed, fraction, outcome):
    every = 1 if fraction else 0
    options = TrainOptions(dataset="x.txt", seed=seed, val_fraction=fraction, val_every=every)
    before = {"step": 4, "seed": 5, "val_dataset": "0.1 of x.txt"}
    said = []
    try:
        found = Run.seed(SimpleNamespace(say=said.append), options, before)
    except UserError as error:
        said.append(str(error))
    assert outcome in said[0] if isinstance(outcome, str) else (found, said) == (outcome, [])

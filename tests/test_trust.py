"""Runs that are stopped, killed, damaged or out of disk space keep their promises."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small_disk

from gpt2cli.commands.train import TrainOptions
from gpt2cli.errors import UserError
from gpt2cli.inference.score import Score
from gpt2cli.model.network import GPT2
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import random_weights, weight_shapes
from gpt2cli.storage import checkpoint, folders, reading, runs
from gpt2cli.storage.held import HeldFolder
from gpt2cli.tensorflow import tf
from gpt2cli.text import encoder
from gpt2cli.text.batches import RandomWindows, Tokens
from gpt2cli.training import journal
from gpt2cli.training.step import Step, Trainer

SIZES = ModelConfig(n_vocab=2048, n_ctx=256, n_embd=32, n_head=2, n_layer=1)
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60
UNSEEDED = ("--model_name", "mini", "--seq_length", 32, "--learning_rate", 0.001)
FLAGS = (*UNSEEDED, "--seed", 7, "--sample_every", 0)


def new_network(sizes):
    return GPT2(sizes, random_weights(sizes))


@pytest.fixture
def mini(workdir):
    """Make models/mini, which has one layer, and a text."""
    return make_mini(workdir)


def make_mini(workdir):
    folder = workdir / "models" / "mini"
    folders.copy_vocabulary(folders.open_folder("models/tiny"), folder)
    checkpoint.save(new_network(SIZES), folder)
    (workdir / "text.txt").write_text(TEXT)
    return workdir


def contents(prefix):
    """Return the weights, the optimizer's tensors and the state, except its times."""
    prefix = folders.find_checkpoint(prefix)
    tensors, state = reading.load_training(prefix)
    weights = {n: v.numpy() for n, v in checkpoint.load(prefix).weights.items()}
    kept = {k: state[k] for k in ("step", "seed", "running_loss", "best", "worse")}
    return weights | tensors, kept


def read_log(run):
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]


def assert_same(one, other):
    tensors, state = contents(one)
    others, other_state = contents(other)
    assert state == other_state and tensors and tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert value.tobytes() == others[name].tobytes(), name


OPTIMIZERS = ("adam", "sgd", "adamw", "adafactor", "adafactor_gpt2_ml")
# together these combine every optimizer with every other option
SHORT = [("adafactor", "bfloat16", 1, 0.1, False)]  # adam: see the killed run below
LONG = [
    (optimizer, precision, parts, dropout, recompute)
    for optimizer in OPTIMIZERS
    for precision in ("float32", "bfloat16")
    for parts in (1, 2)
    for dropout in (0.0, 0.1)
    for recompute in (False, True)
]


def check_halves(cli, mini, optimizer, precision, parts, dropout, recompute):
    flags = [*UNSEEDED, "--optimizer", optimizer, "--precision", precision, "--dropout", dropout]
    flags += ["--accumulate_gradients", parts, f"--memory_saving_gradients={recompute}"]
    flags += ["--val_dataset", "text.txt", "--val_every", 2, "--val_batch_count", 1]
    flags += ["--sampling", "documents", "--noise", 0.1]
    flags += ["--sample_every", 3 if optimizer == "adafactor" else 0, "--sample_length", 8]
    seed = ("--seed", 7)  # a resumed run takes its own
    for name, step, more in (("whole", 6, seed), ("halves", 3, seed), ("halves", 6, ())):
        result = cli("train", "text.txt", *flags, "--run_name", name, "--steps", step, *more)
        assert result.returncode == 0, result.stderr
    assert_same("checkpoint/whole", "checkpoint/halves")
    logs = [
        [(line["step"], line.get("loss"), line.get("validation_loss")) for line in log]
        for log in (read_log(f"checkpoint/{name}") for name in ("whole", "halves"))
    ]
    assert logs[0] == logs[1]
    samples = [{p.name: p.read_text() for p in (mini / "samples").glob(f"{name}/*")}
               for name in ("whole", "halves")]  # fmt: skip
    assert samples[0] == samples[1] and len(samples[0]) == (2 if optimizer == "adafactor" else 0)
    shutil.rmtree(mini / "checkpoint")


@pytest.mark.parametrize("case", SHORT, ids=lambda case: "-".join(map(str, case)))
def test_two_halves_equal_the_whole_run_bit_for_bit(cli, mini, case):
    check_halves(cli, mini, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG, ids=lambda case: "-".join(map(str, case)))
def test_two_halves_equal_the_whole_run_with_all_options(cli, mini, case):
    check_halves(cli, mini, *case)


def test_training_resumes_from_weights_alone_on_request(cli, mini):
    assert cli("train", "text.txt", *FLAGS, "--steps", 2).returncode == 0
    more = ("--restore_from", "weights", "--optimizer", "sgd", "--steps", 3)
    result = cli("train", "text.txt", *FLAGS, *more)
    assert result.returncode == 0 and "as --restore_from weights asks" in result.stderr
    assert runs.steps("checkpoint/run1") == [2, 3] and "[3 |" in result.stderr
    fresh = cli("train", "text.txt", *FLAGS, "--run_name", "new", "--restore_from", "weights")
    assert fresh.returncode == 1 and "no checkpoint to resume" in fresh.stderr


def test_undamaged_weights_are_usable_without_the_optimizer(cli, mini):
    assert cli("train", "text.txt", *FLAGS, "--steps", 1).returncode == 0
    path = Path("checkpoint/run1/optimizer-1" + runs.SHARD)
    path.write_bytes(path.read_bytes()[:-9])
    result = cli("train", "text.txt", *FLAGS, "--steps", 2)
    assert result.returncode == 1 and "--restore_from weights" in result.stderr
    result = cli("train", "text.txt", *FLAGS, "--steps", 2, "--restore_from", "weights")
    assert result.returncode == 0, result.stderr
    path.unlink()
    assert cli("export", "run1", "models/slim", "--step", 1).returncode == 0


def test_a_failed_save_of_a_replacing_run_leaves_the_old_run(cli, mini, monkeypatch):
    assert cli("train", "text.txt", *FLAGS, "--steps", 1).returncode == 0
    before = {p.name: p.read_bytes() for p in Path("checkpoint/run1").iterdir()}
    sizes = ModelConfig(n_vocab=2048, n_ctx=64, n_embd=16, n_head=2, n_layer=1)
    folders.copy_vocabulary(folders.open_folder("models/mini"), mini / "models/other")
    checkpoint.save(new_network(sizes), mini / "models/other")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        words = ("--model_name", "other", *FLAGS[2:], "--restore_from", "fresh", "--overwrite")
        result = cli("train", "text.txt", *words, "--steps", 1)
    assert result.returncode == 1 and "no step of this run is saved" in result.stderr
    changed = {
        p.name for p in Path("checkpoint/run1").iterdir() if before.get(p.name) != p.read_bytes()
    }
    assert not [name for name in changed if not name.startswith("events")]
    assert cli("train", "text.txt", *words, "--steps", 2).returncode == 0
    assert [line["step"] for line in read_log("checkpoint/run1")] == [1, 2]


def test_a_permanent_checkpoint_that_failed_is_saved_later(cli, mini, monkeypatch):
    real, calls = checkpoint.save_run, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise UserError("cannot write")
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_run", failing)
    more = ("--save_every", 1, "--keep", 1, "--keep_every_hours", 1e-5)  # 36 ms
    assert cli("train", "text.txt", *FLAGS, "--steps", 2, *more).returncode == 0
    assert [state.get("permanent") for state in runs.states("checkpoint/run1").values()] == [True]


def test_work_that_a_stop_interrupted_is_done_when_the_run_resumes(cli, mini, monkeypatch):
    from gpt2cli.inference.generator import LanguageModel

    real, calls = LanguageModel.score, []

    def stopping(self, batches):
        calls.append(1)
        if len(calls) == 2:  # the validation of step 2, after that of step 0
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batches)

    flags = (*UNSEEDED, "--seed", 7, "--val_dataset", "text.txt", "--val_every", 2)
    flags += ("--val_batch_count", 1, "--sample_every", 2, "--sample_length", 4, "--patience", 9)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "score", stopping)
        assert cli("train", "text.txt", *flags, "--steps", 4).returncode == 143
    assert runs.states("checkpoint/run1")[2]["due"] == ["validation", "samples"]
    assert not Path("samples/run1/samples-2").exists()
    result = cli("train", "text.txt", *flags, "--steps", 3)
    assert result.returncode == 0 and Path("samples/run1/samples-2").exists()
    log = read_log("checkpoint/run1")
    assert [line["step"] for line in log if "validation_loss" in line] == [0, 2]


def test_samples_that_a_stop_interrupted_start_with_the_same_token(cli, mini, monkeypatch):
    """Without a start token they continue from a token of the step's batch."""
    from gpt2cli.inference.generator import LanguageModel

    sizes = dataclasses.replace(SIZES, extra={"start_token": None})
    folders.copy_description(mini / "models" / "mini", mini / "models" / "mini", sizes)
    flags = (*UNSEEDED, "--seed", 7, "--sample_every", 2, "--sample_length", 4, "--steps", 2)
    assert cli("train", "text.txt", *flags, "--run_name", "whole").returncode == 0

    def stopping(self, *arguments, stop, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return iter(())

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "samples", stopping)
        assert cli("train", "text.txt", *flags, "--save_every", 2).returncode == 143
    assert not Path("samples/run1/samples-2").exists()
    assert cli("train", "text.txt", *flags).returncode == 0
    made = [Path(f"samples/{name}/samples-2").read_text() for name in ("whole", "run1")]
    assert made[0] == made[1]


def test_an_export_is_a_model_folder_with_the_runs_weights(cli, mini):
    flags = (*FLAGS, "--val_dataset", "text.txt", "--val_every", 2, "--val_batch_count", 1)
    result = cli("train", "text.txt", *flags, "--steps", 4, "--keep_best", "--keep", 1)
    assert result.returncode == 0, result.stderr
    result = cli("export", "run1", "models/slim")
    assert result.returncode == 0 and "models/slim" in result.stderr
    names = {p.name for p in (mini / "models/slim").iterdir()}
    assert names == {p.name for p in (mini / "models/mini").iterdir()}
    slim, run = checkpoint.load("models/slim"), checkpoint.load("checkpoint/run1")
    assert run.weights
    for name, value in run.weights.items():
        assert slim.weights[name].numpy().tobytes() == value.numpy().tobytes()
    assert cli("sample", "--model_name", "slim", "--length", 3).returncode == 0
    result = cli("export", "run1", "models/slim")
    assert result.returncode == 1 and "exists" in result.stderr
    assert cli("export", "run1", "models/slim", "--step", "best", "--overwrite").returncode == 0
    for step, words in (("3", "It has "), ("last", "It has "), ("-1", "It has ")):
        result = cli("export", "run1", "models/new", f"--step={step}")
        assert result.returncode == 1 and words in result.stderr and result.stderr.count("\n") == 1
    result = cli("export", "run1", "checkpoint", "--overwrite")
    assert result.returncode == 1
    assert "checkpoint is or contains the source, checkpoint/run1" in result.stderr
    assert cli("export", "run1", "checkpoint/run1", "--overwrite").returncode == 1
    shutil.copytree("checkpoint/run1", "checkpoint/run2")
    other = "checkpoint/run2"
    for words in (
        *(("export", "run1", other), ("convert", "models/mini", other)),
        ("init", "run2", "--vocab", "models/tiny", "--models_dir", "checkpoint"),
    ):
        result = cli(*words, "--overwrite")
        assert result.returncode == 1 and "not a model folder" in result.stderr, words
    assert runs.steps("checkpoint/run1")


def validated(cli, losses, monkeypatch, *more):
    """Train with these validation losses, one per step from step 0; return stderr."""
    from gpt2cli.inference.generator import LanguageModel

    wanted, real = iter(losses), LanguageModel.score

    def score(self, batches):
        batches = list(batches)
        return real(self, batches) if len(batches) == 1 else Score(next(wanted), 0.5, 9)

    monkeypatch.setattr(LanguageModel, "score", score)
    flags = (*FLAGS, "--val_dataset", "text.txt", "--val_every", 1, "--val_batch_count", 2)
    result = cli("train", "text.txt", *flags, "--steps", 9, *more)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_a_run_ends_when_its_validation_loss_stops_falling(cli, mini, monkeypatch):
    losses = [5.0, 4.0, 3.0, 3.5, 3.25, 3.1]
    more = ("--patience", 3, "--keep_best", "--keep", 1)
    said = validated(cli, losses, monkeypatch, *more)
    assert (
        "no improvement in 3 validations; the validation loss was lowest at step 2, 3.0000" in said
    )
    assert runs.steps("checkpoint/run1") == [2, 5]  # the best and the last
    assert runs.best(runs.states("checkpoint/run1")) == 2
    again = validated(cli, [], monkeypatch, *more)  # it knows that it was over
    assert "no improvement in 3 validations" in again and "[6 |" not in again
    assert runs.steps("checkpoint/run1") == [2, 5]


def test_some_checkpoints_are_permanent(cli, mini, monkeypatch):
    more = ("--save_every", 1, "--keep", 1, "--keep_every_hours", 1e-9)
    assert cli("train", "text.txt", *FLAGS, "--steps", 3, *more).returncode == 0
    assert runs.steps("checkpoint/run1") == [1, 2, 3]
    assert cli("train", "text.txt", *FLAGS, "--steps", 5, *more[:-2]).returncode == 0
    assert runs.steps("checkpoint/run1") == [1, 2, 3, 5]


def test_flags_about_validation_need_val_every(cli, mini):
    for flag in (("--patience", 2), ("--keep_best",)):
        result = cli("train", "text.txt", *FLAGS, *flag)
        assert result.returncode == 2 and "add --val_every" in result.stderr


def with_bad_steps(monkeypatch, bad):
    """Make these steps return NaN and change nothing, like a real step that is skipped."""
    real = Trainer.step

    def step(self, number, *rest):
        return Step(np.nan, 0.0, np.inf) if number in bad else real(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", step)


def test_a_batch_with_a_nan_loss_is_reported_and_ends_the_run(cli, mini, monkeypatch):
    np.savez(mini / "ids.npz", np.arange(32 * 8 + 1) + 300)
    with_bad_steps(monkeypatch, {3})
    flags = (*FLAGS, "--sampling", "sequential", "--save_every", 2, "--steps", 6)
    result = cli("train", "ids.npz", *flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "step 4: the loss is nan, the gradient's norm inf" in result.stderr
    assert "ids.npz: chunk 1, tokens 96 to 129, beginning with '" in result.stderr
    assert "keeps its checkpoint of step 2" in result.stderr
    assert runs.steps("checkpoint/run1") == [2]


def test_a_batch_with_a_nan_loss_is_skipped_on_request(cli, mini, monkeypatch):
    with_bad_steps(monkeypatch, {0, 3})
    flags = (*FLAGS, "--on_nonfinite", "skip")
    result = cli("train", "text.txt", *flags, "--steps", 6)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("This step is skipped") == 2 and "[3 |" in result.stderr
    assert "[1 |" not in result.stderr and "[4 |" not in result.stderr
    with_bad_steps(monkeypatch, range(2, 1000))
    result = cli("train", "text.txt", *flags, "--run_name", "bad", "--steps", 50)
    assert result.returncode == 1 and result.stderr.count("This step is skipped") == 1 + 20


def step_of(options, network):
    tokens = Tokens([np.arange(400) % 50])
    batch = RandomWindows(tokens, 8, 1).batch(0, 2)
    trainer = Trainer(network, TrainOptions(dataset="x", **options))
    return trainer, batch, trainer.step(0, batch)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_skipped_step_changes_nothing(recompute):
    sizes = ModelConfig(n_vocab=64, n_ctx=16, n_embd=16, n_head=2, n_layer=2)
    network = new_network(sizes)
    options = {"on_nonfinite": "skip", "memory_saving_gradients": recompute}
    trainer, batch, done = step_of(options, network)
    assert done.is_finite
    before = {n: v.numpy() for n, v in {**network.weights, **trainer.state()}.items()}
    good = network.weights["model/h1/mlp/c_fc/b"].numpy()
    network.weights["model/h1/mlp/c_fc/b"].assign(good * np.nan)
    assert not trainer.step(1, batch).is_finite
    network.weights["model/h1/mlp/c_fc/b"].assign(good)
    after = {n: v.numpy() for n, v in {**network.weights, **trainer.state()}.items()}
    assert len(before) > len(network.weights) > 20
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name


def test_the_gradient_norm_is_returned():
    sizes = ModelConfig(n_vocab=64, n_ctx=16, n_embd=16, n_head=2, n_layer=2)
    norms = []
    for more in ({}, {"memory_saving_gradients": True}, {"clip_norm": 0.01}, {"optimizer": "sgd"}):
        network = new_network(sizes)
        norms.append(step_of({"learning_rate": 1.0, **more}, network)[2].norm)
    assert np.allclose(norms, norms[0], rtol=1e-5)
    # SGD with a rate of 1 moves the weights by the gradient
    first = new_network(sizes)
    moved = sum(
        float(np.square(network.weights[n].numpy() - v.numpy()).sum())
        for n, v in first.weights.items()
    )
    assert norms[0] == pytest.approx(np.sqrt(moved), rel=1e-4)


# --- killed ---


class Killed:
    """A `gpt2cli train` that is killed; `seen` is its stderr until then."""

    def __init__(self, words, cwd, wait):
        command = [sys.executable, "-m", "gpt2cli", "train", *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, text=True, stderr=subprocess.PIPE
        )
        self.seen, begun = "", threading.Event()

        def read():
            for line in process.stderr:
                self.seen += line
                if re.match(r"\[\d+ \|", line):
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(120), self.seen
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reader.join()
        self.last = max(int(step) for step in re.findall(r"^\[(\d+) \|", self.seen, re.M))


def check_kills(cli, folder, rounds, capsys):
    """Kill a run N times; nothing is lost, and the result equals that of an undisturbed run."""
    flags = (*FLAGS, "--save_every", 3, "--keep", 2, "--dropout", 0.1)
    chance = random.Random(rounds)
    for _ in range(rounds):
        killed = Killed(("text.txt", *flags, "--run_name", "killed"), folder, chance.random())
        assert "damaged" not in killed.seen and "Traceback" not in killed.seen
        step = runs.newest("checkpoint/killed") if runs.steps("checkpoint/killed") else 0
        assert step >= (killed.last - 1) // 3 * 3, "a checkpoint was lost"
        assert capsys.readouterr().err == "", "a checkpoint is damaged"
    for name in ("killed", "whole"):
        words = ("text.txt", *flags, "--run_name", name, "--steps", step + 4)
        assert cli("train", *words).returncode == 0
    assert_same("checkpoint/killed", "checkpoint/whole")
    assert not [p.name for p in (folder / "checkpoint/killed").iterdir() if ".part" in p.name]
    return step


@pytest.mark.slow
def test_a_run_survives_a_hundred_kills(cli, mini, capsys):
    step = check_kills(cli, mini, 100, capsys)
    print(f"100 kills, 0 lost, 0 unreadable, {step} steps")


# --- a full disk ---


def fill(folder, left):
    """Fill the disk except for `left` bytes; return the file that takes the space."""
    path = folder / "ballast"
    with open(path, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        file.truncate(max(0, file.tell() - left))
    return path


def test_training_continues_on_a_full_disk_and_saves_when_there_is_room(cli, mini):
    with small_disk(mini / "disk", 64) as disk:
        words = ["train", "text.txt", *FLAGS, "--save_every", 5, "--keep", 2]
        words += ["--checkpoint_dir", "disk", "--steps", 100_000]
        command = [sys.executable, "-m", "gpt2cli", *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=mini, env=environment, text=True, stderr=subprocess.PIPE
        )
        ballast, saved = None, 0
        for line in process.stderr:
            if ballast is None and line.startswith("[6 |"):
                ballast = fill(disk, 16384)
            if "Training continues" in line:
                assert "cannot write" in line and "the last checkpoint is from step" in line
                saved = max(runs.steps(disk / "run1"))
                assert saved >= 5
                ballast.unlink(missing_ok=True)  # a second save may have failed meanwhile
            if saved and (found := runs.steps(disk / "run1")) and max(found) > saved:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.communicate(timeout=120)[1]
        assert process.returncode == 143, rest
        step = runs.newest(disk / "run1")
        assert f"at step {step}" in rest
        assert runs.fault(disk / "run1", step) is None
        # a failed last save of a run is reported, and the older checkpoint stays
        fill(disk, 16384)
        words[words.index(100_000)] = step + 2
        result = cli(*words)
        assert result.returncode == 1, result.stderr
        assert f"Step {step + 2} is not saved; the last checkpoint is from step {step}" in (
            result.stderr
        )
        assert runs.newest(disk / "run1") == step
        assert not [p.name for p in (disk / "run1").iterdir() if ".part" in p.name]


def test_encode_and_a_job_on_a_full_disk_lose_nothing(cli, mini):
    with small_disk(mini / "disk", 1) as disk:
        (disk / "out.npz").write_bytes(b"old")
        noise = random.Random(1).choices("abcdefghij ", k=3_000_000)
        (mini / "long.txt").write_text("".join(noise))
        for name in ("out.npz", "out.npy"):
            result = cli("encode", "long.txt", f"disk/{name}", "--model_name", "tiny")
            assert result.returncode == 1 and "No space left" in result.stderr, result.stderr
            assert result.stderr.count("\n") == 1
        assert {p.name: p.read_bytes() for p in disk.iterdir()} == {"out.npz": b"old"}

        (mini / "prompts.txt").write_text("The kettle\n" * 300)
        words = ["sample", "--model_name", "tiny", "--prompts", "prompts.txt", "--seed", 1]
        words += ["--format", "jsonl", "--length", 4, "--out"]
        assert cli(*words, "whole.jsonl").returncode == 0
        ballast = fill(disk, 4 * 4096)
        result = cli(*words, "disk/out.jsonl")
        assert result.returncode == 1, result.stderr
        assert "rerun the same command to resume" in result.stderr
        ballast.unlink()
        assert 0 < (disk / "out.jsonl.part").read_bytes().count(b"\n") < 300
        result = cli(*words, "disk/out.jsonl")
        assert result.returncode == 0 and "samples from an earlier run" in result.stderr
        assert (disk / "out.jsonl").read_bytes() == (mini / "whole.jsonl").read_bytes()


# --- damaged ---


def used(prefix, folder):
    """Return the content of all files that commands read in a folder."""
    opened = folders.open_model(prefix)
    config, stored = reading.open_weights(opened)
    weights = {n: stored(n, s).tobytes() for n, s in weight_shapes(config).items()}
    vocabulary = encoder.of_model(folder, config.n_vocab)
    ids = vocabulary.encode("The quick brown fox, 12 kettles & née <|endoftext|>")
    return config, weights, ids, reading.load_training(opened.checkpoint)[1]


def check_flips(folder, flips, prefix, seed):
    """Flip N bits, in each file in turn; each is reported with the file's name or has no effect."""
    chance, expected = random.Random(seed), used(prefix, folder)
    paths = sorted(p for p in folder.iterdir() if p.is_file())
    found = {"reported": 0, "no effect": 0}
    for number in range(flips):
        path = paths[number % len(paths)]
        content = path.read_bytes()
        at, bit = chance.randrange(len(content)), chance.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        try:
            assert used(prefix, folder) == expected, (path.name, at, bit)
            found["no effect"] += 1
        except UserError as error:
            known = (path.name, path.name.partition(".")[0])
            assert any(name in str(error) for name in known), (path.name, at, bit, str(error))
            found["reported"] += 1
        finally:
            path.write_bytes(content)
    return found


@pytest.mark.parametrize("flips", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_reported_or_has_no_effect(cli, mini, flips):
    assert cli("train", "text.txt", *FLAGS, "--steps", 2).returncode == 0
    of_model = check_flips(mini / "models/mini", flips, "models/mini", 1)
    of_run = check_flips(mini / "checkpoint/run1", flips, "checkpoint/run1/model-2", 2)
    print(f"{flips} flips: model {of_model}, run {of_run}")
    assert of_model["reported"] > flips / 2 and of_run["reported"] > flips / 3


def test_training_resumes_from_a_checkpoint_that_was_being_written_again(cli, mini):
    assert cli("train", "text.txt", *FLAGS, "--steps", 1).returncode == 0
    runs.set_aside("checkpoint/run1", 1)  # killed before the new files had their names
    result = cli("train", "text.txt", *FLAGS, "--steps", 2)
    assert result.returncode == 0 and "[2 |" in result.stderr and "[1 |" not in result.stderr
    assert runs.steps("checkpoint/run1") == [1, 2]


def test_training_reports_a_damaged_checkpoint_and_resumes_from_the_previous_one(cli, mini):
    assert cli("train", "text.txt", *FLAGS, "--steps", 4, "--save_every", 2).returncode == 0
    path = Path("checkpoint/run1/model-4" + runs.SHARD)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    result = cli("train", "text.txt", *FLAGS, "--steps", 4)
    assert result.returncode == 0
    assert "model-4.data-00000-of-00001 is damaged" in result.stderr
    assert "using the checkpoint of step 2 instead" in result.stderr and "[3 |" in result.stderr
    assert cli("train", "text.txt", *FLAGS, "--run_name", "whole", "--steps", 4).returncode == 0
    assert_same("checkpoint/run1", "checkpoint/whole")


def test_an_event_file_that_cannot_be_written_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    def full(**_):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.raw_ops, "WriteScalarSummary", full)
    written = journal.Journal(HeldFolder(tmp_path), 0, {})
    for step in (1, 2):
        written.write(step, loss=1.0)
    written.close()
    assert capsys.readouterr().err.count("no longer written: No space left on device") == 1
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_a_damaged_log_does_not_end_a_run(cli, mini):
    assert cli("train", "text.txt", *FLAGS, "--steps", 2).returncode == 0
    log = Path("checkpoint/run1/log.jsonl")
    log.write_bytes(log.read_bytes() + b'[1]\n\xff\xfe\n{"step": 2, "los')
    assert cli("train", "text.txt", *FLAGS, "--steps", 3).returncode == 0
    assert [line["step"] for line in read_log("checkpoint/run1")] == [1, 2, 3]


# Numbers and streams that are not what they seem; for paths see test_paths.py


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "--model_name", "tiny", "--batch_size"),
        ("train", "t.txt", "--accumulate_gradients"),
        ("train", "t.txt", "--workers"),
        ("evaluate", "t.txt", "--batch_size"),
    ],
)
def test_a_count_of_twenty_digits_is_a_usage_error(cli, words):
    result = cli(*words, "9" * 20)
    assert result.returncode == 2 and "must be at most 2147483647" in result.stderr

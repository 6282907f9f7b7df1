"""`gpt2cli train` as a command: files, lines, resuming, stopping, rejected starts."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from gpt2cli import locks, machine
from gpt2cli.model import network as model
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import random_weights
from gpt2cli.storage import checkpoint, folders, runs
from gpt2cli.training import run as train_run
from gpt2cli.training import start as training_start

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60
FAST = ("--model_name", "mini", "--seq_length", 32, "--learning_rate", 0.001, "--sample_every", 0)
LINE = re.compile(r"^\[(\d+) \| [\d.]+\] loss=([\d.]+) avg=([\d.]+) acc=[\d.]+ \d+ tokens/s$", re.M)


@pytest.fixture(autouse=True)
def mini(workdir):
    """models/mini beside models/tiny: one layer, so that tracing is quick."""
    sizes = ModelConfig(n_vocab=2048, n_ctx=256, n_embd=32, n_head=2, n_layer=1)
    checkpoint.save(model.GPT2(sizes, random_weights(sizes)), workdir / "models" / "mini")
    folders.copy_vocabulary(workdir / "models" / "tiny", workdir / "models" / "mini")


@pytest.fixture
def text(workdir):
    (workdir / "text.txt").write_text(TEXT)
    return workdir / "text.txt"


def losses(result):
    return {int(step): float(loss) for step, loss, _ in LINE.findall(result.stderr)}


def weights(folder):
    return {n: v.numpy() for n, v in checkpoint.load(folder).weights.items()}


def test_a_run_leaves_everything_in_its_own_folders(cli, text):
    result = cli(
        *("train", "text.txt", *FAST[:-2], "--steps", 6, "--save_every", 2, "--keep", 2),
        *("--sample_every", 3, "--sample_length", 12, "--sample_num", 2, "--run_name", "foxes"),
        *("--val_dataset", "text.txt", "--val_every", 3, "--val_batch_count", 2, "--seed", 5),
    )
    assert result.returncode == 0, result.stderr
    found = losses(result)
    assert sorted(found) == [1, 2, 3, 4, 5, 6] and found[6] < found[1]
    assert result.stderr.count("validation loss=") == 3  # at steps 0, 3 and 6
    run = text.parent / "checkpoint" / "foxes"
    names = {re.sub(r"tfevents.*", "tfevents", p.name) for p in run.iterdir()}
    saved = {f"{kind}-{step}.{ending}" for kind in ("model", "optimizer") for step in (4, 6)
             for ending in ("index", "data-00000-of-00001")}  # fmt: skip
    assert names == saved | {
        *("checkpoint", "counter", "hparams.json", "encoder.json", "vocab.bpe", "train.json"),
        *("state-4.json", "state-6.json", "events.out.tfevents", "SHA256SUMS", "log.jsonl"),
    }
    assert (run / "counter").read_text() == "6\n"
    record = json.loads((run / "train.json").read_text())
    assert record["seed"] == 5 and record["seq_length"] == 32 and record["learning_rate"] == 0.001
    samples = sorted(p.name for p in (text.parent / "samples" / "foxes").iterdir())
    assert samples == ["samples-3", "samples-6"]
    written = (text.parent / "samples/foxes/samples-6").read_text()
    assert written.count(" SAMPLE ") == 2 and written in result.stdout
    for name in ("124M", "tiny"):  # the model that it started from is untouched
        assert not list((text.parent / "models").glob(f"{name}/model-*"))


def test_epochs_become_steps_with_a_log_line_each(cli, text):
    tokens = cli("encode", "text.txt", "t.npz", "--model_name", "tiny").stderr
    count = int(re.search(r": ([\d,]+) tokens", tokens)[1].replace(",", ""))
    steps = -(-2 * -(-(count - 1) // 32) // 3)  # two passes of windows of 32, three a step
    flags = (*FAST, "--sampling", "sequential", "--epochs", 2, "--batch_size", 3)
    schedule = ("--lr_schedule", "linear", "--warmup_steps", 2)
    result = cli("train", "t.npz", *flags, *schedule, "--seed", 1)
    assert result.returncode == 0, result.stderr
    assert sorted(losses(result)) == list(range(1, steps + 1))
    log = (text.parent / "checkpoint" / "run1" / "log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[0]["loss"] == pytest.approx(losses(result)[1], abs=1e-4)
    assert 0 <= lines[-1]["accuracy"] <= 1 and lines[-1]["learning_rate"] < 0.001
    short = cli("train", "t.npz", *flags, "--lr_schedule", "linear", "--warmup_steps", 999)
    assert short.returncode == 2 and "--warmup_steps 999" in short.stderr
    both = cli("train", "t.npz", *FAST, "--epochs", 1, "--steps", 5)
    assert both.returncode == 2 and "not both" in both.stderr


def processor(folder, monkeypatch, name, flags):
    """Pretend that this machine has another processor."""
    (folder / "cpuinfo").write_text(f"model name\t: {name}\nflags\t\t: fpu avx2 {flags}\n")
    monkeypatch.setattr(machine, "CPUINFO", folder / "cpuinfo")


def test_memory_and_advice_are_printed_before_training(cli, text, tmp_path, monkeypatch):
    processor(tmp_path, monkeypatch, "Intel(R) Core(TM) i7", "fma")
    monkeypatch.setattr(machine, "free_memory", lambda: 10**12)
    plenty = cli("train", "text.txt", *FAST, "--steps", 1)
    assert re.search(r"takes about \d+\.\d GB of memory \(.*TensorFlow 0.8\)\n", plenty.stderr)
    monkeypatch.setattr(machine, "free_memory", lambda: 10**6)
    scarce = cli("train", "text.txt", *FAST, "--steps", 2)
    assert "--optimizer adafactor" in scarce.stderr and scarce.returncode == 0
    assert "bfloat16 saves memory" not in plenty.stderr  # this is float32


@pytest.mark.parametrize(
    "name, flags, gains",
    [
        ("Intel(R) Core(TM) i7", "fma", False),
        ("Intel(R) Xeon(R) Processor", "avx512f avx512_bf16", False),
        ("Intel(R) Xeon(R) Platinum 8488C", "avx512_bf16 amx_bf16 amx_tile", True),
        ("AMD EPYC 7R13", "fma", False),
        ("AMD EPYC 9R14", "avx512f avx512_bf16", True),
    ],
)
def test_processors_that_multiply_bfloat16_faster_are_known(
    tmp_path, monkeypatch, name, flags, gains
):
    processor(tmp_path, monkeypatch, name, flags)
    assert machine.gains_by_bfloat16() is gains


def test_a_processor_without_known_instruction_sets_is_not_judged(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    for name in ("cpuinfo", "missing"):
        monkeypatch.setattr(machine, "CPUINFO", tmp_path / name)
        assert machine.gains_by_bfloat16() is None


def test_train_says_where_bfloat16_is_no_faster(cli, text, tmp_path, monkeypatch):
    warning = "bfloat16 saves memory, but is no faster than float32 on this processor"
    monkeypatch.setattr(train_run, "GPUS", [])
    processor(tmp_path, monkeypatch, "Intel(R) Core(TM) i7", "fma")
    slow = cli("train", "text.txt", *FAST, "--steps", 1, "--precision", "bfloat16")
    assert slow.returncode == 0 and slow.stderr.count(warning) == 1
    monkeypatch.setattr(train_run, "GPUS", ["a GPU"])
    gpu = cli("train", "text.txt", *FAST, "--steps", 2, "--precision", "bfloat16")
    assert gpu.returncode == 0 and warning not in gpu.stderr


def test_latest_resumes_and_a_finished_run_reports_it(cli, text):
    cli("train", "text.txt", *FAST, "--steps", 2)
    again = cli("train", "text.txt", *FAST, "--steps", 2)
    assert again.returncode == 0 and "nothing to do" in again.stderr and not losses(again)
    more = cli("train", "text.txt", *FAST, "--steps", 3)
    assert sorted(losses(more)) == [3]


def test_other_starts_replace_a_run_only_with_overwrite(cli, text):
    cli("train", "text.txt", *FAST, "--steps", 3)
    run = text.parent / "checkpoint" / "run1"
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    for source in ("fresh", "models/tiny"):
        result = cli("train", "text.txt", *FAST, "--steps", 1, "--restore_from", source)
        assert result.returncode == 1 and "--overwrite" in result.stderr
    assert before == {p.name: p.read_bytes() for p in run.iterdir()}
    result = cli("train", "text.txt", *FAST, "--steps", 1, "--restore_from", "fresh", "--overwrite")
    assert result.returncode == 0 and runs.steps(run) == [1]


def test_a_run_starts_from_another_runs_weights_or_an_older_step(cli, text):
    cli("train", "text.txt", *FAST, "--steps", 3, "--save_every", 1, "--run_name", "a", "--seed", 1)
    result = cli(
        *("train", "text.txt", *FAST, "--steps", 1, "--run_name", "b"),
        *("--restore_from", "checkpoint/a/model-3"),
    )
    assert result.returncode == 0 and sorted(losses(result)) == [1]
    older = cli(
        *("train", "text.txt", *FAST, "--steps", 3, "--run_name", "a"),
        *("--restore_from", "checkpoint/a/model-2"),
    )
    assert sorted(losses(older)) == [3]


def test_a_run_of_nshepperds_program_resumes(cli, text, network):
    """Its folder has model-<step>.*, checkpoint and counter; no optimizer or hparams.json."""
    run = text.parent / "checkpoint" / "old"
    checkpoint.write(run / "model-7", checkpoint.load("models/mini").weights)
    (run / "checkpoint").write_text('model_checkpoint_path: "model-7"\n')
    (run / "counter").write_text("7\n")
    result = cli("train", "text.txt", *FAST, "--steps", 8, "--run_name", "old")
    assert result.returncode == 0 and sorted(losses(result)) == [8], result.stderr
    assert "the optimizer starts from scratch" in result.stderr


def test_a_replaced_run_takes_the_sizes_and_vocabulary_of_its_new_model(cli, text):
    cli("train", "text.txt", *FAST, "--steps", 3)
    sizes = ModelConfig(n_vocab=2100, n_ctx=40, n_embd=16, n_head=2, n_layer=1)
    checkpoint.save(model.GPT2(sizes, random_weights(sizes)), "models/small")
    run, flags = text.parent / "checkpoint" / "run1", ("--restore_from", "fresh", "--overwrite")
    np.savez("ids.npz", np.arange(90))
    bad = ("--model_name", "small", "--sample_every", 0, "--optimizer", "sgd", *flags)
    result = cli("train", "ids.npz", *bad, "--steps", 3, "--learning_rate", 1e30)
    assert result.returncode == 1 and "diverged" in result.stderr
    assert checkpoint.load(run).config.n_vocab == 2048  # the old run is still whole
    result = cli("train", "ids.npz", *bad, "--steps", 3)
    assert result.returncode == 0, result.stderr
    assert checkpoint.load(run).config == sizes and runs.steps(run) == [3]
    assert not (run / "encoder.json").exists()


def test_weights_that_have_diverged_are_never_saved(cli, text):
    """A step measures its loss before the update; only the next step shows the harm."""
    cli("train", "text.txt", *FAST, "--steps", 2)
    wild = ("--learning_rate", 1e30, "--save_every", 1, "--keep", 1)
    result = cli("train", "text.txt", "--seq_length", 32, "--sample_every", 0, *wild, "--steps", 3)
    assert result.returncode == 1 and "diverged" in result.stderr and "step 2" in result.stderr
    assert runs.steps("checkpoint/run1") == [2]


def test_samples_that_cannot_be_written_do_not_end_a_run(cli, text, monkeypatch):
    def block(*arguments):  # after the paths were looked at
        (text.parent / "blocked").write_text("a file where a folder should be")

    real = training_start.texts
    monkeypatch.setattr(training_start, "texts", lambda *given: block() or real(*given))
    flags = ("--sample_every", 1, "--sample_length", 3, "--sample_dir", "blocked")
    result = cli("train", "text.txt", *FAST[:-2], *flags, "--steps", 2)
    assert result.returncode == 0 and "cannot write" in result.stderr
    assert runs.steps("checkpoint/run1") == [2]


def test_a_run_has_one_writer(cli, text):
    with locks.filling("checkpoint/run1", "train"):
        result = cli("train", "text.txt", *FAST, "--steps", 1)
    assert result.returncode == 75 and "another gpt2cli train is writing" in result.stderr
    assert re.search(rf"\(process {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d ", result.stderr)
    # the lock of a dead process does not count
    (text.parent / "checkpoint/run1").mkdir(parents=True)
    (text.parent / "checkpoint/run1/.lock").write_text("process 1 on elsewhere since yesterday")
    assert cli("train", "text.txt", *FAST, "--steps", 1).returncode == 0
    assert not (text.parent / "checkpoint/run1/.lock").exists()


def test_all_flags_combine(cli, text):
    result = cli(
        *("train", "text.txt", *FAST, "--steps", 4, "--batch_size", 2, "--accumulate_gradients", 3),
        *("--memory_saving_gradients", "--only_train_transformer_layers", "--optimizer", "adamw"),
        *("--noise", 0.1, "--warmup_steps", 1, "--lr_schedule", "cosine", "--clip_norm", 1),
        *("--precision", "bfloat16", "--combine", 100),
    )
    assert result.returncode == 0, result.stderr
    assert "6 x 32" in result.stderr and len(losses(result)) == 4


def test_a_text_shorter_than_a_window_is_padded_and_masked(cli, workdir):
    (workdir / "short.txt").write_text("To be, or not to be.")
    result = cli("train", "short.txt", *FAST, "--seq_length", 0, "--steps", 8)
    result = cli("train", "short.txt", "--model_name", "tiny", "--steps", 8, "--sample_every", 0)
    assert result.returncode == 0 and losses(result)[8] < losses(result)[1]


def start(*words, cwd):
    command = [sys.executable, "-m", "gpt2cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=-1, stderr=subprocess.PIPE
    )
    seen = ""
    while "[3 |" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_run_and_leaves_with_its_status(cli, text, number, status):
    process = start("train", "text.txt", *FAST, cwd=text.parent)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert "Traceback" not in err
    (step,) = runs.steps(text.parent / "checkpoint" / "run1")
    assert step >= 3 and f"at step {step}" in err
    assert sorted(losses(cli("train", "text.txt", *FAST, "--steps", step + 1))) == [step + 1]


def test_a_signal_breaks_off_a_long_sample(text):
    """docker stop waits ten seconds; a sample of 20,000 tokens takes longer."""
    long = ("--sample_every", 4, "--sample_length", 20000)
    # models/mini would soon draw the end token
    flags = ("--model_name", "tiny", *FAST[2:-2], *long)
    process = start("train", "text.txt", *flags, cwd=text.parent)
    log = text.parent / "checkpoint/run1/log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 4):
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    (step,) = runs.steps(text.parent / "checkpoint" / "run1")
    assert not (text.parent / f"samples/run1/samples-{step}").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(cli, text):
    cli("train", "text.txt", *FAST, "--steps", 2)
    before = folders.find_checkpoint("checkpoint/run1")
    result = cli("train", "text.txt", "--model_name", "tiny", "--seq_length", 32, "--sample_every",
                 0, "--learning_rate", 1e30, "--steps", 20)  # fmt: skip
    assert result.returncode == 1 and "diverged" in result.stderr
    assert folders.find_checkpoint("checkpoint/run1") == before
    assert all(np.isfinite(v).all() for v in weights("checkpoint/run1").values())


BAD_DATA = {
    "missing.txt": None,
    "empty.txt": b"",
    "binary.txt": b"MZ\x00\x01\x02" * 100,
    "latin1.txt": "café".encode("latin-1") * 50,
    "one.npz": b"PK\x03\x04 not really",
    "emptyfolder/": None,
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_named_before_anything_is_written(cli, workdir, name):
    if name.endswith("/"):
        (workdir / name).mkdir()
    elif BAD_DATA[name] is not None:
        (workdir / name).write_bytes(BAD_DATA[name])
    result = cli("train", name, *FAST, "--steps", 1)
    assert result.returncode == 1 and name.strip("/") in result.stderr
    assert result.stderr.count("\n") == 1 and not (workdir / "checkpoint").exists()


def test_ids_of_another_vocabulary_are_rejected(cli, workdir):
    np.savez("other.npz", np.arange(3000))
    result = cli("train", "other.npz", *FAST, "--steps", 1)
    assert result.returncode == 1 and "0 to 2047" in result.stderr


def test_training_from_python(text):
    import gpt2cli

    run = gpt2cli.train(
        dataset="text.txt", model_name="tiny", seq_length=32, steps=2, sample_every=0, run_name="py"
    )
    assert run.name == "py" and gpt2cli.load_model(run).config.n_vocab == 2048
    with pytest.raises(gpt2cli.errors.UsageError, match="learning_rat"):
        gpt2cli.train(dataset="text.txt", learning_rat=1)

"""A failing disk, a wrong clock, a kill at a bad moment, another version, and changed flags.

The library of faults.c makes the calls of Python and of TensorFlow fail; it needs a C compiler.
"""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import time
import types
from pathlib import Path

import pytest
from conftest import TINY, small_disk
from faulty import Faulty
from test_trust import FLAGS, TEXT, assert_same, fill, make_mini, read_log

from gpt2cli import __version__
from gpt2cli.commands.train import TrainOptions
from gpt2cli.errors import NewerFormatError
from gpt2cli.remote import manifest, transfer
from gpt2cli.storage import checkpoint, runs
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.storage.held import HeldFolder
from gpt2cli.tensorflow import tf
from gpt2cli.training import journal
from gpt2cli.training.saves import Checkpoints
from gpt2cli.training.state import Plan, State, changes

KINDS = ("open", "write", "flush", "sync", "close", "rename", "unlink")


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """Run commands with faults, or without where there is no C compiler."""
    compiler, library = shutil.which("cc"), None
    if compiler:
        library = tmp_path_factory.mktemp("faults") / "faults.so"
        source = Path(__file__).with_name("faults.c")
        words = [compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
        subprocess.run(words, check=True)
    server = Faulty(library)
    yield server
    server.close()


@pytest.fixture
def faulty(forked):
    """Run commands with faults."""
    if forked.library is None:
        pytest.skip("no C compiler (cc) for faults.c")
    return forked


def assert_one_line(result):
    """The command failed, and its last line is the only message about it."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("gpt2cli: ") == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith("gpt2cli: cannot "), result.stderr


@pytest.fixture
def mini(workdir):
    """Make models/mini, which has one layer, and a text."""
    return make_mini(workdir)


# --- training ---

TRAIN = (
    *("train", "text.txt", *FLAGS, "--save_every", 1, "--keep", 1, "--keep_best"),
    *("--dropout", 0.1),
    *("--val_dataset", "text.txt", "--val_every", 2, "--val_batch_count", 1),
)


def outcome(name):
    """Return the log of a run, without times, and the names of its files but TensorBoard's."""
    folder = Path("checkpoint", name)
    log = [
        (line["step"], line.get("loss"), line.get("validation_loss")) for line in read_log(folder)
    ]
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("events"))
    return log, names


def check_run(faulty, name, steps):
    """Check that a run is usable after a fault, and resumes to the result of a run without one."""
    result = faulty("sample", "--run_name", name, "--length", 2, "--seed", 1)
    assert result.returncode == 0 and "damaged" not in result.stderr, result.stderr
    result = faulty(*TRAIN, "--run_name", name, "--steps", steps)
    assert result.returncode == 0 and "damaged" not in result.stderr, result.stderr
    assert_same(f"checkpoint/{name}", "checkpoint/whole")


@pytest.fixture
def trained(faulty, mini):
    """A run of 2 steps named base, and one of 5 named whole."""
    for name, steps in (("base", 2), ("whole", 5)):
        result = faulty(*TRAIN, "--run_name", name, "--steps", steps)
        assert result.returncode == 0, result.stderr
    return mini


def restart():
    """Make the run `hit` a copy of base."""
    shutil.rmtree("checkpoint/hit", ignore_errors=True)
    shutil.copytree("checkpoint/base", "checkpoint/hit")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with models/mini, models/tiny and a text."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(TINY, folder / "models" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_mini(folder)
    return folder


SHORT = ("train", "text.txt", *FLAGS, "--save_every", 1, "--steps", 3, "--run_name")


@pytest.fixture(scope="session")
def three_steps(forked, place):
    """The folder of `place`, with a run of 3 steps named whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        result = forked(*SHORT, "whole")
        assert result.returncode == 0, result.stderr
    return place


def test_a_run_that_is_killed_at_a_rename_on_a_full_disk_resumes(
    forked, three_steps, monkeypatch, capsys
):
    """Its stderr is closed too. Without a C compiler it is killed at any moment."""
    monkeypatch.chdir(three_steps)
    faults = {"under": three_steps / "checkpoint", "room": 1_500_000, "kill": "rename"}
    more = {"kill_at": 26} if forked.library else {"after": 2}
    killed = forked(*SHORT, "hit", closed=[2], **faults, **more)
    assert killed.returncode == -9
    if forked.library:  # killed after the last file of the first checkpoint has its name
        assert runs.newest("checkpoint/hit") == 1 and Path("checkpoint/hit/.lock").exists()
    result = forked(*SHORT, "hit")
    assert result.returncode == 0 and "damaged" not in result.stderr, result.stderr
    assert_same("checkpoint/hit", "checkpoint/whole")
    assert outcome("hit") == outcome("whole") and capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("room", [None, 0, 900_000, 1_400_000])
def test_a_run_that_is_killed_at_any_call_resumes(faulty, trained, room):
    """With room for no checkpoint, half of one, or one of the two; or for all."""
    kinds = ",".join(KINDS) if room is None else "rename"
    more = {} if room is None else {"room": room}
    place, status = 1, -9
    while status == -9:
        restart()
        words = (*TRAIN, "--run_name", "hit", "--steps", 4)
        result = faulty(*words, under=trained, kill=kinds, kill_at=place, **more)
        status = result.returncode
        assert "Traceback" not in result.stderr
        check_run(faulty, "hit", 5)
        assert outcome("hit") == outcome("whole")
        place += 5 if room is None else 3
    print(f"killed at {place} places with room for {room}: 0 lost")
    assert place > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_training_continues_when_a_call_fails(faulty, trained, kind, number):
    failures, at = 0, 1
    while at < 120:
        restart()
        words = (*TRAIN, "--run_name", "hit", "--steps", 4)
        result = faulty(*words, under=trained, fail=kind, errno=number, at=at, times=1)
        assert "Traceback" not in result.stderr, result.stderr
        assert result.returncode in (0, 1), result.stderr
        failures += os.strerror(number) in result.stderr
        check_run(faulty, "hit", 5)
        at += 1 if at < 8 else 7
    print(f"{kind}: {failures} failures reported")
    assert failures


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_does_not_stop_training(faulty, mini):
    words = ("train", "text.txt", *FLAGS, "--save_every", 1, "--steps", 3, "--run_name", "hit")
    faults = {"under": mini / "checkpoint", "fail": "open,rename,unlink", "errno": errno.EROFS}
    result = faulty(*words, **faults, at=30)  # among the renames of the first checkpoint
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "[3 |" in result.stderr and "Make the disk writable" in result.stderr
    assert "Step 3 is not saved; " in result.stderr


@pytest.mark.slow
def test_a_hundred_kills_without_stderr_on_a_disk_of_64_megabytes_lose_nothing(
    faulty, mini, capsys
):
    chance, before = random.Random(100), 0
    words = ["train", "text.txt", *FLAGS, "--save_every", 3, "--keep", 2, "--dropout", 0.1]
    words += ["--checkpoint_dir", "disk"]
    with small_disk(mini / "disk", 64) as disk:
        for _ in range(100):
            ballast = fill(disk, chance.choice([0, 10_000, 500_000, 1_500_000, 3_000_000, 2**26]))
            moment = {"kill": ",".join(KINDS), "kill_at": chance.randrange(1, 500)}
            result = faulty(*words, closed=[2], under=disk, **moment)
            assert result.returncode == -9
            ballast.unlink()
            if runs.steps(disk / "run1"):
                step = runs.newest(disk / "run1")
                assert step >= before, "a checkpoint was lost"
                before = step
            assert capsys.readouterr().err == "", "a checkpoint is damaged"
        for folder in ("disk", "checkpoint"):
            words[-1] = folder
            result = faulty(*words, "--steps", before + 4)
            assert result.returncode == 0, result.stderr
        assert_same("disk/run1", "checkpoint/run1")
        assert not [path.name for path in (disk / "run1").iterdir() if ".part" in path.name]
    print(f"100 kills, 0 lost, {before} steps")


def test_an_event_file_that_cannot_be_created_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    def full(folder, **options):
        message = f"{{{{node x}}}} {folder}/events; No space left on device\nmore [Op:X]"
        raise tf.errors.ResourceExhaustedError(None, None, message)

    monkeypatch.setattr(tf.summary, "create_file_writer", full)
    written = journal.Journal(HeldFolder(tmp_path), 0, {})
    written.write(1, loss=1.0)
    written.close()
    reason = "TensorBoard events are no longer written: No space left on device\n"
    assert capsys.readouterr().err == reason
    assert [line["step"] for line in read_log(tmp_path)] == [1]


def test_lines_of_the_log_that_are_lost_are_reported(tmp_path, capsys):
    written = journal.Journal(HeldFolder(tmp_path), 0, {})
    written.write(1, loss=1.0)
    (tmp_path / "log.jsonl").rename(tmp_path / "log")
    (tmp_path / "log.jsonl").mkdir()
    written.write(2, loss=1.0)
    written.close()
    assert "log.jsonl lacks the lines after step 1" in capsys.readouterr().err


def test_permanent_checkpoints_continue_after_the_clock_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    saves = Checkpoints(HeldFolder(tmp_path / "run"), ModelFolder(tmp_path / "run"), 0, True)
    plan = types.SimpleNamespace(
        options=types.SimpleNamespace(keep_every_hours=1, keep=1, keep_best=False),
        given=types.SimpleNamespace(),
    )
    state, permanent = State(0, "a", [0.0, 0.0], None, 0, [], 0.0), []
    monkeypatch.setattr(
        State, "record", lambda self, plan: {"step": self.step, "kept_at": self.kept_at}
    )
    monkeypatch.setattr(
        checkpoint, "save_run", lambda *given: permanent.append(given[3].get("permanent", False))
    )
    monkeypatch.setattr(runs, "prune", lambda *_: [1])
    monkeypatch.setattr(checkpoint, "name_newest", lambda *_: None)
    monkeypatch.setattr("gpt2cli.training.saves.dataclasses.asdict", lambda _: {})
    log = types.SimpleNamespace(path=tmp_path / "log.jsonl", release=lambda: None)
    trainer = types.SimpleNamespace(model=None, state=dict)
    hour = 3600
    # from 1970 to today, to 2099, back to today, and on
    for now in (0, 500_000 * hour, 1_140_000 * hour, 500_001 * hour, 500_003 * hour):
        monkeypatch.setattr(time, "time", lambda now=now: float(now))
        state.step += 1
        saves.write(plan, state, trainer, log)
    assert permanent == [False, True, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("hours", ["until 1970", -5, 73 * 365 * 24])
def test_a_wrong_clock_changes_no_result(faulty, trained, hours):
    clock = -int(time.time()) if hours == "until 1970" else hours * 3600
    restart()
    for steps, offset in ((3, clock), (4, 0), (5, clock)):
        words = (*TRAIN, "--run_name", "hit", "--steps", steps, "--keep_every_hours", 1)
        result = faulty(*words, clock=offset)
        assert result.returncode == 0, result.stderr
        assert runs.newest("checkpoint/hit") == steps
    assert_same("checkpoint/hit", "checkpoint/whole")
    assert outcome("hit")[0] == outcome("whole")[0]


# --- other writers ---

JOB = ("sample", "--model_name", "tiny", "--prompts", "prompts.txt", "--length", 3, "--seed", 1)
SIZES = ("--n_layer", 1, "--n_head", 1, "--n_embd", 8, "--n_ctx", 16)
WRITERS = {
    "npz": ("encode", "text.txt", "out/new.npz", "--model_name", "tiny"),
    "npy": ("encode", "text.txt", "out/new.npy", "--model_name", "tiny"),
    "text": ("sample", "--model_name", "tiny", "--length", 3, "--seed", 1, "--out", "out/new"),
    "job": (*JOB, "--format", "jsonl", "--out", "out/new"),
    "processes": (*JOB, "--format", "jsonl", "--out", "out/new", "--processes", 2),
    "convert": ("convert", "models/tiny", "out/new", "--overwrite"),
    "hf": ("convert", "models/tiny", "out/new", "--to", "hf", "--overwrite"),
    "init": ("init", "new", "--vocab", "models/tiny", "--models_dir", "out", *SIZES, "--overwrite"),
    "vocab": ("vocab", "text.txt", "out/new", "--size", 300, "--overwrite"),
}


def content(folder):
    """Return the files in a folder and below, by name."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def writing(workdir):
    """A text, prompts, and a folder named out."""
    Path("text.txt").write_text(TEXT[:3000])
    Path("prompts.txt").write_text("The kettle\nA letter\nAt night\n")
    Path("out").mkdir()
    return workdir


def check_writer(faulty, words, faults):
    """Check that after a fault a writer leaves its old or new output, and next time succeeds."""
    assert faulty(*words).returncode == 0
    new = content("out")
    assert new
    hit = 0
    for fault in faults:
        shutil.rmtree("out")
        Path("out").mkdir()
        under = Path("out").absolute()
        result = faulty(*words, under=under, **fault)
        assert "Traceback" not in result.stderr, (fault, result.stderr)
        made = {name: data for name, data in content("out").items() if name in new}
        assert made in ({}, new), (fault, result.stderr)
        if result.returncode == 1:
            hit += 1
            assert_one_line(result) if words[0] != "sample" else None
            others = set(content("out")) - set(new)
            assert all(name.startswith("new.") and "part" in name for name in others), others
            assert not others or words[0] == "sample", (fault, others)
        result = faulty(*words)
        assert result.returncode == 0, (fault, result.stderr)
        made = {name: data for name, data in content("out").items() if name in new}
        assert made == new, fault
    return hit


SOME = [{"fail": "rename", "errno": errno.EACCES}, {"room": 100, "kill": "write", "kill_at": 2}]
ALL = [
    *({"fail": kind, "errno": errno.EIO, "at": n} for kind in KINDS for n in (1, 2, 3, 5, 9, 14)),
    *({"room": n} for n in (0, 100, 1000, 20_000, 100_000)),
    *({"most": n} for n in (100, 1000, 20_000, 100_000)),
    *({"kill": ",".join(KINDS), "kill_at": n} for n in (1, 2, 3, 4, 6, 8, 11, 15, 20, 30)),
    *({"room": 1000, "kill": "rename", "kill_at": n} for n in range(1, 9)),
    *({"clock": n} for n in (-int(time.time()), 73 * 365 * 86400)),
]


def test_a_fault_leaves_the_old_output_or_the_new_one(faulty, writing):
    assert check_writer(faulty, WRITERS["npz"], SOME) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_every_fault_leaves_the_old_output_or_the_new_one(faulty, writing, name):
    print(f"{name}: {check_writer(faulty, WRITERS[name], ALL)} of {len(ALL)} faults end it")


def test_the_advice_fits_the_fault(faulty, writing):
    for fault, advice in (
        ({"room": 10}, "No space left on device. Free some space"),
        ({"fail": "sync"}, "Input/output error. Check the disk"),
        ({"most": 100}, "File too large. Raise the limit on the size of a file (ulimit -f)"),
    ):
        result = faulty(*WRITERS["npz"], under=Path("out").absolute(), **fault)
        assert_one_line(result)
        assert f"cannot write out/new.npz: {advice}" in result.stderr


@pytest.mark.slow
def test_files_that_cannot_be_read_are_reported_in_one_line(faulty, writing):
    messages = set()
    for words in (*WRITERS.values(), ("evaluate", "text.txt", "--model_name", "tiny")):
        for at in (1, 2, 3, 5, 8, 12, 20, 30, 45, 60):
            result = faulty(*words, under=writing.absolute(), fail="read", at=at)
            assert "Traceback" not in result.stderr, (words, at)
            if result.returncode == 1:
                assert result.stderr.count("gpt2cli: ") == 1, result.stderr
                messages.add(result.stderr.splitlines()[-1])
    assert len(messages) > 10 and all("nput/output error" in line for line in messages)


# --- another version ---


def newer(path):
    """Make a JSON file one of a later version; seal a state again."""
    record = json.loads(path.read_text()) | {"format": 7, "gpt2cli": "9.8.7", "unknown": [1]}
    if record.pop("sha256", None):
        text = json.dumps(record, sort_keys=True)
        record["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(record))


def assert_names_both(text):
    assert "has format 7 and was written by gpt2cli 9.8.7" in text
    assert f"This is gpt2cli {__version__}, which reads formats up to 1" in text


@pytest.fixture
def run1(three_steps, monkeypatch):
    """Copy the run of 3 steps to checkpoint/run1."""
    monkeypatch.chdir(three_steps)
    shutil.rmtree("checkpoint/run1", ignore_errors=True)
    shutil.copytree("checkpoint/whole", "checkpoint/run1")


def test_a_run_of_a_later_version_is_rejected_and_unchanged(cli, run1):
    words = ("train", "text.txt", *FLAGS)
    newer(Path("checkpoint/run1/state-3.json"))
    before = content("checkpoint/run1")
    fresh = ("--restore_from", "fresh", "--overwrite")
    for more in ((), ("--restore_from", "weights"), fresh):
        result = cli(*words, "--steps", 4, *more)
        assert result.returncode == 1 and result.stderr.count("\n") == 1
        assert_names_both(result.stderr)
    assert content("checkpoint/run1") == before
    assert cli("export", "run1", "models/e").returncode == 1
    result = cli("export", "run1", "models/e", "--step", 2)
    assert result.returncode == 0, result.stderr


def test_a_run_of_an_earlier_version_resumes(cli, run1):
    path = Path("checkpoint/run1/state-3.json")
    state = json.loads(path.read_text())
    for key in ("format", "gpt2cli", "flags", "sha256"):
        del state[key]
    text = json.dumps(state, sort_keys=True)
    state["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(state))
    result = cli("train", "text.txt", *FLAGS, "--batch_size", 2, "--steps", 3)
    assert result.returncode == 0 and "nothing to do" in result.stderr
    assert "state-3.json" not in result.stderr


def test_a_job_of_a_later_version_is_rejected_and_unchanged(faulty, cli, writing):
    words = (*WRITERS["job"], "--batch_size", 1)
    faulty(*words, under=writing / "out", fail="write", at=6)  # the lock, the note, a line
    newer(Path("out/new.part.json"))
    before = content("out")
    assert before["new.part"]
    result = cli(*words)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert_names_both(result.stderr)
    assert content("out") == before


def test_a_download_of_a_later_version_is_rejected(tmp_path):
    manifest.write(tmp_path, {"files": {}})
    note = tmp_path / "model.part.json"
    note.write_text("{}")
    assert manifest.read(tmp_path)["files"] == {} == transfer.read_note(note)
    newer(tmp_path / "download.json")
    newer(note)
    with pytest.raises(NewerFormatError) as error:
        manifest.read(tmp_path)
    assert_names_both(str(error.value))
    with pytest.raises(NewerFormatError) as error:
        transfer.read_note(note)
    assert_names_both(str(error.value))


# --- changed flags ---

REJECTED = "was saved with another --optimizer or another --only_train_transformer_layers"
CHANGES = [
    (("--optimizer", "sgd"), REJECTED),
    (("--optimizer", "adamw"), REJECTED),
    (("--only_train_transformer_layers",), REJECTED),
    (
        (*("--precision", "bfloat16", "--batch_size", 2, "--accumulate_gradients", 3),
         *("--dropout", 0.2, "--noise", 0.5, "--clip_norm", 1, "--warmup_steps", 9)),
        "resumed with changes: --noise 0.5 (was 0.0), --batch_size 2 (was 1), "
        "--accumulate_gradients 3 (was 1), --precision bfloat16 (was float32), "
        "--warmup_steps 9 (was 0), --clip_norm 1.0 (was 0.0), --dropout 0.2 (was 0.0)\n",
    ),
    (
        (*("--sampling", "documents", "--batch_size", 4, "--seed", 8, "--lr_schedule", "linear"),),
        "resumed with changes: --sampling documents (was random), --batch_size 4 (was 1), "
        "--lr_schedule linear (was constant), --seed 8 (was 7)\n"
        "the text continues as if each earlier step had read 4 rows\n",
    ),
    (("--model_name", "tiny"), "--model_name tiny is ignored: this run started from mini."),
    (("--dataset", "other.txt"), "resumed with changes: another text in --dataset\n"),
    (("--seq_length", 16), "resumed with changes: --seq_length 16 (was 32)\n"),
]  # fmt: skip


def test_a_run_that_resumes_with_other_flags_names_them_or_is_rejected(cli, run1):
    flags = {"--model_name": "mini", "--seq_length": 32, "--seed": 7, "--dataset": "text.txt"}
    flags |= {"--sample_every": 0, "--steps": 3, "--learning_rate": 0.001}

    def resume(more):
        given = [
            word for name, value in flags.items() if name not in more for word in (name, value)
        ]
        return cli("train", *given, *more)

    assert "resumed with changes" not in resume(()).stderr
    Path("other.txt").write_text(TEXT.upper())
    before = content("checkpoint/run1")
    for more, message in CHANGES:
        result = resume(more)
        assert message in result.stderr, result.stderr
        assert ("resumed with changes" in result.stderr) == ("resumed with changes" in message)
        assert result.returncode == (1 if message == REJECTED else 0)
        after = content("checkpoint/run1")
        assert {name: after[name] for name in before} == before
    shutil.copy("models/tiny/hparams.json", "checkpoint/run1")  # other sizes
    result = resume(())
    assert result.returncode == 1 and "hparams.json differs from its checksum" in result.stderr


def test_another_text_or_number_of_devices_is_named():
    options = TrainOptions(dataset="x", seed=1, val_fraction=0.1, val_every=1, sampling="documents")
    plan = Plan(options, options, 8, 2, None, None, "mini", 5)
    before = {"seed": 1, "flags": plan.shape()}
    assert changes(before, plan) == [] == changes({"step": 3}, plan)
    before["flags"] |= {"text": 4, "devices": 1}
    named, place, held_out = changes(before, plan)
    assert named == "resumed with changes: devices 2 (was 1), another text in --dataset"
    assert place == "the text continues as if each earlier step had read 2 rows"
    assert "holds out other documents than before" in held_out

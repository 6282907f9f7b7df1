"""Which checkpoints of a run count, which is the newest, and which are removed."""

import json
import re

import pytest

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import folders, runs
from gpt2cli.text import encoder


def save(folder, step, number=None, **more):
    """Write a checkpoint of a few bytes; `number` is its place in the order of saving."""
    folder.mkdir(exist_ok=True)
    names = [f"{kind}-{step}{end}" for kind in ("model", "optimizer") for end in runs.ENDINGS]
    for name in names:
        (folder / name).write_text(f"{name} {number}")
    state = {"step": step, "save": step if number is None else number, **more}
    runs.write_state(folder, state, {name: files.digest(folder / name) for name in names})


def test_the_newest_checkpoint_is_the_one_saved_last(tmp_path, capsys):
    for number, step in enumerate((10, 20, 15)):
        save(tmp_path, step, number)
    assert runs.newest(tmp_path) == 15 and list(runs.states(tmp_path)) == [10, 20, 15]
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model-10"\n')
    assert folders.find_checkpoint(tmp_path) == tmp_path / "model-15"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["model-2.index", "optimizer-2" + runs.SHARD, "state-2.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_used(
    tmp_path, capsys, name, damage
):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = bytes([content[0] ^ 1, *content[1:]])
        path.write_bytes({"flip": flipped, "cut": content[:-3], "empty": b""}[damage])
    assert runs.newest(tmp_path) == 1
    printed = capsys.readouterr().err
    if (name, damage) == ("model-2.index", "gone"):  # as if it had never been saved
        assert printed == "" and runs.steps(tmp_path) == [1]
        return
    assert name in printed and printed.count("\n") == 1
    assert "using the checkpoint of step 1 instead" in printed
    with pytest.raises(UserError, match=re.escape(name)):
        folders.find_checkpoint(tmp_path / "model-2", to_train=True)
    if name.startswith("optimizer") and damage != "gone":  # sampling does not read it
        assert folders.find_checkpoint(tmp_path) == tmp_path / "model-2"


def test_if_all_are_damaged_each_is_reported(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / f"model-{step}.index").write_text("other")
    with pytest.raises(UserError, match=r"model-2.index is damaged.*model-1.index is damaged"):
        folders.find_checkpoint(tmp_path)


def test_every_change_of_a_state_is_detected(tmp_path):
    save(tmp_path, 3, running_loss=[1.5, 2.0])
    path = tmp_path / "state-3.json"
    content, rejected = path.read_bytes(), 0
    for at in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            try:
                assert runs.read_state(tmp_path, 3) == {
                    key: value for key, value in json.loads(content).items() if key != "sha256"
                }
            except UserError as error:
                assert "state-3.json" in str(error)
                rejected += 1
    assert rejected > 4 * len(content)  # most bits count


def test_a_checkpoint_of_another_program_counts_without_a_state(tmp_path):
    for name in ("model-5.index", "model-5" + runs.SHARD, "model-7.index", "model-7" + runs.SHARD):
        (tmp_path / name).write_text("weights")
    assert runs.newest(tmp_path) == 7 and runs.fault(tmp_path, 5) is None
    save(tmp_path, 6)
    assert runs.newest(tmp_path) == 6


def kept(folder, saved, **options):
    found = runs.prune(folder, saved, **options)
    names = {int(re.search(r"\d+", p.name)[0]) for p in folder.iterdir() if p.name != "other.txt"}
    assert names == set(found)
    return found


def test_the_newest_and_the_permanent_checkpoints_stay(tmp_path):
    (tmp_path / "other.txt").write_text("the user's")
    for step in range(1, 8):
        save(tmp_path, step, permanent=step == 2, validation_loss=abs(step - 4))
    assert kept(tmp_path, 7, keep=0) == [1, 2, 3, 4, 5, 6, 7]
    assert kept(tmp_path, 7, keep=2, keep_best=True) == [2, 4, 6, 7]
    assert kept(tmp_path, 7, keep=1) == [2, 7]
    assert (tmp_path / "other.txt").exists()


def test_checkpoints_of_a_replaced_run_are_removed_after_the_first_new_one(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, validation_loss=0.0, permanent=True)
    save(tmp_path, 20, number=31, validation_loss=9.0)
    assert kept(tmp_path, 20, keep=5, keep_best=True, replaced=[10, 20, 30]) == [20]


def test_only_the_rest_of_a_killed_writer_is_cleared(tmp_path):
    save(tmp_path, 1)
    before = sorted(p.name for p in tmp_path.iterdir())
    for name in (".model-2.77.part.index", ".optimizer-2.77.part.data-00000-of-00001.tempstate1",
                 "hparams.json.77-abcdef.part"):  # fmt: skip
        (tmp_path / name).write_text("half")
    runs.clear(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_users_files_in_a_run_folder_stay(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "model-1.old").mkdir()
    (tmp_path / "mine.part").mkdir()
    for name in ("model-1.tar.gz", "model-01.index", "night.jsonl.part", "night.jsonl.part.old"):
        (tmp_path / name).write_text("the user's")
    before = {p.name for p in tmp_path.iterdir()}
    runs.clear(tmp_path)
    runs.prune(tmp_path, 3, keep=1)
    gone = before - {p.name for p in tmp_path.iterdir()}
    assert gone == {f"{kind}-{step}{end}" for step in (1, 2) for kind in ("model", "optimizer")
                    for end in runs.ENDINGS} | {"state-1.json", "state-2.json"}  # fmt: skip


def test_a_step_that_another_program_added_counts_as_newer(tmp_path):
    save(tmp_path, 4)
    for name in ("model-2.index", "model-2" + runs.SHARD, "model-9.index", "model-9" + runs.SHARD):
        (tmp_path / name).write_text("weights")
    assert runs.newest(tmp_path) == 4
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model-9"\n')
    assert runs.newest(tmp_path) == 9
    assert 9 in {int(re.search(r"\d+", p.name)[0]) for p in tmp_path.glob("model-*")}
    runs.prune(tmp_path, 4, keep=1)
    assert runs.steps(tmp_path) == [4, 9]


def test_the_best_checkpoint_is_one_of_this_run(tmp_path):
    save(tmp_path, 1, validation_loss=1.0, run="a")
    save(tmp_path, 2, validation_loss=3.0, run="b")
    save(tmp_path, 3, validation_loss=4.0, run="b")
    assert runs.best(runs.states(tmp_path)) == 2
    assert kept(tmp_path, 3, keep=0, keep_best=True) == [2, 3]


@pytest.mark.parametrize(
    "wrong",
    [{"save": "x"}, {"running_loss": "x"}, {"running_loss": [1]}, {"step": 4.0}, {"seed": "x"},
     {"best": {"step": 1}}, {"best": [1]}, {"validation_loss": None}, {"files": [1]}, {"due": 1},
     {"worse": True}, {"kept_at": "now"}],
)  # fmt: skip
def test_a_state_with_wrong_types_is_damaged(tmp_path, wrong):
    save(tmp_path, 4)
    state, path = {"step": 4, "save": 1, **wrong}, tmp_path / "state-4.json"
    runs.write_state(tmp_path, state, wrong.get("files", {}))
    (tmp_path / f"state-{state['step']}.json").rename(path)
    assert "state-4.json is damaged" in runs.fault(tmp_path, 4)
    path.write_text(json.dumps(state))  # without checksums, as our first runs
    assert "state-4.json is damaged" in runs.fault(tmp_path, 4)


SIZES = ModelConfig(n_vocab=9, n_ctx=8, n_embd=8, n_head=2, n_layer=1)


@pytest.fixture
def model(tmp_path):
    """Write a model folder without weights, but with checksums."""
    (tmp_path / "hparams.json").write_text(SIZES.to_json())
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\nThe\nthe\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    folders.write_sums(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["hparams.json", "vocab.txt", "tokenizer_config.json"])
def test_a_file_that_differs_from_its_checksum_is_reported_when_read(model, name):
    before = encoder.load(model).encode("The")
    content = (model / name).read_text()
    changed = {
        "hparams.json": content.replace("9", "7"),
        "vocab.txt": content.replace("The", "Tho"),
        "tokenizer_config.json": content.replace("false", "true"),
    }
    (model / name).write_text(changed[name])
    with pytest.raises(UserError, match=f"{name} differs from its checksum"):
        encoder.load(model)  # it also reads the sizes and the tokenizer's options
    sums = model / folders.SUMS
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if name not in line))  # as the message advises
    opened = folders.open_folder(model)
    assert opened.read(name) == changed[name].encode()
    assert (encoder.load(opened).encode("The") == before) == (name == "hparams.json")


def test_a_file_without_a_recorded_checksum_is_read(model):
    (model / "vocab.txt").write_text("changed")
    (model / folders.SUMS).unlink()
    opened = folders.open_folder(model)
    assert opened.sums == {} and opened.read("vocab.txt") == b"changed"


def test_names_in_sums_lead_to_no_other_folder(model):
    outside = model.parent / "outside.txt"
    outside.write_text("outside")
    lines = f"{'0' * 64}  ../outside.txt\n{'0' * 64}  /etc/passwd\n\n \nnonsense\n"
    (model / folders.SUMS).write_text(lines)
    opened = folders.open_folder(model)
    assert opened.known_sizes() == SIZES and opened.read("vocab.txt").startswith(b"[UNK]")
    copy = model / "copy"
    copy.mkdir()
    folders.copy_description(opened, copy)
    names = {"hparams.json", "vocab.txt", "tokenizer_config.json", folders.SUMS}
    assert {path.name for path in copy.iterdir()} == names
    assert "outside" not in (copy / folders.SUMS).read_text()
    assert outside.read_text() == "outside"


def test_a_checkpoint_name_that_no_file_can_have_is_one_error(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "' + "a" * 5000 + '"')
    with pytest.raises(UserError, match=r"checkpoint names a checkpoint of 5,000 characters"):
        folders.find_checkpoint(tmp_path)

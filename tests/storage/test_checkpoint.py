"""Checkpoints under OpenAI's names, and the messages about damaged and foreign ones."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from conftest import lively

from gpt2cli.errors import UserError
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import checkpoint, folders, reading, runs
from gpt2cli.tensorflow import tf


@pytest.fixture
def folder(network, tmp_path):
    checkpoint.save(network, tmp_path / "m")
    return tmp_path / "m"


def equal(a, b):
    return all(np.array_equal(a.weights[n], b.weights[n]) for n in a.weights)


def test_saved_weights_load_bit_for_bit(network, folder):
    assert equal(network, checkpoint.load(folder))
    assert sorted(p.name for p in folder.iterdir()) == [
        "SHA256SUMS",
        "checkpoint",
        "hparams.json",
        "model.ckpt.data-00000-of-00001",
        "model.ckpt.index",
    ]


def test_a_folder_a_prefix_and_an_index_file_mean_the_same_checkpoint(network, folder):
    for name in ("", "model.ckpt", "model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        assert equal(network, checkpoint.load(folder / name))


def test_the_files_are_those_of_a_tf1_saver(network, folder, tmp_path):
    """tf.compat.v1.train.Saver reads our files, and we read its files."""
    fresh = lively(network.config, seed=9)
    saver = tf.compat.v1.train.Saver(fresh.weights)
    saver.restore(None, str(folder / "model.ckpt"))
    assert equal(network, fresh)
    other = lively(network.config, seed=10)
    shutil.copy(folder / "hparams.json", tmp_path)
    tf.compat.v1.train.Saver(other.weights).save(None, str(tmp_path / "model.ckpt"))
    assert equal(other, checkpoint.load(tmp_path))


def test_the_old_way_of_renaming_a_runs_checkpoint_works(network, folder):
    """nshepperd's README: model-4000.* becomes model.ckpt.* in models/345M."""
    run = folder.parent / "run"
    folders.copy_description(folder, run)
    checkpoint.save_run(run, network, {"slot": tf.zeros([1])}, {"step": 4000})
    checkpoint.name_newest(run, [4000])
    other = lively(network.config, seed=9)
    checkpoint.save(other, folder)
    for ending in (".index", ".data-00000-of-00001"):
        shutil.copy(run / f"model-4000{ending}", folder / f"model.ckpt{ending}")
    assert equal(network, checkpoint.load(folder))
    shutil.copy(run / "checkpoint", folder)  # names model-4000, which is not here
    assert equal(network, checkpoint.load(folder))


def test_a_run_keeps_the_newest_checkpoints_with_their_states(network, folder):
    run = folder.parent / "run"
    folders.copy_description(folder, run)
    for step in (1, 2, 10, 9):
        state = {"step": step, "seed": 5}
        checkpoint.save_run(run, network, {"slot": tf.constant([1.0 * step])}, state)
        checkpoint.name_newest(run, runs.prune(run, step, keep=2))
    assert runs.steps(run) == [9, 10]
    assert folders.find_checkpoint(run).name == "model-9"  # the one saved last, not the highest
    assert (run / "counter").read_text() == "9\n"
    tensors, state = reading.load_training(run / "model-9")
    assert (state["step"], state["seed"]) == (9, 5) and tensors["slot"] == [9.0]
    assert not list(run.glob("*-1.*")) and not list(run.glob("*-2.*"))


def test_a_run_of_another_machine_is_found_by_name(network, folder):
    (folder / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/run/model.ckpt"\n')
    assert equal(network, checkpoint.load(folder))


def test_a_checkpoint_file_leads_nowhere_else(network, folder):
    (folder / "checkpoint").write_text('model_checkpoint_path: "../../etc/passwd"\n')
    assert folders.find_checkpoint(folder).parent == folder


def rejection(folder):
    with pytest.raises(UserError) as error:
        checkpoint.load(folder)
    return str(error.value)


def test_missing_files_are_reported(folder):
    shutil.copytree(folder, folder.parent / "whole")
    for name, words in (
        ("hparams.json", "hparams.json"),
        ("model.ckpt.index", "model.ckpt.index"),
        ("model.ckpt.data-00000-of-00001", "model.ckpt.data-00000-of-00001"),
    ):
        (folder / name).unlink()
        assert words in rejection(folder)
        shutil.copy(folder.parent / "whole" / name, folder)
    checkpoint.load(folder)


def test_a_truncated_file_is_reported_by_load_and_verify(folder):
    for ending in (".data-00000-of-00001", ".index"):
        path = folder / f"model.ckpt{ending}"
        whole = path.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert "model.ckpt" in rejection(folder)
            with pytest.raises(UserError, match=r"model\.ckpt"):
                reading.verify(folder)
        path.write_bytes(whole)
    reading.verify(folder)


def test_an_error_page_instead_of_a_file_is_reported(folder):
    for ending in (".data-00000-of-00001", ".index"):
        path = folder / f"model.ckpt{ending}"
        whole = path.read_bytes()
        path.write_bytes(b"<?xml version='1.0'?><Error>" * 40)
        assert "model.ckpt" in rejection(folder)
        path.write_bytes(whole)


@pytest.mark.parametrize("key", ["n_vocab", "n_ctx", "n_embd", "n_layer"])
@pytest.mark.parametrize("factor", [2, 0.5])
def test_a_checkpoint_of_another_size_is_rejected_with_the_difference(folder, key, factor):
    path = folder / "hparams.json"
    sizes = json.loads(path.read_text())
    path.write_text(json.dumps({**sizes, key: max(1, int(sizes[key] * factor))}))
    assert "hparams.json differs from its checksum" in rejection(folder)
    (folder / "SHA256SUMS").unlink()
    text = rejection(folder)
    assert "model/" in text and "hparams.json" in text


def test_numbers_that_are_not_finite_are_found(network, folder):
    weights = {n: v.numpy() for n, v in network.weights.items()}
    weights["model/h1/attn/c_proj/w"][0, 3, 4] = np.nan
    checkpoint.write(folder / "model.ckpt", weights)
    assert "model/h1/attn/c_proj/w" in rejection(folder)


def test_a_foreign_checkpoint_is_rejected(folder):
    checkpoint.write(folder / "model.ckpt", {"bert/embeddings": tf.zeros([3])})
    assert "lacks" in rejection(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"n_vocab": 5}', "not json", '{"n_vocab": "many", "n_ctx": 1, "n_embd": 1, '
     '"n_head": 1, "n_layer": 1}', "[" * 100000],
)  # fmt: skip
def test_a_bad_hparams_file_is_reported(folder, text):
    (folder / "hparams.json").write_text(text)
    assert "hparams.json" in rejection(folder)


def test_unknown_keys_of_hparams_are_kept():
    text = json.dumps(dict(n_vocab=9, n_ctx=4, n_embd=4, n_head=2, n_layer=1, lower_case=False))
    config = ModelConfig.from_json(text)
    assert config.extra == {"lower_case": False}
    assert json.loads(config.to_json())["lower_case"] is False


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_reported(network, folder):
    folder.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save(network, folder)


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(network, folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.write(folder / "model.ckpt", lively(network.config, 9).weights)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("place", range(12))
def test_a_step_written_again_is_either_the_old_or_the_new_one(network, folder, monkeypatch, place):
    """At whichever rename the process dies, the step is neither mixed nor lost."""
    run = folder.parent / "run"
    folders.copy_description(folder, run)
    checkpoint.save_run(run, network, {"slot": tf.zeros([9])}, {"step": 4})
    real, done = os.replace, []

    def dying(source, target):
        if len(done) == place:
            raise KeyboardInterrupt
        done.append(real(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        patch.setattr(runs, "recover", lambda folder: None)  # a killed process does not
        other = lively(network.config, 9)
        with contextlib.suppress(KeyboardInterrupt):
            checkpoint.save_run(run, other, {"slot": tf.ones([9])}, {"step": 4})
    runs.clear(run)
    assert runs.newest(run) == 4
    slot, _ = reading.load_training(run / "model-4")
    is_new = slot["slot"][0] == 1
    assert equal(other if is_new else network, checkpoint.load(run))
    assert is_new == (len(done) >= 10)  # five moved away, the state, four
    assert sorted(p.name for p in run.iterdir()) == sorted(
        [*("hparams.json", "SHA256SUMS", "state-4.json"),
         *(f"{kind}-4{end}" for kind in ("model", "optimizer") for end in runs.ENDINGS)]
    )  # fmt: skip


@pytest.mark.parametrize("name", ["a[1]", "a\\b", "{a,b} ?*]", "\udcff"])
def test_a_path_that_is_a_pattern_for_tensorflow_is_read(network, folder, name):
    folder.rename(folder.with_name(name))
    assert equal(network, checkpoint.load(folder.with_name(name)))


def test_tensors_of_another_type_are_rejected(network, folder):
    weights = {n: tf.cast(v, tf.int32) for n, v in network.weights.items()}
    checkpoint.write(folder / "model.ckpt", weights)
    assert "int32" in rejection(folder)


def test_a_save_that_fails_leaves_nothing_of_its_step(network, folder, monkeypatch):
    run = folder.parent / "run"
    folders.copy_description(folder, run)
    before = sorted(p.name for p in run.iterdir())
    real = os.fsync

    def full(number):
        if os.fstat(number).st_size > 10_000:  # the weights, not the small files
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save_run(run, network, {"slot": tf.zeros([9])}, {"step": 1})
    assert sorted(p.name for p in run.iterdir()) == before

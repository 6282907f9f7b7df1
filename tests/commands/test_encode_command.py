"""gpt2cli encode as a command: files, standard error, rejected input."""

import json

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer

from gpt2cli.commands import encode
from gpt2cli.commands.encode import EncodeOptions
from gpt2cli.errors import UserError
from gpt2cli.options import TextOptions
from gpt2cli.text import corpus, encoded, encoder
from gpt2cli.text.classes import END


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """models/english (BPE) and models/chinese (WordPiece)."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "english").mkdir()
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(
        ["the kettle clicked off"], vocab_size=300, min_frequency=1, special_tokens=[END]
    )
    theirs.save_model(str(folder / "english"))
    (folder / "chinese").mkdir()
    (folder / "chinese/vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n今\n天\n", encoding="utf-8")
    (folder / "bare").mkdir()
    return folder


def run(models_dir, in_text, out, **options):
    paths = {"in_text": str(in_text), "out_npz": str(out), "models_dir": str(models_dir)}
    encode.run(EncodeOptions(**paths, **{"model_name": "english", **options}))


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_encode_writes_the_ids_and_a_summary_on_stderr(tmp_path, models_dir, capsys, suffix):
    text = tmp_path / "a.txt"
    text.write_text(f"the kettle{END}clicked off\n")
    out = tmp_path / "deep" / "er" / f"out{suffix}"
    run(models_dir, text, out)
    english = encoder.load(models_dir / "english")
    expected = [*english.encode("the kettle"), 0, *english.encode("clicked off\n"), 0]
    tokens = encoded.load(out, None, TextOptions(), english.n_vocab)
    assert tokens.whole().tolist() == expected
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert f"{len(expected)} tokens (2 end tokens) in 1 chunk" in stderr
    per_token = len(text.read_bytes()) / len(expected)
    assert f"{per_token:.2f} bytes of text per token" in stderr
    assert f"{out.stat().st_size:,} bytes written" in stderr
    assert "\r" not in stderr  # no bar without a terminal
    assert [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("block", [3, 2**18])
def test_chunks_are_counted(tmp_path, models_dir, capsys, monkeypatch, block):
    monkeypatch.setattr(corpus, "BLOCK", block)
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("the kettle clicked")
    run(models_dir, tmp_path / "*.txt", tmp_path / "out.npz", combine=30)
    assert "(4 end tokens) in 2 chunks" in capsys.readouterr().err
    with np.load(tmp_path / "out.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"]


def test_a_run_folder_has_the_vocabulary_too(tmp_path, models_dir):
    (tmp_path / "a.txt").write_text("the kettle")
    run(
        models_dir,
        tmp_path / "a.txt",
        tmp_path / "out.npz",
        model_name=None,
        run_name="english",
        checkpoint_dir=str(models_dir),
    )
    assert (tmp_path / "out.npz").exists()


def test_chinese_characters_that_the_vocabulary_lacks_are_listed(tmp_path, models_dir, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "今天龙龙凤"}), encoding="utf-8")
    run(models_dir, path, tmp_path / "out.npz", model_name="chinese")
    stderr = capsys.readouterr().err
    assert "42.86% of the tokens are [UNK]: the vocabulary lacks 龙 凤" in stderr
    with np.load(tmp_path / "out.npz") as archive:
        assert archive["arr_0"].tolist() == [1, 3, 4, 0, 0, 0, 2]
    path.write_text(json.dumps({"text": "今天"}), encoding="utf-8")
    run(models_dir, path, tmp_path / "out.npz", model_name="chinese")
    assert "UNK" not in capsys.readouterr().err


def test_an_output_in_the_input_folder_is_not_read(tmp_path, models_dir, capsys):
    (tmp_path / "a.txt").write_text("the kettle")
    run(models_dir, tmp_path, tmp_path / "out.npz")
    first = (tmp_path / "out.npz").stat().st_size
    run(models_dir, tmp_path, tmp_path / "out.npz")
    assert (tmp_path / "out.npz").stat().st_size == first
    assert "out.npz is in the input folder; it is not read" in capsys.readouterr().err


def test_an_output_that_is_the_input_is_rejected(tmp_path, models_dir):
    out = tmp_path / "out.npz"
    np.savez(out, [1, 2])
    before = out.read_bytes()
    with pytest.raises(UserError, match="would replace its own input"):
        run(models_dir, out, tmp_path / "." / "out.npz")
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "content, message",
    [(b"", "contains no text"), (b"\0\1", "not a text file"), (b"a\xff", "byte 1 is not utf-8")],
)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_bad_input_leaves_the_old_output_unchanged(tmp_path, models_dir, content, message, suffix):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(content)
    out = tmp_path / f"out{suffix}"
    out.write_text("old")
    with pytest.raises(UserError, match=message):
        run(models_dir, tmp_path / "in", out)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", out.name]


def test_missing_input_and_missing_vocabulary_are_reported(tmp_path, models_dir):
    with pytest.raises(UserError, match=f"no file matches: {tmp_path}/nothing.txt"):
        run(models_dir, tmp_path / "nothing.txt", tmp_path / "out.npz")
    with pytest.raises(UserError, match=f"no vocabulary in {models_dir}/bare"):
        run(models_dir, tmp_path, tmp_path / "out.npz", model_name="bare")


def test_an_output_that_cannot_be_written_is_reported(tmp_path, models_dir):
    (tmp_path / "a.txt").write_text("the kettle")
    with pytest.raises(UserError, match=r"cannot write .*a\.txt/out\.npz"):
        run(models_dir, tmp_path / "a.txt", tmp_path / "a.txt" / "out.npz")


def test_lines_are_counted_as_documents(tmp_path, models_dir, capsys):
    (tmp_path / "a.txt").write_text("the kettle\n\nclicked\noff")
    run(models_dir, tmp_path / "a.txt", tmp_path / "out.npz", lines=True)
    assert "tokens (3 documents, 3 end tokens) in 1 chunk," in capsys.readouterr().err
    # the literal end token ends no document
    (tmp_path / "a.txt").write_text(f"the{END}kettle\n")
    run(models_dir, tmp_path / "a.txt", tmp_path / "out.npz", lines=True, workers=1)
    assert "tokens (1 document, 2 end tokens) in 1 chunk," in capsys.readouterr().err


def test_uer_compat_reads_lines_as_uer_does(tmp_path, models_dir, capsys):
    (tmp_path / "a.txt").write_text("今\n\n天", encoding="utf-8")
    run(models_dir, tmp_path, tmp_path / "out.npy", model_name="chinese", uer_compat=True)
    assert np.load(tmp_path / "out.npy").tolist() == [1, 3, 2, 1, 2]
    assert "(2 documents, 2 end tokens)" in capsys.readouterr().err


def test_a_gpt2_ml_model_has_no_end_token_to_count(tmp_path, models_dir, capsys):
    folder = tmp_path / "models" / "ml"
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_bytes((models_dir / "chinese/vocab.txt").read_bytes())
    sizes = {"vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    (folder / "config.json").write_text(json.dumps(sizes))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("今\n天天\n", encoding="utf-8")
    out = tmp_path / "out.npz"
    run(tmp_path / "models", tmp_path / "*.txt", out, model_name="ml", lines=True, combine=1)
    assert "6 tokens (4 documents) in 2 chunks," in capsys.readouterr().err
    with np.load(out) as archive:
        assert [archive[name].tolist() for name in archive.files] == [[3, 4, 4]] * 2
    run(tmp_path / "models", tmp_path / "a.txt", out, model_name="ml")
    assert "3 tokens in 1 chunk," in capsys.readouterr().err

"""New tokens: --add_token of convert and vocab, in training data, prompts and other programs."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import TINY

from gpt2cli.commands import convert as convert_command
from gpt2cli.commands import encode as encode_command
from gpt2cli.commands import vocab as vocab_command
from gpt2cli.commands.convert import ConvertOptions
from gpt2cli.commands.encode import EncodeOptions
from gpt2cli.commands.vocab import VocabOptions
from gpt2cli.errors import UsageError, UserError
from gpt2cli.formats.convert import add_tokens, convert, open_source
from gpt2cli.storage import folders
from gpt2cli.text import encoder

NEW = ("<|user|>", "<größe>")


def table_of(source):
    return source.tensor("model/wte", (source.config.n_vocab, source.config.n_embd))


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """models/tiny with two new tokens, made by the command."""
    folder = tmp_path_factory.mktemp("added") / "wider"
    convert_command.run(ConvertOptions(src=str(TINY), dst=str(folder), add_token=NEW))
    return folder


def test_new_rows_are_the_mean_of_the_old_ones(wider):
    old, new = table_of(open_source(TINY)), table_of(open_source(wider))
    assert new.shape == (2050, 160) and np.array_equal(new[:2048], old)
    expected = old.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(new[2048:], np.stack([expected, expected]), atol=1e-7)
    assert np.abs(expected).max() > 1e-3  # zeros would be noticed


def test_new_tokens_are_tokens_in_training_data_and_plain_text_in_a_prompt(wider, tmp_path):
    vocabulary = encoder.load(wider)
    text = "<|user|>The<größe>"
    assert vocabulary.encode(text, special=True) == [2048, 340, 2049]
    assert not {2048, 2049} & set(vocabulary.encode(text))
    assert vocabulary.decode([2048, 340, 2049]) == text
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    options = {"models_dir": str(wider.parent), "model_name": "wider"}
    out = str(tmp_path / "a.npz")
    encode_command.run(EncodeOptions(in_text=str(tmp_path / "a.txt"), out_npz=out, **options))
    assert np.load(out)["arr_0"].tolist() == [2048, 340, 2049, 2047]


def test_new_tokens_survive_hugging_face_format_and_back(wider, tmp_path):
    convert(open_source(wider), tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf/added_tokens.json").read_text()) == {
        NEW[0]: 2048,
        NEW[1]: 2049,
    }
    convert(open_source(tmp_path / "hf"), tmp_path / "back")
    back = encoder.load(tmp_path / "back")
    assert back.encode("<|user|>The<größe>", special=True) == [2048, 340, 2049]
    again = add_tokens(open_source(tmp_path / "back"), ["<third>"])
    assert again.tokens()["<third>"] == 2050 and again.config.n_vocab == 2051


def test_rows_that_the_model_already_has_are_used_first(tmp_path):
    source = open_source(TINY)
    spare = add_tokens(source, ["<a>", "<b>"])
    spare = dataclasses.replace(spare, vocabulary=source.vocabulary)
    made = add_tokens(spare, ["<c>"])
    assert made.config.n_vocab == 2050 and made.tokens()["<c>"] == 2048


def test_a_tokenizer_json_gets_new_tokens_too(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    theirs = ByteLevelBPETokenizer(str(TINY / "encoder.json"), str(TINY / "vocab.bpe"))
    theirs.add_special_tokens(["<|endoftext|>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    source = add_tokens(open_source(TINY, vocab=tmp_path / "tokenizer.json"), NEW)
    convert(source, tmp_path / "new")
    assert folders.read_config(tmp_path / "new").extra["tokenizer"] == "bpe"
    vocabulary = encoder.load(tmp_path / "new")
    assert vocabulary.encode("<|user|>The<größe>", special=True) == [2048, 340, 2049]
    added = json.loads((tmp_path / "new/tokenizer.json").read_text(encoding="utf-8"))[
        "added_tokens"
    ]
    assert [entry["id"] for entry in added] == [2047, 2048, 2049]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_vocab_makes_new_tokens(tmp_path, kind, capsys):
    (tmp_path / "a.txt").write_text("hello <|user|> world " * 50 + "你好", encoding="utf-8")
    options = dict(in_text=str(tmp_path / "a.txt"), out=str(tmp_path / "v"), kind=kind, size=290)
    vocab_command.run(VocabOptions(**options, add_token=NEW))
    vocabulary = encoder.load(tmp_path / "v")
    ids = [vocabulary.id_of(text) for text in NEW]
    assert ids == [vocabulary.n_vocab - 2, vocabulary.n_vocab - 1] and vocabulary.n_vocab <= 290
    found = vocabulary.encode("hello<|user|>world<größe>", special=True)
    assert [index for index in found if index in ids] == ids
    assert vocabulary.id_of("<|") is None and vocabulary.id_of("user") is None


def test_wrong_new_tokens_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"already has the token '<\|endoftext\|>' \(id 2047\)"):
        add_tokens(open_source(TINY), ["<|endoftext|>"])
    for texts, message in ((("",), "must be a text"), (("<a>", "<a>"), "<a> is given twice")):
        with pytest.raises(UsageError, match=message):
            ConvertOptions(src="a", dst="b", add_token=texts)

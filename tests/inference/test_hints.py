"""Lines on standard error about prompts."""

import pytest

from gpt2cli.inference import hints
from gpt2cli.inference.text import encode_prompt
from gpt2cli.options import GenerateOptions
from gpt2cli.text import encoder


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    """A WordPiece vocabulary: a [CLS] before every prompt, [SEP] ends a sample."""
    folder = tmp_path_factory.mktemp("wordpiece")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "天", "气", "a", "##a", "b"]
    (folder / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    return encoder.load(folder)


def about(vocabulary, *prompts, n_ctx=100, typed=False, **settings):
    encoded = ((prompt, None) for prompt in prompts)
    return hints.about(encoded, vocabulary, n_ctx, GenerateOptions(**settings), typed)


def test_ordinary_prompts_need_no_line(tiny, wordpiece):
    assert about(tiny.encoder, "The import", "", None, "日本", [5, 6], typed=True) == {}
    assert about(wordpiece, "天气", "", None, "[CLS]天", [5, 6], "天 ", typed=True) == {}


def test_characters_that_the_vocabulary_lacks_are_named(wordpiece):
    (line,) = about(wordpiece, "天", "日天日ü").values()
    assert line == (
        "prompt 2 has characters that the vocabulary lacks ('日', 'ü'); the model reads [UNK] in "
        "their place"
    )
    (line,) = about(wordpiece, "日", "天", "月火水木金").values()
    assert line.startswith("2 of 3 prompts have characters that the vocabulary lacks ('日', ")
    assert "'水', '木', 1 more)" in line
    for special in ("text", "token"):  # no letter of [CLS], which is not read as text
        lines = about(wordpiece, "[CLS]日[SEP]", special=special)
        assert ("'['" in lines["unknown"]) == (special == "text"), lines
        assert ("'日'" in lines["unknown"]) and "'L'" not in lines["unknown"]
    (line,) = about(wordpiece, "ab").values()  # there is no ##b
    assert "prompt 1 has words that the vocabulary cannot spell; the model reads [UNK]" in line


def test_texts_of_tokens_are_named_unless_they_are_read_as_tokens(tiny, wordpiece):
    text = "One<|endoftext|>two<|endoftext|>"
    (line,) = about(tiny.encoder, "One", text).values()
    assert line == (
        "<|endoftext|> in a prompt is read as plain text; add --special token to read it as a token"
    )
    assert about(tiny.encoder, text, special="token") == {}
    (line,) = about(wordpiece, "天[SEP]天[CLS]")["special"].splitlines()
    assert line.startswith("[SEP], [CLS] in a prompt are read") and line.endswith("them as tokens")
    assert about(wordpiece, "天[SEP]气", special="token") == {}
    assert "[SEP] in a prompt is read" in about(wordpiece, "天[SEP]气")["special"]


def test_a_token_that_is_ordinary_text_needs_no_line(tiny, monkeypatch):
    (newline,) = tiny.encoder.encode("\n")
    monkeypatch.setattr(tiny.encoder, "added", {"\n": newline})
    assert about(tiny.encoder, "One\nTwo\n") == {}


def test_long_prompts_are_counted_and_the_first_is_described(tiny):
    (line,) = about(tiny.encoder, "x", [5] * 9, n_ctx=8).values()
    assert line == "prompt 2 has 9 tokens; the model sees only the last 8"
    assert about(tiny.encoder, [5] * 8, n_ctx=8) == {}
    (line,) = about(tiny.encoder, [5] * 8, n_ctx=8, window="last").values()
    assert line == "prompt 1 has 8 tokens; the model sees only the last 7"
    (line,) = about(None, [1] * 7, [5] * 9, [4] * 10, "no vocabulary", n_ctx=8).values()
    assert line == (
        "2 of 4 prompts are longer than the model's window, such as prompt 2 (9 tokens); the "
        "model sees only the last 8"
    )


def test_a_space_at_the_end_is_mentioned_where_words_begin_with_it(tiny, wordpiece):
    assert list(about(tiny.encoder, "The ", typed=True)) == ["space"]
    assert about(tiny.encoder, "The ") == about(tiny.encoder, "The\n", typed=True) == {}
    assert about(wordpiece, "天 ", typed=True) == {}


def test_a_typed_start_token_comes_once_and_only_at_the_start(wordpiece):
    plain = encode_prompt(wordpiece, "天气")
    assert plain == [2, 5, 6]
    for special in (False, True):
        assert encode_prompt(wordpiece, "[CLS]天气", special) == plain
        assert encode_prompt(wordpiece, "", special) == encode_prompt(wordpiece, "[CLS]") == [2]
    assert len(encode_prompt(wordpiece, "[CLS][CLS]天")) > 3
    assert encode_prompt(wordpiece, "天[SEP]气", special=True) == [2, 5, 3, 6]
    assert encode_prompt(wordpiece, "天[SEP]气") != [2, 5, 3, 6]

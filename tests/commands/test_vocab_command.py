"""gpt2cli vocab as a command: its files, other programs that read them, rejected input."""

import collections
import json
import os
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers

from gpt2cli.storage import folders
from gpt2cli.text import encoder, vocabulary
from gpt2cli.text.bpe import BYTE_OF, SPLIT
from gpt2cli.text.classes import END

ENGLISH = "\n".join(topics[name] for name in sorted(topics)[:12])
CHINESE = "今天天气不错，我们去公园散步。Tomorrow we walk, walking 今天。Café ２０２４年！\n" * 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "english.txt").write_text(ENGLISH, encoding="utf-8")
    (folder / "chinese.txt").write_text(CHINESE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """Make folders with a BPE of 700 tokens and a WordPiece of 400, trained on the corpus."""
    folder = tmp_path_factory.mktemp("made")
    texts = [ENGLISH, CHINESE]
    vocabulary.write(folder / "bpe", vocabulary.train_bpe(texts, 700))
    vocabulary.write(folder / "wordpiece", vocabulary.train_wordpiece(lambda: texts, 400))
    return folder


def words(folder):
    return (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")


def test_a_bpe_has_gpt2s_form_and_size(cli, corpus, tmp_path):
    out = tmp_path / "deep" / "er"
    result = cli("vocab", corpus / "english.txt", out, "--size", 500)
    assert result.returncode == 0 and result.stdout == "", result.stderr
    assert f"{out}: 500 tokens in encoder.json and vocab.bpe, " in result.stderr
    assert "bytes of text per token" in result.stderr and "only" not in result.stderr
    assert sorted(p.name for p in out.iterdir()) == ["encoder.json", "vocab.bpe"]
    ids = json.loads((out / "encoder.json").read_text())
    assert sorted(ids.values()) == list(range(500)) and ids[END] == 499
    assert set(list(ids)[:256]) == set(BYTE_OF)
    lines = (out / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "#version: 0.2" and lines[-1] == "" and len(lines) == 2 + 500 - 257
    bpe = encoder.load(out)
    assert bpe.end == bpe.start == 499
    assert bpe.decode(bpe.encode(ENGLISH)) == ENGLISH
    assert len(bpe.encode(ENGLISH)) < 0.6 * len(ENGLISH.encode())


def test_a_wordpiece_has_berts_form_characters_and_pieces(cli, corpus, tmp_path):
    result = cli("vocab", corpus, tmp_path / "out", "--kind", "wordpiece", "--size", 300)
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path / 'out'}: 300 tokens in vocab.txt, " in result.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["vocab.txt"]
    *tokens, last = words(tmp_path / "out")
    assert last == "" and len(set(tokens)) == len(tokens) == 300
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = {c for c in CHINESE.lower().replace("é", "e") if not c.isspace()}
    assert characters <= set(tokens)
    assert {"walk", "##ing", "##e"} <= set(tokens)
    assert not [token for token in tokens if token[:2] == "##" and token[2:] in "今天气公园年"]
    assert not [token for token in tokens if token != token.lower() and token[0] != "["]
    bert = encoder.load(tmp_path / "out")
    assert bert.unknown not in bert.encode(CHINESE)
    rare = {c for c, number in collections.Counter(ENGLISH.lower()).items() if number < 2}
    assert set(bert.missing(ENGLISH.lower())) <= rare
    assert bert.decode(bert.encode("今天天气不错，walking")) == "今天天气不错，walking"


def test_case_and_accents_are_kept_on_request(cli, corpus, tmp_path):
    flags = ("--kind", "wordpiece", "--size", 400, "--lower_case=false")
    assert cli("vocab", corpus, tmp_path, *flags).returncode == 0
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"do_lower_case": False}
    assert {"T", "é", "##é"} <= set(words(tmp_path))
    bert = encoder.load(tmp_path)
    assert not bert.lower_case
    assert bert.decode(bert.encode("Café Tomorrow")) == "Café Tomorrow"


def test_a_small_size_takes_the_most_frequent_characters_first(tmp_path):
    texts = ["今今今今天天天气气散", "ab ab ab ab ab"]
    made = vocabulary.train_wordpiece(lambda: texts, 10)["vocab.txt"].split()
    # b takes two places, the second for its ## form; 气 and 散 do not fit
    assert made == [*vocabulary.SPECIAL, "a", "b", "今", "天", "##b"]
    rare = vocabulary.train_wordpiece(lambda: texts, 100, min_frequency=2)["vocab.txt"].split()
    assert "气" in rare and "散" not in rare and "ab" in rare
    every = vocabulary.train_wordpiece(lambda: texts, 100, min_frequency=1)["vocab.txt"].split()
    assert "散" in every


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("the walk in's 1今天，é\n \tABſΣ\u2028\x85\u3000🙂")))
def test_tokenizers_reads_the_files_and_encodes_to_the_same_ids(made, text):
    theirs = ByteLevelBPETokenizer(str(made / "bpe/encoder.json"), str(made / "bpe/vocab.bpe"))
    assert theirs.encode(text).ids == encoder.load(made / "bpe").encode(text)
    model = models.WordPiece.from_file(str(made / "wordpiece/vocab.txt"), unk_token="[UNK]")
    theirs = Tokenizer(model)
    theirs.normalizer = normalizers.BertNormalizer()
    theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert theirs.encode(text).ids == encoder.load(made / "wordpiece").encode(text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("the'sll 12今é。\n \t\r\u2028\x85\u3000🙂_-")))
def test_training_splits_words_as_encoding_does(text):
    """Compare bpe.SPLIT with GPT-2's regex in tokenizers, which trains on its words."""
    import regex

    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = regex.findall(SPLIT, text)
    assert [text[i:j] for _, (i, j) in splitter.pre_tokenize_str(text)] == ours


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_same_corpus_gives_the_same_files(corpus, tmp_path, kind):
    """Train in two processes, because each orders its hash tables differently."""
    for name in ("a", "b"):
        subprocess.run(
            [sys.executable, "-m", "gpt2cli", "vocab", corpus, tmp_path / name]
            + ["--kind", kind, "--size", "600"],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files and files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_corpus_may_be_records_lines_or_another_encoding(cli, tmp_path, kind):
    text = "the kettle clicked off\n" * 20
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(t) + "\n" for t in text.splitlines()))
    (tmp_path / "c.csv").write_text("heading\n" + text)
    (tmp_path / "d.txt").write_text(text, encoding="utf-16")
    made = []
    for name, *flags in (
        *(("a.txt",), ("a.txt", "--lines"), ("a.txt", "--workers", 1)),
        *(("b.jsonl",), ("c.csv",), ("d.txt", "--encoding", "utf-16")),
    ):
        out = tmp_path / f"out{len(made)}"
        result = cli("vocab", tmp_path / name, out, "--kind", kind, "--size", 290, *flags)
        assert result.returncode == 0, result.stderr
        made.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert all(files == made[0] for files in made)
    result = cli("vocab", tmp_path / "a.txt", tmp_path / "new", "--json_field", "body")
    assert result.returncode == 1 and "--json_field is for .jsonl" in result.stderr


def test_the_literal_end_token_and_half_characters_make_no_token(cli, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(f"kettle{END}off \ud83d\n"))
    for kind in ("bpe", "wordpiece"):
        out = tmp_path / kind
        flags = ("--kind", kind, "--size", 300, "--min_frequency", 1, "--errors", "replace")
        assert cli("vocab", tmp_path / "a.jsonl", out, *flags).returncode == 0
    ids = json.loads((tmp_path / "bpe/encoder.json").read_text())
    assert "kettle" in ids and not [token for token in ids if "<" in token[:-1] and token[0] != "<"]
    assert "endoftext" not in ids
    flags = (
        "--size",
        300,
        "--min_frequency",
        1,
        "--errors",
        "replace",
        "--special",
        "text",
        "--overwrite",
    )
    assert cli("vocab", tmp_path / "a.jsonl", tmp_path / "bpe", *flags).returncode == 0
    assert "endoftext" in json.loads((tmp_path / "bpe/encoder.json").read_text())


def test_a_small_corpus_yields_fewer_tokens_with_a_message(cli, tmp_path):
    (tmp_path / "a.txt").write_text("the the the")
    result = cli("vocab", tmp_path / "a.txt", tmp_path / "out", "--size", 5000)
    assert result.returncode == 0
    assert "yields only 260 of the 5,000 tokens that --size requests" in result.stderr
    assert encoder.load(tmp_path / "out").n_vocab == 260  # th, the, " the"


def test_a_vocabulary_is_replaced_only_on_request_and_as_a_whole(cli, corpus, tmp_path):
    command = ("vocab", corpus / "english.txt", tmp_path / "out", "--size", 300)
    assert cli(*command).returncode == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    again = cli(*command, "--kind", "wordpiece")
    assert again.returncode == 1
    assert "already has a vocabulary (encoder.json, vocab.bpe)" in again.stderr
    assert "--overwrite" in again.stderr
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert cli(*command, "--kind", "wordpiece", "--overwrite").returncode == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["vocab.txt"]


def test_a_model_with_fewer_tokens_keeps_its_vocabulary(cli, corpus, workdir):
    tiny = workdir / "models" / "tiny"
    before = {p.name: p.read_bytes() for p in tiny.iterdir()}
    result = cli("vocab", corpus, tiny, "--size", 2049, "--overwrite")
    assert result.returncode == 1
    assert (
        f"{tiny} is a model with 2048 tokens" in result.stderr and "gpt2cli init" in result.stderr
    )
    assert before == {p.name: p.read_bytes() for p in tiny.iterdir()}


@pytest.mark.parametrize(
    "content, flags, status, message",
    [
        (b"text", ("--size", 256), 2, "--size must be at least 257 with --kind bpe, got 256"),
        (b"", (), 1, "contains no text"),
        (b" \n", ("--kind", "wordpiece"), 1, "contains no text"),
        (b"text \xff", (), 1, "byte 5 is not utf-8"),
        (b"text " * 2**19 + b"\xff", (), 1, "is not utf-8"),  # found while training
        (b"text \0", (), 1, "not a text file"),
    ],
)
def test_bad_input_is_rejected_and_writes_nothing(cli, tmp_path, content, flags, status, message):
    (tmp_path / "a.txt").write_bytes(content)
    result = cli("vocab", tmp_path / "a.txt", tmp_path / "out", *flags)
    assert result.returncode == status and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_missing_or_encoded_input_and_a_bad_output_are_reported(cli, tmp_path):
    result = cli("vocab", tmp_path / "nothing.txt", tmp_path / "out")
    assert result.returncode == 1 and "no file matches" in result.stderr
    (tmp_path / "a.npz").write_bytes(b"")
    result = cli("vocab", tmp_path, tmp_path / "out")
    assert result.returncode == 1 and "a.npz contains token ids, not text" in result.stderr
    (tmp_path / "a.npz").unlink()
    (tmp_path / "a.txt").write_text("text")
    result = cli("vocab", tmp_path / "a.txt", tmp_path / "a.txt")
    assert result.returncode == 1 and "cannot write" in result.stderr
    assert (tmp_path / "a.txt").read_text() == "text"
    assert cli("vocab", tmp_path, "").returncode == 2


def test_the_checksums_of_a_replaced_vocabulary_are_replaced(cli, corpus, tmp_path):
    folder = tmp_path / "out"
    assert cli("vocab", corpus, folder, "--size", 300).returncode == 0
    folders.write_sums(folder)
    assert cli("vocab", corpus, folder, "--size", 260, "--overwrite").returncode == 0
    assert encoder.load(folder).n_vocab == 260

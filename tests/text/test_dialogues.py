"""Prompts with completions and messages -> documents, and the tokens that count in the loss."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import TINY

from gpt2cli.errors import UsageError, UserError
from gpt2cli.options import TextOptions, split_template
from gpt2cli.storage import folders
from gpt2cli.text import corpus, documents, encoded, encoder, inputs, marks, stored
from gpt2cli.text.batches import Tokens

PAIRS = [
    {"prompt": "The kettle", "completion": " clicked off"},
    {"prompt": "A letter", "completion": "", "n": 1},
    {"prompt": "", "completion": "a class"},
    {"prompt": "", "completion": ""},
]
CHATS = [
    [("system", "Be brief."), ("user", "a def?"), ("assistant", "yes"), ("user", "why")],
    [("user", "a"), ("assistant", ""), ("assistant", "b<|endoftext|>c")],
]


@pytest.fixture(scope="module")
def tiny_bpe():
    return encoder.load(TINY)


def messages(chat):
    return {"messages": [{"role": role, "content": content} for role, content in chat]}


def write(folder, name, records):
    path = folder / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        rows = [records[0].keys(), *(record.values() for record in records)]
        path.write_text("".join(",".join(json.dumps(str(v)) for v in row) + "\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ids_in(path, vocabulary, **flags):
    """Return the stored ids of a file, all chunks together."""
    parts = encoded.encode([path], vocabulary, TextOptions(**flags), vocabulary.n_vocab)
    return np.concatenate([*encoded.chunks(parts)])


def described(ids, end):
    """Return (id, whether it is learnt, whether a document ends) of each stored id."""
    columns = marks.ids_of(ids), marks.is_learnt(ids), marks.is_end(ids, end)
    return [(int(i), bool(learnt), bool(ends)) for i, learnt, ends in zip(*columns, strict=True)]


def expected(vocabulary, pieces, special=True):
    """Return as `described` the ids of (text, learnt); "END" ends a document, "TURN" a message."""
    found = []
    for text, learnt in pieces:
        if text in ("END", "TURN"):
            found.append((vocabulary.end, learnt, text == "END"))
        else:
            found += [(i, learnt, False) for i in vocabulary.encode(text, special=special)]
    return found


PAIR_PIECES = [
    *[("The kettle", False), (" clicked off", True), ("END", True)],
    *[("A letter", False), ("END", True)],
    *[("a class", True), ("END", True)],
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_only_the_completion_of_a_prompt_counts_in_the_loss(tmp_path, tiny_bpe, name):
    pairs = [{k: v for k, v in pair.items() if k != "n"} for pair in PAIRS]
    path = write(tmp_path, name, pairs)
    ids = ids_in(path, tiny_bpe, loss="completion")
    assert described(ids, tiny_bpe.end) == expected(tiny_bpe, PAIR_PIECES)
    whole = ids_in(path, tiny_bpe)
    assert whole.dtype == np.uint16 and whole.tolist() == marks.ids_of(ids).tolist()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("loss", ["completion", "all"])
def test_only_messages_of_the_assistant_count_in_the_loss(tmp_path, tiny_bpe, name, loss):
    path = write(tmp_path, name, [messages(chat) for chat in CHATS])
    pieces = [
        *[("Be brief.", False), ("TURN", False), ("a def?", False), ("TURN", False)],
        *[("yes", True), ("TURN", True), ("why", False), ("END", False)],
        # the end token in the last message ends no document
        *[("a", False), ("TURN", False), ("TURN", True)],
        *[("b", True), ("TURN", True), ("c", True), ("END", True)],
    ]
    pieces = [(text, learnt or loss == "all") for text, learnt in pieces]
    ids = ids_in(path, tiny_bpe, loss=loss)
    assert described(ids, tiny_bpe.end) == expected(tiny_bpe, pieces)


def test_a_template_has_the_fields_of_a_record(tmp_path, tiny_bpe):
    path = write(tmp_path, "a.jsonl", PAIRS[:1])
    template = r"Q: {prompt}\n<|endoftext|>A:{completion} {{ok}}\\n"
    ids = ids_in(path, tiny_bpe, template=template, loss="completion", special="text")
    pieces = [("Q: ", False), ("The kettle", False), ("\n", False), ("TURN", False)]
    pieces += [("A:", False), (" clicked off", True), (" {", True), ("ok}", True), ("\\n", True)]
    assert described(ids, tiny_bpe.end) == expected(tiny_bpe, [*pieces, ("END", True)])
    # a template that ends with the end token gets no second one
    ids = ids_in(path, tiny_bpe, template="{prompt}{completion}<|endoftext|>", loss="completion")
    assert described(ids, tiny_bpe.end) == expected(tiny_bpe, PAIR_PIECES[:3])


def test_the_last_field_is_the_completion_where_none_is_named_so(tmp_path, tiny_bpe):
    record = {"instruction": "a def", "input": "", "output": "a class"}
    path = write(tmp_path, "a.csv", [record])
    ids = ids_in(path, tiny_bpe, template="{instruction}\n{input}\n{output}", loss="completion")
    pieces = [("a def\n\n", False), ("a class", True), ("END", True)]
    assert described(ids, tiny_bpe.end) == expected(tiny_bpe, pieces)


def test_a_template_of_messages_is_used_for_each(tmp_path, tiny_bpe):
    path = write(tmp_path, "a.jsonl", [messages(CHATS[0][1:3])])
    ids = ids_in(path, tiny_bpe, template=r"{role}: {content}\n", loss="completion")
    # as `sample` reads the prompt: in one piece
    pieces = [("user: a def?\nassistant: ", False), ("yes", True), ("\n", True), ("END", True)]
    assert described(ids, tiny_bpe.end) == expected(tiny_bpe, pieces)


def test_a_literal_end_token_in_a_field_obeys_special(tmp_path, tiny_bpe):
    path = write(tmp_path, "a.jsonl", [{"prompt": "a<|endoftext|>b", "completion": "c"}])
    ids = ids_in(path, tiny_bpe, special="text", template="{prompt}<|endoftext|>{completion}")
    assert (marks.ids_of(ids) == tiny_bpe.end).sum() == 2
    ids = ids_in(path, tiny_bpe)
    assert (marks.ids_of(ids) == tiny_bpe.end).sum() == 2 and marks.is_end(
        ids, tiny_bpe.end
    ).sum() == 1


def test_a_message_of_weight_0_does_not_count(tmp_path, tiny_bpe):
    chat = messages([("assistant", "a"), ("assistant", "b")])
    chat["messages"][0]["weight"] = 0
    ids = ids_in(write(tmp_path, "a.jsonl", [chat]), tiny_bpe, loss="completion")
    pieces = [("a", False), ("TURN", False), ("b", True), ("END", True)]
    assert described(ids, tiny_bpe.end) == expected(tiny_bpe, pieces)


def test_a_wordpiece_dialogue_begins_with_cls_and_ends_with_sep(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n今\n天\n", encoding="utf-8")
    vocabulary = encoder.load(tmp_path)
    path = write(tmp_path, "a.jsonl", [{"prompt": "今", "completion": "天"}])
    ids = ids_in(path, vocabulary, loss="completion")
    assert ids.tolist() == [*marks.read_only(np.array([1, 3])), 4, 2] and ids.dtype == np.int32


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, '"messages" must be a list'),
        ({"messages": "x"}, '"messages" must be a list'),
        ({"messages": [{"role": "user"}]}, "message 1 must be an object with"),
        ({"messages": [{"role": "user", "content": None}]}, "content must be a text, not null"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "content must be a text, not a list"),
        ({"messages": [{"role": "assistant", "content": "", "weight": 2}]}, '"weight" must be 0'),
        ({"prompt": "x", "completion": 3}, "completion must be a text, not a number"),
        ({"prompt": "x"}, 'an object with a "text" string. Its text fields are prompt'),
        ({"prompt": "x", "completion": "y", "text": "z"}, "prompt and completion and text"),
    ],
)
def test_a_damaged_dialogue_is_rejected_with_the_place(tmp_path, tiny_bpe, record, message):
    path = write(tmp_path, "a.jsonl", [PAIRS[0], record])
    with pytest.raises(UserError, match=r"a\.jsonl line 2") as error:
        ids_in(path, tiny_bpe)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "template, message",
    [
        ("no field", "needs a field in braces"),
        ("{", "For a literal brace, write"),
        ("{a} }", "For a literal brace, write"),
        ("{}", "must be the name of a field"),
        ("{a!r}", "must be the name of a field"),
        ("{a:9}", "must be the name of a field"),
    ],
)
def test_a_template_with_wrong_braces_is_rejected(template, message):
    with pytest.raises(UsageError, match=message):
        split_template(template)


def test_messages_are_rejected_where_the_model_has_its_own_template(
    tmp_path, tiny_bpe, cli, workdir
):
    write(workdir, "a.jsonl", [messages(CHATS[0])])
    model = workdir / "models/tiny"
    (model / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    for template in ("tokenizer_config.json", "chat_template.jinja"):
        result = cli("encode", "a.jsonl", "out.npz", "--model_name", "tiny")
        assert result.returncode == 1
        assert f"{template} has a chat template, which gpt2cli does not run" in result.stderr
        (model / "chat_template.jinja").write_text("{{ messages }}")
    result = cli("encode", "a.jsonl", "out.npz", "--model_name", "tiny", "--template", "{content}")
    assert result.returncode == 0, result.stderr
    assert documents.chat_template_of(folders.open_folder(TINY)) is None


def test_a_vocabulary_without_an_end_token_needs_a_template(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n今\n天\n", encoding="utf-8")
    (tmp_path / "hparams.json").write_text(
        json.dumps(dict(n_vocab=5, n_ctx=8, n_embd=8, n_head=2, n_layer=1, end_token=None))
    )
    vocabulary = encoder.load(tmp_path)
    path = write(tmp_path, "a.jsonl", [messages([("user", "今"), ("assistant", "天")])])
    with pytest.raises(UserError, match=r"no end token .* --template"):
        ids_in(path, vocabulary)
    ids = ids_in(path, vocabulary, template="{content}", loss="completion")
    assert ids.tolist() == [*marks.read_only(np.array([1, 3])), 4]


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("loss", ["completion", "all"])
def test_encoded_files_keep_the_marks(tmp_path, tiny_bpe, monkeypatch, suffix, loss):
    monkeypatch.setattr(corpus, "BLOCK", 2000)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "0.csv").write_text(
        "prompt,completion\n" + "a,b\n" * 4_000
    )  # 16 bits with --loss all
    write(folder, "1.jsonl", [messages(chat) for chat in CHATS])
    write(folder, "2.jsonl", PAIRS)
    options, out = TextOptions(loss=loss), tmp_path / f"out{suffix}"
    parts = encoded.encode(inputs.find(folder).paths, tiny_bpe, options, tiny_bpe.n_vocab)
    if suffix == ".npz":
        stored.save_npz(out, parts)
    else:
        stored.save_npy(out, parts, stored.dtype_of(tiny_bpe.n_vocab))
    direct = encoded.load(folder, tiny_bpe, options, tiny_bpe.n_vocab)
    loaded = encoded.load(
        out, None, options if loss == "completion" else TextOptions(), tiny_bpe.n_vocab
    )
    assert loaded.whole().dtype == np.int32 and (loaded.whole() < 0).any()
    assert loaded.whole().tolist() == direct.whole().tolist()
    if suffix == ".npz":
        assert loaded.fingerprint() == direct.fingerprint()


def test_corpora_without_anything_to_learn_or_to_leave_out_are_rejected(tmp_path, tiny_bpe, capsys):
    def load(path, **flags):
        return encoded.load(path, tiny_bpe, TextOptions(**flags), tiny_bpe.n_vocab)

    users = write(tmp_path, "a.jsonl", [messages([("user", "a def")])])
    with pytest.raises(UserError, match="contains no completion: none of its 3 tokens"):
        load(users, loss="completion")
    np.save(tmp_path / "a.npy", np.array([1, 2, 3], np.uint16))
    with pytest.raises(UserError, match=r"a\.npy contains no prompt, so --loss completion"):
        load(tmp_path / "a.npy", loss="completion")
    load(write(tmp_path, "b.jsonl", PAIRS), loss="completion")
    assert "tokens count in the loss; the others are only read" in capsys.readouterr().err
    for ids in ([1, -(2**31)], marks.read_only(np.array([tiny_bpe.n_vocab])), [1, -1], [1, -100]):
        np.save(tmp_path / "b.npy", np.array(ids, np.int32))
        with pytest.raises(UserError, match="the model knows only"):
            load(tmp_path / "b.npy")


@pytest.mark.parametrize("sampling", ["random", "sequential", "documents"])
def test_a_batch_has_plain_ids_and_a_mask_of_the_learnt_targets(sampling):
    rng = np.random.default_rng(1)
    ids, is_read = rng.integers(2, 90, 600).astype(np.int32), rng.random(600) < 0.5
    plain = Tokens([ids[:400], ids[400:]])
    masked = np.where(is_read, marks.read_only(ids), ids)
    tokens = Tokens([masked[:400], masked[400:]])
    assert tokens.learnt == 600 - is_read.sum()
    learnt = {0: ~is_read[:400], 1: ~is_read[400:]}
    one, other = (t.sampler(sampling, 16, 3, end=1) for t in (plain, tokens))
    for step in range(9):
        a, b = one.batch(step, 4, 0.2, 90), other.batch(step, 4, 0.2, 90)
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(a.targets, b.targets)
        for row, (chunk, start, stop) in enumerate(one.origin(step, 4)):
            expected = np.zeros(16)
            expected[: stop - start - 1] = learnt[chunk][start + 1 : stop]
            np.testing.assert_array_equal(b.mask[row], expected)
    counts = [
        sum(float(b.mask.sum()) for b in t.evaluation_windows(24, 2)) for t in (plain, tokens)
    ]
    assert counts == [599, (~is_read[1:]).sum()]


def test_a_dialogue_is_one_document_for_the_sampler_of_documents(tmp_path, tiny_bpe):
    path = write(tmp_path, "a.jsonl", [messages(chat) for chat in CHATS] + PAIRS[:1])
    for loss in ("all", "completion"):
        tokens = encoded.load(path, tiny_bpe, TextOptions(loss=loss), tiny_bpe.n_vocab)
        assert tokens.sampler("documents", 64, 1, tiny_bpe.end).count == 3


def test_a_share_of_the_documents_is_held_out_the_same_for_the_same_seed():
    chunk = np.concatenate([np.full(n % 5 + 2, n + 2) for n in range(90)])
    ends = np.flatnonzero(np.diff(chunk, append=-1))
    chunk[ends] = 1  # each document is its number plus 2, and ends with 1
    tokens = Tokens([chunk.astype(np.int32), np.array([99, 99]), np.array([98, 98, 1])])
    split = tokens.split(0.1, 7, 1)
    again, other = tokens.split(0.1, 7, 1), tokens.split(0.1, 8, 1)
    assert (split.documents, split.held_out_documents) == (83, 9)
    learnt, held = (set(part.whole().tolist()) - {1} for part in (split.tokens, split.held_out))
    assert not learnt & held and len(learnt) == 83 and len(held) == 9
    assert split.tokens.total + split.held_out.total == tokens.total
    assert again.held_out.whole().tolist() == split.held_out.whole().tolist()
    assert other.held_out.whole().tolist() != split.held_out.whole().tolist()
    for part in split.held_out.chunks:  # whole documents
        assert part[-1] == 1 or set(part.tolist()) == {99}
    assert tokens.split(0.001, 7, 1).held_out_documents == 1
    assert tokens.split(0.999, 7, 1).documents == 1
    with pytest.raises(UserError, match="contains 1 document, but --val_fraction needs at least 2"):
        Tokens([np.arange(9)], "a.txt").split(0.5, 1, end=None)


@pytest.mark.parametrize("special", ["token", "text"])
def test_an_added_token_in_a_template_is_that_token(tmp_path, special):
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(TINY / name, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": 2048, "<|bot|>": 2049}))
    vocabulary = encoder.load(tmp_path)
    record = {"prompt": "a <|bot|>", "completion": "b"}
    path = write(tmp_path, "a.jsonl", [record])
    template = "<|user|>{prompt}<|bot|>{completion}"
    ids = ids_in(path, vocabulary, template=template, loss="completion", special=special)
    prompt = vocabulary.encode("a <|bot|>", special=special == "token")
    read = [2048, *prompt, 2049]
    assert ids.tolist() == [
        *marks.read_only(np.array(read)),
        *vocabulary.encode("b"),
        vocabulary.end,
    ]
    assert (2049 in prompt) == (special == "token")

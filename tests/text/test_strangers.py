"""Tokenizer folders of other programs: which field decides, and what is said of the others."""

import json

import pytest
from foreign import byte_level, metaspace_bpe, wordpiece

from gpt2cli.errors import UserError
from gpt2cli.formats import vocabularies
from gpt2cli.storage import folders
from gpt2cli.text import encoder

N_VOCAB = 640


def values_of(made):
    return json.loads(made.to_str())


BPE, BERT = values_of(byte_level()), values_of(wordpiece())
VOCAB = BPE["model"]["vocab"]
FIRST = len(VOCAB)  # the id of the first new token
MERGES = [" ".join(pair) for pair in BPE["model"]["merges"]]
GPT2 = {"vocab.json": VOCAB, "merges.txt": "#version: 0.2\n" + "\n".join(MERGES)}
LIST = "".join(f"{t}\n" for t in sorted(BERT["model"]["vocab"], key=BERT["model"]["vocab"].get))


def read(folder, files, config=None, **others):
    """Return the vocabulary of a folder with these files, and what runs it."""
    named = {**files, **{f"{name}.json": values for name, values in others.items()}}
    if config is not None:
        named["tokenizer_config.json"] = config
    for name, values in named.items():
        text = values if isinstance(values, str) else json.dumps(values)
        (folder / name).write_text(text, encoding="utf-8", newline="")
    found = vocabularies.read(folder, N_VOCAB, folder)
    return found, encoder.choose(found.described, found.options.get("tokenizer"))


def token(text, **flags):
    return {"__type": "AddedToken", "content": text, "normalized": False, **flags}


# expected ids are those of transformers 5.24
@pytest.mark.parametrize(
    ("config", "others", "text", "expected"),
    [
        ({"bos_token": token("<n>", lstrip=True)}, {}, "a  <n>", [65, FIRST]),
        ({"bos_token": token("<n>", lstrip=True), "pad_token": "<n>"}, {}, "a<n>", [65, FIRST]),
        ({"image_token": "<n>"}, {}, "a<n>", [65, FIRST]),
        ({"extra_special_tokens": {"user_token": "<n>"}}, {}, "a<n>", [65, FIRST]),
        ({"additional_special_tokens": ["<b>"], "extra_special_tokens": ["<n>"]}, {}, "<n>",
         [FIRST]),
        ({"eos_token": "<e>", "bos_token": "<b>"}, {}, "<b><e>", [FIRST, FIRST + 1]),
        ({}, {"special_tokens_map": {"pad_token": token("<n>", rstrip=True)}}, "<n> a",
         [FIRST, 65]),
        ({"add_bos_token": True, "bos_token": None}, {}, "a", [65]),
    ],
)  # fmt: skip
def test_special_tokens_get_the_ids_and_flags_of_transformers(
    tmp_path, config, others, text, expected
):
    _, ours = read(tmp_path, GPT2, {"tokenizer_class": "GPT2Tokenizer", **config}, **others)
    assert [*ours.prefix, *ours.encode(text, special=True)] == expected


@pytest.mark.parametrize(
    ("files", "config", "note"),
    [
        ({"tokenizer.json": {**BPE, "normalizer": {"type": "NFKC"}}},
         {"tokenizer_class": "GPT2Tokenizer"}, "as GPT2Tokenizer, without its normalizer"),
        ({"tokenizer.json": BERT}, None, "without its normalizer, pre_tokenizer, decoder, model"),
        ({"tokenizer.json": {**BERT, "post_processor": None}},
         {"tokenizer_class": "BertTokenizer"}, "without its post_processor"),
        ({"tokenizer.json": BPE}, {"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class"),
        ({"tokenizer.json": {**BPE, "model": {**BPE["model"], "dropout": 0.1}}},
         {"tokenizer_class": "PreTrainedTokenizerFast"}, "dropout in tokenizer.json is ignored"),
        (GPT2, {"tokenizer_class": "BertTokenizer"}, "it does not read vocab.json"),
        ({"vocab.txt": LIST}, {"tokenizer_class": "GPT2Tokenizer"}, "it does not read vocab.txt"),
        ({**GPT2, "added_tokens.json": {"<n>": FIRST + 5}}, {}, "transformers 5 gives it"),
        ({**GPT2, "added_tokens.json": {"The": FIRST}}, {}, "which counts"),
        ({**GPT2, "generation_config.json": {"eos_token_id": "7"}}, {}, "eos_token_id '7'"),
        ({**GPT2, "config.json": {"eos_token_id": [5, 9999]}}, {}, "eos_token_id 9999 in config"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_read_as_in_transformers_is_named(tmp_path, files, config, note):
    found, _ = read(tmp_path, files, config)
    assert any(note in sentence for sentence in found.notes()), [*found.notes()]


@pytest.mark.parametrize(
    ("files", "config", "reason"),
    [
        ({**GPT2, "added_tokens.json": {"<n>": 7}}, {}, "have the same id 7"),
        ({**GPT2, "config.json": {"tokenizer_class": "T5Tokenizer"}}, {}, "is 'T5Tokenizer'"),
        ({"tokenizer.json": {**BPE, "added_tokens": [{"id": 630, "content": "<n>"}]}}, {}, "a gap"),
        ({"tokenizer.json": {**BPE, "decoder": {"type": []}}}, {}, "decoder has another type"),
        ({"tokenizer.json": {**BPE, "added_tokens": [{"id": 1e400, "content": "x"}]}}, {}, "inf"),
        ({"tokenizer.json": {**BPE, "model": {**BPE["model"], "continuing_subword_prefix": "@@"}}},
         {}, "continuing_subword_prefix"),
        ({"tokenizer.json": {**BPE, "post_processor": {"type": "TemplateProcessing",
          "single": [{"Sequence": {"id": "A"}}] * 2, "special_tokens": {}}}}, {}, "text once"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_contradicts_itself_is_rejected_in_one_line(
    tmp_path, files, config, reason
):
    with pytest.raises(UserError) as error:
        read(tmp_path, files, config)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_class_in_config_json_is_kept_in_hparams(tmp_path):
    files = {**GPT2, "config.json": {"tokenizer_class": "GPT2Tokenizer"}}
    found, _ = read(tmp_path, files)
    assert found.options["tokenizer_class"] == "GPT2Tokenizer"


def test_merges_that_are_missing_are_noticed(tmp_path):
    lines = [line for n, line in enumerate(MERGES) if n % 7 != 3]
    found, ours = read(tmp_path, {**GPT2, "merges.txt": "\n".join(lines)})
    assert found.options["tokenizer"] == "tokenizers" and type(ours) is encoder.TokenizerJson


def test_a_verdict_does_not_outlive_its_files(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    found, ours = read(folder, {"tokenizer.json": BPE}, {"tokenizer_class": "TokenizersBackend"})
    assert type(ours) is encoder.BPE and found.options["tokenizer"] == "bpe"
    sizes = {"n_vocab": N_VOCAB, "n_ctx": 8, "n_embd": 4, "n_head": 1, "n_layer": 1}
    (folder / "hparams.json").write_text(json.dumps({**sizes, **found.options}))
    assert type(encoder.load(folder)) is encoder.BPE
    split = {"type": "Digits", "individual_digits": True}
    both = {"type": "Sequence", "pretokenizers": [split, BPE["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps({**BPE, "pre_tokenizer": both}))
    assert type(encoder.load(folder)) is encoder.TokenizerJson


def test_an_end_token_that_is_text_stays_text_after_convert(tmp_path):
    values = values_of(metaspace_bpe())
    files = {"tokenizer.json": values, "config.json": {"eos_token_id": 400}}
    found, ours = read(tmp_path, files, {"tokenizer_class": "TokenizersBackend"})
    sizes = {"n_vocab": N_VOCAB, "n_ctx": 8, "n_embd": 4, "n_head": 1, "n_layer": 1}
    (tmp_path / "config.json").unlink()
    (tmp_path / "hparams.json").write_text(json.dumps({**sizes, **found.options}))
    again = encoder.load(folders.open_folder(tmp_path))
    assert (again.end, again.ends, again.added) == (400, (400,), ours.added)


@pytest.mark.parametrize(
    ("added", "text"),
    [
        ({"content": "<speaker1>"}, "a<speaker1>b c"),
        ({"content": "two words"}, "the two words\nx"),
        ({"content": "<n>", "rstrip": True}, "a<n>  b c"),
        ({"content": "今天"}, "x今天天气 y"),
    ],
)
def test_a_text_is_never_cut_inside_an_added_token(tmp_path, added, text):
    for n, values in enumerate((BPE, BERT)):
        folder = tmp_path / str(n)
        folder.mkdir()
        index = len(values["model"]["vocab"])
        flags = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        entry = {**flags, "special": True, "id": index, **added}
        files = {"tokenizer.json": {**values, "added_tokens": [*values["added_tokens"], entry]}}
        _, ours = read(folder, files, {"tokenizer_class": "TokenizersBackend"})
        whole = ours.encode(text, special=True)
        assert index in whole
        for match in ours.CUT.finditer(text):
            parts = text[: match.start()], text[match.start() :]
            assert [i for part in parts for i in ours.encode(part, special=True)] == whole


def test_new_tokens_follow_those_that_have_no_id(tmp_path):
    found, _ = read(tmp_path, GPT2, {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>"})
    wider = found.with_added(["<n>"], tmp_path)
    assert json.loads(wider.files["added_tokens.json"]) == {"<pad>": FIRST, "<n>": FIRST + 1}

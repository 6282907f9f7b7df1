"""SentencePiece models: ids and texts equal those of the sentencepiece package."""

import copy
import importlib
import io
import json

import pytest
from foreign import CORPUS, odd_texts

from gpt2cli.errors import UserError
from gpt2cli.formats import vocabularies
from gpt2cli.text import encoder
from gpt2cli.text.sentencepiece_model import SentencePiece

OPTIONS = {
    "usual": {},
    "bytes": {"byte_fallback": True, "vocab_size": 400},
    "identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no prefix": {"add_dummy_prefix": False},
    "user-defined": {"user_defined_symbols": ["<sep>", "x>0"]},
    "bpe": {"model_type": "bpe"},
}


def train(folder, **options):
    """Write spiece.model; return the package's processor of it."""
    package = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    written = io.BytesIO()
    options = {"vocab_size": 130, "hard_vocab_limit": False, "minloglevel": 2, **options}
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=written, **options
    )
    (folder / "spiece.model").write_bytes(written.getvalue())
    return package.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ids_and_texts_are_those_of_the_package(tmp_path, options):
    theirs = train(tmp_path, **options)
    ours = encoder.load(tmp_path)
    assert type(ours) is SentencePiece and ours.n_vocab == theirs.get_piece_size()
    texts = list(odd_texts(3000))
    ids = [found.tolist() for found in ours.arrays(texts)]
    assert ids == theirs.encode([text for text in texts])
    for one in ids[:300]:
        stream = ours.stream()
        pieces = [stream.feed([index]) for index in one]
        twin = copy.copy(stream)
        assert "".join(pieces) + stream.finish() == "".join(pieces) + twin.finish()
        assert "".join(pieces) + stream.finish() == ours.decode(one) == theirs.decode(one)
    for text in texts[:500]:
        for match in ours.CUT.finditer(text):
            assert ours.encode(text[: match.start()]) + ours.encode(text[match.start() :]) == (
                ours.encode(text)
            )


def test_special_and_added_tokens_and_lower_case(tmp_path):
    theirs = train(tmp_path)
    size = theirs.get_piece_size()
    config = {"tokenizer_class": "T5Tokenizer", "do_lower_case": True, "eos_token": "</s>"}
    config |= {"bos_token": "<s>", "additional_special_tokens": ["<|User|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = vocabularies.read(tmp_path)
    ours = encoder.choose(found.described)
    assert (ours.start, ours.end, ours.ends) == (1, 2, (2,)) and ours.added["<|User|>"] == size
    assert ours.encode("THE KETTLE") == theirs.encode("the kettle")
    expected = [*theirs.encode("the "), size, *theirs.encode("off"), 2]
    assert ours.encode("The <|User|>OFF</s>", special=True) == expected
    assert not {1, 2, size} & set(ours.encode("The <|User|>OFF</s>"))
    assert ours.decode([*theirs.encode("the"), size]) == "the<|User|>"
    assert found.files.keys() == {"spiece.model", "tokenizer_config.json"}


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    train(tmp_path)

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"bin/install sentencepiece"):
        encoder.load(tmp_path)

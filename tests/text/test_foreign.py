"""Tokenizers of other models: ids and texts equal those of the tokenizers library."""

import copy
import json

import pytest
from foreign import KINDS, odd_texts
from tokenizers import Tokenizer

from gpt2cli.text import encoder
from gpt2cli.text.wordpiece import WordPiece


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """Return (name, our encoder, the library's tokenizer, the class that must run it)."""
    make, kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp("foreign")
    make().save(str(folder / "tokenizer.json"))
    # a trained Unigram resolves some ties in another way than after it was saved
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return request.param, encoder.load(folder), theirs, kind


def as_plain(theirs):
    """The library's tokenizer without added tokens."""
    values = json.loads(theirs.to_str())
    return Tokenizer.from_str(json.dumps({**values, "added_tokens": []}))


def test_the_ids_of_odd_texts_are_those_of_the_library(made):
    name, ours, theirs, kind = made
    assert type(ours) is kind
    texts = list(odd_texts(3000))
    expected = [one.ids for one in theirs.encode_batch(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in ours.arrays(texts, special=True)] == expected
    whole = [one.ids for one in theirs.encode_batch(texts[:50], add_special_tokens=True)]
    after = (
        ours.after
        if ours.after == [] or not whole[0]
        else theirs.encode("").ids[len(ours.prefix) :]
    )
    for ids, theirs_ids in zip(expected, whole, strict=False):
        assert [*ours.prefix, *ids, *after] == theirs_ids


def test_plain_text_never_gives_an_added_token(made):
    name, ours, theirs, kind = made
    unknown = {ours.unknown}
    added = set(ours.added.values()) - unknown
    assert added
    texts = list(odd_texts(1000, seed=1))
    found = ours.arrays(texts)
    reachable = {token for token, index in ours.added.items() if len(token) == 1}
    assert not reachable
    for text, ids in zip(texts, found, strict=True):
        assert not added & set(ids.tolist()), text
    without = [text for text in texts if not any(token in text for token in ours.added)]
    assert len(without) > 200
    expected = [one.ids for one in theirs.encode_batch(without, add_special_tokens=False)]
    assert [ids.tolist() for ids in ours.arrays(without)] == expected


def test_texts_decode_as_in_the_library_at_once_and_in_a_stream(made):
    name, ours, theirs, kind = made
    for text in odd_texts(300, seed=2):
        ids = ours.encode(text, special=True)
        stream = ours.stream()
        pieces = [stream.feed([index]) for index in ids]
        twin = copy.copy(stream)
        whole = "".join(pieces) + stream.finish()
        assert whole == ours.decode(ids) == "".join(pieces) + twin.finish()
        if kind is not WordPiece and "größe" not in text:
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_a_text_may_be_cut_where_the_encoder_says(made):
    name, ours, theirs, kind = made
    for text in odd_texts(1000, seed=3):
        for match in ours.CUT.finditer(text):
            parts = text[: match.start()], text[match.start() :]
            ids = [*ours.encode(parts[0], True), *ours.encode(parts[1], True)]
            assert ids == ours.encode(text, True), (name, parts)

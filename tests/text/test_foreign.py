"""Tokenizers of other models: ids and texts equal those of the tokenizers library.

Each kind is a small tokenizer that the library trains here, with one field that differs from
GPT-2's or BERT's own.
"""

import copy
import json
import random

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from gpt2cli.text import encoder
from gpt2cli.text.bpe import BPE
from gpt2cli.text.tokenizer_json import TokenizerJson
from gpt2cli.text.wordpiece import WordPiece

CORPUS = [
    "The kettle clicked off at half past six, and the 'other' kettle didn't.\n",
    "    def total(xs):\n\treturn sum(x for x in xs if x > 0)  # 42 lines, 2024\n\n\n",
    "We'll see; they've seen: it's 1999 or 2001... naïve café, ﬁne ｆｕｌｌ ½ Ünïcödé ẞ",
    "東京は夜の七時。今天天气不错，我们去河边。한국어 텍스트 नमस्ते 😀👍🏽 e\u0301 a\u0308",
    "THE WORLD Is Not enough [CLS] hello world <b> &amp; -- 50% of $3.50 \u00a0\u3000 end",
] * 4
END = "<|endoftext|>"
CLS, SEP = "[CLS]", "[SEP]"


def byte_level(normalizer=None, splitter=None, processor=None, added=(), **options):
    """A byte-level BPE that differs from GPT-2's in what is given."""
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, min_frequency=1, special_tokens=[END], initial_alphabet=alphabet
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(list(added))
    if processor:
        made.post_processor = processor
    return made


def wordpiece(splitter=None, **options):
    """BERT's WordPiece with other options of its normalizer."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(**options)
    made.pre_tokenizer = splitter or pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", CLS, SEP, "[MASK]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    )
    made.post_processor = template(f"{CLS} $A {SEP}", (CLS, 2), (SEP, 3))
    return made


def unigram(normalizer, splitter, decoder):
    """A Unigram model as SentencePiece makes them."""
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, splitter, decoder
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = template("$A </s>", ("</s>", 1))
    return made


def template(single, *special):
    return processors.TemplateProcessing(single=single, special_tokens=list(special))


def split_digits():
    pattern = Regex(r"\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+")
    inner = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), inner])


USER = AddedToken("<|user|>", special=False, normalized=False)
MASK = AddedToken("<mask>", lstrip=True, special=True)
KINDS = {
    "gpt2": (byte_level, BPE),
    "added tokens": (lambda: byte_level(added=[USER, AddedToken("<größe>"), "<a>"]), BPE),
    "prefix space": (lambda: byte_level(splitter=pre_tokenizers.ByteLevel()), TokenizerJson),
    "digits": (lambda: byte_level(splitter=split_digits()), TokenizerJson),
    "nfkc, lower case": (
        lambda: byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        TokenizerJson,
    ),
    "start token": (
        lambda: byte_level(processor=template(f"{END} $A", (END, 0))),
        BPE,
    ),
    "stripping added token": (lambda: byte_level(added=[MASK]), TokenizerJson),
    "nested added tokens": (lambda: byte_level(added=["<s>", "<s>x"]), TokenizerJson),
    "whole words first": (lambda: byte_level(ignore_merges=True), BPE),
    "bert": (lambda: wordpiece(), WordPiece),
    "bert, cased": (lambda: wordpiece(lowercase=False), WordPiece),
    "bert, accents": (lambda: wordpiece(strip_accents=False), WordPiece),
    "bert, chinese unsplit": (lambda: wordpiece(handle_chinese_chars=False), WordPiece),
    "bert, not cleaned": (lambda: wordpiece(clean_text=False), WordPiece),
    "bert, white space only": (lambda: wordpiece(pre_tokenizers.WhitespaceSplit()), TokenizerJson),
    "unigram": (
        lambda: unigram(
            normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()]),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        ),
        TokenizerJson,
    ),
    "metaspace bpe": (lambda: metaspace_bpe(), TokenizerJson),
}


def metaspace_bpe():
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *fallback]
    )
    made.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    values = json.loads(made.to_str())
    marks = ("<unk>", "<s>", "</s>")
    values["added_tokens"] = [e for e in values["added_tokens"] if e["content"] in marks]
    return Tokenizer.from_str(json.dumps(values))


def odd_texts(count, seed=0):
    """Texts of pieces on which tokenizers differ."""
    rng = random.Random(seed)
    pieces = [
        *(
            " ",
            "  ",
            "\n",
            "\n\n",
            "\t",
            "\r\n",
            "\u00a0",
            "\u3000",
            "\u2003",
            "\u200b",
            "\x1c",
            "\x85",
        ),
        *("'s", "'LL", "’t", "don't", "1", "12", "2024", "1,234.5", "½", "²", "Ⅷ", "१२", "①"),
        *(
            "é",
            "e\u0301",
            "ñ",
            "Å",
            "ﬁ",
            "ﬂ",
            "ẞ",
            "ß",
            "İ",
            "ı",
            "Σ",
            "ς",
            "ǆ",
            "ｆｕｌｌ",
            "ﷺ",
            "㎏",
        ),
        *(
            "中文",
            "今天",
            "東京",
            "か\u3099",
            "ｶﾞ",
            "한국",
            "텍스트",
            "\u1112\u1161\u11ab",
            "नमस्ते",
            "שלום",
        ),
        *(
            "العربية",
            "ไทย",
            "😀",
            "👍🏽",
            "👩‍👩‍👧",
            "🇩🇪",
            "𝔘",
            "\U00020000",
            "\ue000",
            "\ufffd",
            "\ufeff",
        ),
        *(
            "The",
            " the",
            "kettle",
            "WORLD",
            "iPhone",
            "x>0",
            "->",
            "/*",
            "#",
            "_",
            "__init__",
            "==",
            "...",
        ),
        *(
            END,
            "<|user|>",
            "<größe>",
            "<mask>",
            "<s>",
            "<s>x",
            "</s>",
            "<a>",
            CLS,
            SEP,
            "[UNK]",
            "[ CLS",
        ),
        *(
            "<0x0A>",
            "▁",
            "▁the",
            "##s",
            "Ġ",
            "Ċ",
            "<unk>",
            "<pad>",
            "\x00",
            "\x07",
            "\x7f",
            "a" * 120,
        ),
    ]
    for _ in range(count):
        yield "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """Return (name, our encoder, the library's tokenizer, the class that must run it)."""
    make, kind = KINDS[request.param]
    theirs = make()
    folder = tmp_path_factory.mktemp("foreign")
    theirs.save(str(folder / "tokenizer.json"))
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

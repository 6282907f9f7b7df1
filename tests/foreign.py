"""Small tokenizers of other models, each with one field that differs from GPT-2's or BERT's own."""

import json
import random

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


def unigram(normalizer, splitter, decoder, is_ended=False):
    """A Unigram model as SentencePiece makes them."""
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, splitter, decoder
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    made.train_from_iterator(CORPUS, trainer)
    if is_ended:
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
    "unigram with an end": (
        lambda: unigram(
            normalizers.NFKC(), pre_tokenizers.Metaspace(), decoders.Metaspace(), is_ended=True
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

"""Text <-> token ids: GPT-2's byte-pair encoding, BERT's WordPiece or any tokenizer.json.

`load` chooses by the files of a folder; nothing here uses the network. All kinds have the same
methods and these attributes:
    n_vocab     number of ids: the highest plus one
    end         id that follows a document, or None
    ends        ids that end a sample; `end` is among them unless the model's files say otherwise
    start       id that a sample from nothing begins with, or None
    added       text -> id of the tokens that `encode(text, special=True)` recognizes in a text
    unknown     id of the token for text that the vocabulary lacks, or None
    prefix      ids before a prompt and before a document
    after       ids after a document
    banned      ids that are never sampled
    CUT         regex that finds the last place where a text may be cut so that both parts together
                encode to the ids of the whole; the cut is at the start of the match
"""

import functools
import itertools
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from gpt2cli.errors import UserError
from gpt2cli.storage import folders
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text import tokenizer_files
from gpt2cli.text.bpe import BPE
from gpt2cli.text.description import Description
from gpt2cli.text.sentencepiece_model import SentencePiece
from gpt2cli.text.tokenizer import Tokenizer
from gpt2cli.text.tokenizer_files import KINDS
from gpt2cli.text.tokenizer_json import TokenizerJson
from gpt2cli.text.wordpiece import WordPiece

__all__ = ["BPE", "KINDS", "Encoder", "SentencePiece", "TokenizerJson", "WordPiece"]

Encoder = Tokenizer

FASTER = {"BPE": "bpe", "WordPiece": "wordpiece"}  # kind of tokenizer -> verdict

# Texts on which tokenizers differ: normal forms, case, digits, scripts without spaces, ligatures,
# white space, contractions, code.
PROBES = (
    "Hello, world! It's 2024; they'll've PAID 1,234.56 EUR (50%) for iPhones.",
    "  leading\t\ttabs  and   spaces \n\n\n  new\r\nlines\u00a0\u2003\u3000end  ",
    "Crème brûlée Ünï\u0301cödé Åse e\u0301 n\u0303 ﬁle ﬂat ½ ² Ⅷ ㎏ ｆｕｌｌ ＷＩＤＴＨ",
    "今天天气不错，我们去河边。東京は夜の七時。カタカナ ｶﾀｶﾅ 한국어 텍스트 안녕",
    "नमस्ते शुभ שלום العربية ไทย Ελληνικά ΣΊΣΥΦΟΣ Привет İstanbul ıI ß ẞ",
    "for (i=0; i<10; ++i) { x[i] = y->z * 3e-5; }\n\tdef f(_x): return 'a' # TODO",
    "👍🏽 👩‍👩‍👧 🇩🇪 \u200b\u200d\ufeff\u0007\u0000\u001f\x7f\x85 ﷺ 𝔘𝔫𝔦 '' \"\" `` … —–- ..",
    "",
    " ",
    "a",
    " a",
    "1234567 12 345",
    "word",
    "ALLCAPS MiXeD lower",
)


def exists(folder: str | Path) -> bool:
    """Return whether the folder contains any vocabulary file, complete or not."""
    return bool(tokenizer_files.names_in(folder))


def load(folder: str | Path | ModelFolder) -> Encoder:
    """Return the vocabulary of a folder.

    Raises:
        UserError: files are missing or damaged; the text names the file and what to do.
    """
    opened = folder if isinstance(folder, ModelFolder) else folders.open_folder(folder)
    described = tokenizer_files.describe(opened)
    recorded = {} if opened.sizes is None else opened.sizes.extra
    if "tokenizer" not in recorded:
        return choose(described)
    contents = (opened.read(name) for name in folders.ENCODER_FILES if opened.has(name))
    found = recorded["tokenizer"]
    is_fresh = recorded.get("tokenizer_crc32") == checksum(found, contents)
    return choose(described, found if is_fresh else verdict(described))


def checksum(found: object, contents: Iterable[bytes]) -> str:
    """Return the CRC-32 of a verdict and the files in ENCODER_FILES, in that order."""
    seed = zlib.crc32(str(found).encode())
    return f"{functools.reduce(lambda crc, content: zlib.crc32(content, crc), contents, seed):08x}"


def choose(described: Description, found: object = None) -> Encoder:
    """Return the encoder of a tokenizer: a faster one only if it was proved equal to the library.

    Args:
        described: the tokenizer.
        found: its verdict, from `verdict`; None if there is none.

    Raises:
        UserError: the library rejects the tokenizer.
    """
    if described.kind == "SentencePiece":
        return SentencePiece(described)
    if found is None:
        is_own = needs_no_verdict(described)
        found = FASTER[described.kind] if is_own else verdict(described)
    if found == "bpe" and described.kind == "BPE":
        return BPE(described)
    if found == "wordpiece" and described.kind == "WordPiece":
        return WordPiece(described)
    return TokenizerJson(described)


def needs_no_verdict(described: Description) -> bool:
    """Return whether a tokenizer is GPT-2's, BERT's or SentencePiece's own: nothing to compare."""
    return described.kind == "SentencePiece" or (described.is_plain and _is_simple(described))


def verdict(described: Description) -> str:
    """Return bpe or wordpiece if that encoder gives the library's ids on all probes, or tokenizers.

    The probes are PROBES, each alone and among added tokens, and each token of the vocabulary.

    Raises:
        UserError: the library rejects the tokenizer.
    """
    is_simple = _is_simple(described)
    if needs_no_verdict(described):  # only the merges may differ
        alone = {**described.values, "added_tokens": [], "post_processor": None}
        described = replace(described, values=alone, start=None, end=None, ends=())
    library = TokenizerJson(described)
    if not is_simple:
        return "tokenizers"
    try:
        fast = WordPiece(described) if described.kind == "WordPiece" else BPE(described)
    except UserError:  # it lacks bytes or BERT's special tokens
        if described.is_plain:  # and nothing else says that it is right without them
            raise
        return "tokenizers"
    tokens = [
        fast.bytes_of([index]).decode("utf-8", "replace") for index in described.vocab.values()
    ]
    joined = "".join(
        itertools.chain(*itertools.zip_longest(described.added, PROBES, fillvalue=" "))
    )
    few = [*PROBES, joined, joined.replace(" ", "")]
    for special, probes in ((True, few), (False, [*few, *tokens])):
        pairs = zip(fast.arrays(probes, special), library.arrays(probes, special), strict=True)
        if not all(ours.tolist() == theirs.tolist() for ours, theirs in pairs):
            return "tokenizers"
    return FASTER[described.kind]


def _is_simple(described: Description) -> bool:
    """Return whether BPE or WordPiece can represent the tokenizer at all."""
    texts = sorted(described.added)
    nested = any(b.startswith(a) for a, b in itertools.pairwise(texts))  # longest match
    # the library looks for tokens that are not normalized first, so the leftmost may lose
    entries = described.values["added_tokens"]
    firsts = {text[0] for text in texts}
    may_overlap = any(not firsts.isdisjoint(text[1:]) for text in texts)
    mixed = may_overlap and len({entry["normalized"] for entry in entries}) > 1
    flags = ("single_word", "lstrip", "rstrip")
    if nested or mixed or any(entry[flag] for entry in entries for flag in flags):
        return False
    if described.kind == "BPE":  # in tiktoken a token has one rank
        return described.is_byte_level and len({*described.merged}) == len(described.merged)
    normalizer = described.values.get("normalizer") or {}
    model = described.model
    return (
        described.kind == "WordPiece"
        and normalizer.get("type") == "BertNormalizer"
        and (described.values.get("pre_tokenizer") or {}).get("type") == "BertPreTokenizer"
        and (model.get("unk_token"), model.get("continuing_subword_prefix")) == ("[UNK]", "##")
    )


def of_model(folder: str | Path | ModelFolder, n_vocab: int | None = None) -> Encoder | None:
    """Return the vocabulary of a model folder; None where there is none, so it takes ids only.

    Args:
        folder: the model folder.
        n_vocab: rows of the token embedding; if not given, the sizes of the folder say it.

    Raises:
        UserError: the vocabulary is damaged, or has more tokens than the model.
    """
    opened = folder if isinstance(folder, ModelFolder) else folders.open_folder(folder)
    if not exists(opened.path):
        return None
    vocabulary = load(opened)
    check_fits(opened, vocabulary, n_vocab or ids_of(opened, vocabulary))
    return vocabulary


def check_fits(folder: ModelFolder, vocabulary: Encoder, n_vocab: int) -> None:
    """Reject (UserError) a vocabulary with more tokens than the model."""
    if vocabulary.n_vocab > n_vocab:
        raise UserError(
            f"{folder.path}: the vocabulary has {vocabulary.n_vocab} tokens, but the model only "
            f"{n_vocab} (hparams.json). Use the vocabulary files that belong to it"
        )


def ids_of(folder: str | Path | ModelFolder, vocabulary: Encoder | None) -> int:
    """Return the number of ids that a folder's model knows, without reading its weights.

    GPT2_ML's JSON file says 8021 beside the release with 21128 tokens (and 21130 rows), so a larger
    vocabulary counts there.
    """
    opened = folder if isinstance(folder, ModelFolder) else folders.open_folder(folder)
    n_vocab = opened.known_sizes().n_vocab
    is_hparams = opened.sizes_path is not None and opened.sizes_path.name == "hparams.json"
    if is_hparams or vocabulary is None:
        return n_vocab
    return max(n_vocab, vocabulary.n_vocab)

"""transformers' tokenizer classes: their own special tokens, and the fields that they replace.

A class such as GPT2Tokenizer takes the vocabulary from tokenizer.json in transformers 5, but makes
the other parts itself (tokenization_gpt2.py, tokenization_bert.py).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from gpt2cli.text.description import Description, leaves

END = "<|endoftext|>"
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast")
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # tokenizer.json decides alone
# Classes that the files alone describe.
CLASSES = (*GPT2_CLASSES, *BERT_CLASSES, *GENERIC_CLASSES)
SENTENCEPIECE_CLASSES = ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast")
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Options of BertTokenizer -> fields of BertNormalizer, and their defaults.
BERT_OPTIONS: dict[str, tuple[str, bool | None]] = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


def default_tokens(made_for: object) -> dict[str, str | None]:
    """Return the special tokens that a class has if no file names them: key -> text."""
    if made_for in GPT2_CLASSES:
        return dict.fromkeys(("unk_token", "bos_token", "eos_token"), END)
    if made_for in BERT_CLASSES:
        return {f"{token[1:-1].lower()}_token": token for token in BERT_SPECIAL}
    return {}


def replaced(
    made_for: object, found: Description, named: Mapping[str, str | None], has_prefix_option: bool
) -> list[str]:
    """Return the fields of a tokenizer.json that a class of transformers 5 replaces.

    Args:
        made_for: name of the class; None means GPT2Tokenizer.
        found: the tokenizer, with the options of the class applied.
        named: key -> text of the special tokens.
        has_prefix_option: add_prefix_space in the file's pre_tokenizer is what the class takes.
    """
    if made_for is None or made_for in GPT2_CLASSES:
        return [*_gpt2_replaces(found, has_prefix_option)]
    return [*_bert_replaces(found, named)] if made_for in BERT_CLASSES else []


def _gpt2_replaces(found: Description, has_prefix_option: bool) -> Iterator[str]:
    values, model = found.values, found.model
    if values.get("normalizer"):
        yield "normalizer"
    splitters = leaves(values.get("pre_tokenizer") or {}, "pretokenizers")
    usual = {"type": "ByteLevel", "use_regex": True}
    if not has_prefix_option:
        usual["add_prefix_space"] = False
    fields = [{k: s.get(k, True) for k in usual} for s in splitters]
    if fields != [usual]:
        yield "pre_tokenizer"
    if not found.is_byte_level:
        yield "decoder"
    if found.kind != "BPE":
        yield "model"
        return
    names = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback")
    yield from (f"model.{name}" for name in names if model.get(name))


def _bert_replaces(found: Description, named: Mapping[str, str | None]) -> Iterator[str]:
    values, model, tokens = found.values, found.model, found.tokens
    normalizer = values.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer" or normalizer.get("clean_text") is False:
        yield "normalizer"
    if (values.get("pre_tokenizer") or {}).get("type") != "BertPreTokenizer":
        yield "pre_tokenizer"
    usual = [[tokens.get(named.get(f"{name}_token") or "")] for name in ("cls", "sep")]
    if [*found.around()] != usual:
        yield "post_processor"
    if (values.get("decoder") or {}).get("type") != "WordPiece":
        yield "decoder"
    if found.kind != "WordPiece":
        yield "model"
        return
    fields: dict[str, Any] = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    fields["unk_token"] = named.get("unk_token")
    yield from (
        f"model.{name}" for name, value in fields.items() if model.get(name, value) != value
    )

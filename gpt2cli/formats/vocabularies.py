"""The vocabulary files of other programs under our names, and back under transformers'."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import folders
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text import bpe, encoder

Vocabulary = dict[str, bytes]  # our name of each file -> its content; empty without a vocabulary

OUR_NAMES = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
HF_NAMES = {ours: theirs for theirs, ours in OUR_NAMES.items()}
# The classes of transformers that read text as our encoder does; the last two are generic.
TOKENIZERS = (
    *("BertTokenizer", "BertTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast"),
    *("PreTrainedTokenizerFast", "TokenizersBackend"),
)
OPTIONS = ("lower_case", "start_token", "end_token")  # of ModelConfig.extra


class Found(NamedTuple):
    """A vocabulary, and how the files beside it say that text is read.

    Attributes:
        vocabulary: empty if none was found.
        options: those of OPTIONS that differ from our encoder's defaults.
        warnings: a sentence for each difference from our encoder.
    """

    vocabulary: Vocabulary
    options: dict[str, Any]
    warnings: list[str]


def write_object(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path, n_vocab: int) -> Found:
    """Read a vocabulary.

    Args:
        path: a folder, or a vocabulary file.
        n_vocab: the model's number of ids; added tokens beyond it are left out.

    Raises:
        UserError: a file is damaged, or lacks its companion.
    """
    known = {*encoder.KINDS[0], *encoder.KINDS[1], "tokenizer.json"}
    if path.name == "vocab.txt" and not (path.parent / "encoder.json").exists():
        known.add(path.name)  # the files beside it say how it is read
    if path.is_file() and path.name not in known:
        return Found({"vocab.txt": files.read_bytes(path)}, {}, [])
    folder = folders.open_folder(path.parent if path.is_file() else path)
    options, warnings = _reading_options(folder)
    for kind in encoder.KINDS:
        if all(folder.has(name) for name in kind):
            found = {OUR_NAMES.get(name, name): folder.read(name) for name in kind}
            if kind != ("vocab.txt",):
                options.pop("lower_case", None)
                found["encoder.json"] = _with_added(found["encoder.json"], folder.path, n_vocab)
            return Found(found, options, warnings)
    if folder.has("tokenizer.json"):
        where = folder.path / "tokenizer.json"
        try:
            return _from_tokenizer_json(where, n_vocab, options, warnings)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where} does not have the tokenizers format ({error!r})") from None
    if encoder.exists(folder.path):
        encoder.load(folder)  # raises a UserError that names the missing companion
    return Found({}, {}, warnings)


def _reading_options(folder: ModelFolder) -> tuple[dict[str, Any], list[str]]:
    """Return the options and the warnings that a folder's JSON files give."""
    options: dict[str, Any] = {}
    warnings = []
    if folder.has("tokenizer_config.json"):
        where = folder.path / "tokenizer_config.json"
        values = files.parse_object(folder.read(where.name), where)
        if values.get("do_lower_case") is False:
            options["lower_case"] = False
        if values.get("add_prefix_space") is True:
            warnings.append("its tokenizer puts a space before a text; gpt2cli does not")
        made_for = values.get("tokenizer_class")
        if made_for is not None and made_for not in TOKENIZERS:
            warnings.append(f"its tokenizer is {made_for}; gpt2cli may encode text differently")
    if folder.sizes is not None:
        extra = folder.sizes.extra
        options |= {key: extra[key] for key in OPTIONS if key in extra}
    return options, warnings


def tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """Return token -> id of a vocabulary."""
    if "encoder.json" in vocabulary:
        values = json.loads(vocabulary["encoder.json"])
        return {token: index for token, index in values.items() if type(index) is int}
    lines = vocabulary.get("vocab.txt", b"").decode("utf-8", "replace").removesuffix("\n")
    return {line.rstrip("\r"): index for index, line in enumerate(lines.split("\n")) if lines}


def _with_added(content: bytes, folder: Path, n_vocab: int) -> bytes:
    """Return encoder.json with the tokens of added_tokens.json that the model has room for."""
    vocab = files.parse_object(content, f"{folder}: the vocabulary")
    if not (folder / "added_tokens.json").is_file():
        return content
    added = files.read_object(folder / "added_tokens.json")
    taken = {index for index in vocab.values() if type(index) is int}
    new = {
        token: index
        for token, index in added.items()
        if type(index) is int and index < n_vocab and token not in vocab and index not in taken
    }
    return json.dumps({**vocab, **new}, ensure_ascii=False).encode() if new else content


def _from_tokenizer_json(
    path: Path, n_vocab: int, options: dict[str, Any], warnings: list[str]
) -> Found:
    """Read the one file of the tokenizers library; see `read`."""
    values = files.read_object(path)
    kind = values["model"] if isinstance(values.get("model"), dict) else {}
    vocab = kind.get("vocab")
    if kind.get("type") == "BPE" and isinstance(vocab, dict) and _is_byte_level(values):
        added = values.get("added_tokens") or []
        ids = {a["content"]: a["id"] for a in added if a["id"] < n_vocab}
        merges = [m if isinstance(m, str) else " ".join(m) for m in kind.get("merges", [])]
        options.pop("lower_case", None)
        found = {
            "encoder.json": json.dumps({**ids, **vocab}, ensure_ascii=False).encode(),
            "vocab.bpe": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        }
        return Found(found, options, warnings)
    if kind.get("type") == "WordPiece" and isinstance(vocab, dict):
        words = sorted(vocab, key=vocab.__getitem__)
        is_numbered = [vocab[word] for word in words] == list(range(len(words)))
        if is_numbered and not any("\n" in word for word in words):
            if (values.get("normalizer") or {}).get("lowercase") is False:
                options["lower_case"] = False
            return Found({"vocab.txt": "\n".join([*words, ""]).encode()}, options, warnings)
    warnings.append(f"gpt2cli cannot read this kind of {path} ({kind.get('type')})")
    return Found({}, {}, warnings)


def _is_byte_level(values: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json splits text as GPT-2 does: a part has the type ByteLevel."""
    splitter = values.get("pre_tokenizer") or {}
    return "ByteLevel" in [p.get("type") for p in [splitter, *splitter.get("pretokenizers", [])]]


def _default_special(vocabulary: Vocabulary) -> dict[str, str]:
    """Return the start_token and end_token that our encoder uses by default."""
    if "vocab.txt" in vocabulary:
        return {"start_token": "[CLS]", "end_token": "[SEP]"}
    return {"start_token": bpe.END, "end_token": bpe.END}


def special(vocabulary: Vocabulary, config: ModelConfig) -> tuple[str | None, str | None]:
    """Return the start token and the end token that our encoder will use, None for none."""
    there = tokens(vocabulary)
    defaults = _default_special(vocabulary)
    start, end = (config.extra.get(option, token) for option, token in defaults.items())
    return start if start in there else None, end if end in there else None


def hf_special(home: Path, folder: Path, vocabulary: Vocabulary) -> dict[str, str]:
    """Return the start_token and end_token of a Hugging Face model that are not our defaults.

    Args:
        home: the folder of its config.json, which has their ids.
        folder: the folder of its vocabulary.
        vocabulary: its vocabulary, from `read`.
    """
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            named |= files.read_object(folder / name)
    has_config = (home / "config.json").is_file()
    ids = files.read_object(home / "config.json") if has_config else {}
    id_of = tokens(vocabulary)
    token_of = {index: token for token, index in id_of.items()}
    found = {}
    keys = zip(("bos_token", "eos_token"), _default_special(vocabulary).items(), strict=True)
    for key, (option, default) in keys:
        token = named.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str) or token not in id_of:
            index = ids.get(f"{key}_id")
            token = token_of.get(index) if type(index) is int else None
        if token not in (None, default):
            found[option] = token
    return found


def hf_class(vocabulary: Vocabulary) -> str:
    """Return the class of transformers that reads a vocabulary."""
    return "BertTokenizer" if "vocab.txt" in vocabulary else "GPT2Tokenizer"


def hf_ids(vocabulary: Vocabulary, config: ModelConfig) -> dict[str, int | None]:
    """Return bos_token_id, eos_token_id and pad_token_id of a transformers config."""
    ids = tokens(vocabulary)
    start, end = special(vocabulary, config)
    return {
        "bos_token_id": None if start is None else ids[start],
        "eos_token_id": None if end is None else ids[end],
        "pad_token_id": ids.get("[PAD]") if "vocab.txt" in vocabulary else None,
    }


def write_for_transformers(folder: Path, vocabulary: Vocabulary, config: ModelConfig) -> None:
    """Write a vocabulary's files, and the JSON files from which transformers reads its options."""
    for name, content in vocabulary.items():
        (folder / HF_NAMES.get(name, name)).write_bytes(content)
    there = tokens(vocabulary)
    settings: dict[str, Any] = {"tokenizer_class": hf_class(vocabulary)}
    if "vocab.txt" in vocabulary:
        names = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        names |= {"cls_token": "[CLS]", "mask_token": "[MASK]"}
        named = {key: token for key, token in names.items() if token in there}
        settings |= {
            "do_lower_case": config.extra.get("lower_case", True),
            "tokenize_chinese_chars": True,
            "strip_accents": None,
        }
    else:
        start, end = special(vocabulary, config)
        tokens_of = {"bos_token": start, "eos_token": end, "unk_token": end}
        named = {key: token for key, token in tokens_of.items() if token is not None}
        settings["add_prefix_space"] = False
    settings |= {"model_max_length": config.n_ctx, **named}
    write_object(folder / "tokenizer_config.json", settings)
    write_object(folder / "special_tokens_map.json", named)

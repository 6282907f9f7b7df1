"""The vocabulary files of other programs under our names, and back under transformers'.

A vocabulary is here a dict of our name of each file -> its bytes, empty where there is none.
"""

import json

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.storage import folders
from gpt2cli.text import bpe, encoder

OUR_NAMES = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
HF_NAMES = {ours: theirs for theirs, ours in OUR_NAMES.items()}
# transformers' classes that read text as our encoder does; the second line names none in particular
TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast")
TOKENIZERS += ("PreTrainedTokenizerFast", "TokenizersBackend")


def write_object(path, values):
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path, n_vocab, warnings):
    """The vocabulary at `path`, and what its other files say about reading text.

    Args:
        path: a folder, or a file of the vocabulary.
        n_vocab: of the model; added tokens beyond it are left out.
        warnings: a list that gets a sentence for what is not as here.

    Returns:
        (vocabulary, {lower_case, start_token, end_token where not the default})

    Raises:
        UserError: a file is damaged, or lacks its companion.
    """
    known = {*encoder.KINDS[0], *encoder.KINDS[1], "tokenizer.json"}
    if path.name == "vocab.txt" and not (path.parent / "encoder.json").exists():
        known.add(path.name)  # its folder says how it is read
    if path.is_file() and path.name not in known:
        return {"vocab.txt": files.read_bytes(path)}, {}
    folder = path.parent if path.is_file() else path
    opened = folders.open_folder(folder)
    asked = {}
    if opened.has("tokenizer_config.json"):
        where = folder / "tokenizer_config.json"
        values = files.parse_object(opened.read(where.name), where)
        if values.get("do_lower_case") is False:
            asked["lower_case"] = False
        if values.get("add_prefix_space") is True:
            warnings.append("its tokenizer puts a space before a text; the one here does not")
        made_for = values.get("tokenizer_class")
        if made_for is not None and made_for not in TOKENIZERS:
            warnings.append(f"its tokenizer is {made_for}; here texts may get other ids")
    if opened.sizes is not None:
        extra = opened.sizes.extra
        keys = ("lower_case", "start_token", "end_token")
        asked |= {key: extra[key] for key in keys if key in extra}
    for kind in encoder.KINDS:
        if all(opened.has(name) for name in kind):
            found = {OUR_NAMES.get(n, n): opened.read(n) for n in kind}
            if kind != ("vocab.txt",):
                asked.pop("lower_case", None)
                found["encoder.json"] = _with_added(found["encoder.json"], folder, n_vocab)
            return found, asked
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        try:
            return _from_tokenizer_json(path, asked, n_vocab, warnings)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not as tokenizers writes it ({error!r})") from None
    if encoder.exists(folder):
        encoder.load(folder)  # raises: says which file lacks its companion
    return {}, {}


def tokens(vocabulary):
    """Token -> id of a vocabulary."""
    if "encoder.json" in vocabulary:
        values = json.loads(vocabulary["encoder.json"])
        return {token: index for token, index in values.items() if type(index) is int}
    lines = vocabulary.get("vocab.txt", b"").decode("utf-8", "replace").removesuffix("\n")
    return {line.rstrip("\r"): index for index, line in enumerate(lines.split("\n")) if lines}


def _with_added(text, folder, n_vocab):
    """encoder.json's bytes with the tokens of added_tokens.json that the model has room for."""
    try:
        vocab = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}: the vocabulary is not JSON ({error}). Fetch it again") from None
    if not isinstance(vocab, dict):
        raise UserError(f"{folder}: the vocabulary must be one JSON object. Fetch it again")
    if not (folder / "added_tokens.json").is_file():
        return text
    added = files.read_object(folder / "added_tokens.json")
    taken = {index for index in vocab.values() if type(index) is int}
    new = {
        token: index
        for token, index in added.items()
        if type(index) is int and index < n_vocab and token not in vocab and index not in taken
    }
    return json.dumps({**vocab, **new}, ensure_ascii=False).encode() if new else text


def _from_tokenizer_json(path, asked, n_vocab, warnings):
    """As `read`, from the one file of the tokenizers library."""
    values = files.read_object(path)
    kind = values.get("model") if isinstance(values.get("model"), dict) else {}
    vocab = kind.get("vocab")
    if kind.get("type") == "BPE" and isinstance(vocab, dict) and _is_byte_level(values):
        added = values.get("added_tokens") or []
        ids = {a["content"]: a["id"] for a in added if a["id"] < n_vocab}
        merges = [m if isinstance(m, str) else " ".join(m) for m in kind.get("merges", [])]
        asked.pop("lower_case", None)
        found = {
            "encoder.json": json.dumps({**ids, **vocab}, ensure_ascii=False).encode(),
            "vocab.bpe": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        }
        return found, asked
    if kind.get("type") == "WordPiece" and isinstance(vocab, dict):
        words = sorted(vocab, key=vocab.get)
        whole = [vocab[word] for word in words] == list(range(len(words)))
        if whole and not any("\n" in word for word in words):
            if (values.get("normalizer") or {}).get("lowercase") is False:
                asked["lower_case"] = False
            return {"vocab.txt": "\n".join([*words, ""]).encode()}, asked
    warnings.append(f"{path} is of a kind that is not read here ({kind.get('type')})")
    return {}, {}


def _is_byte_level(values):
    """Whether a tokenizer.json cuts text as GPT-2 does: its parts have the type ByteLevel."""
    splitter = values.get("pre_tokenizer") or {}
    return "ByteLevel" in [p.get("type") for p in [splitter, *splitter.get("pretokenizers", [])]]


def _usual(vocabulary):
    """The start_token and end_token that our encoder takes where nothing else is said."""
    start, end = ("[CLS]", "[SEP]") if "vocab.txt" in vocabulary else (bpe.END,) * 2
    return {"start_token": start, "end_token": end}


def special(vocabulary, config):
    """(start token, end token) as our encoder will see them, None for none.

    Args:
        config: the ModelConfig, which may say start_token and end_token.
    """
    there = tokens(vocabulary)
    asked = [config.extra.get(place, usual) for place, usual in _usual(vocabulary).items()]
    return tuple(token if token in there else None for token in asked)


def hf_special(home, folder, vocabulary):
    """start_token and end_token that a Hugging Face model names, where not the usual ones.

    Args:
        home: the folder of its config.json, which has their ids.
        folder: that of its vocabulary.
        vocabulary: from `read`.
    """
    named, ids = {}, {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            named |= files.read_object(folder / name)
    if (home / "config.json").is_file():
        ids = files.read_object(home / "config.json")
    id_of = tokens(vocabulary)
    token_of = {index: token for token, index in id_of.items()}
    keys, found = ("bos_token", "eos_token"), {}
    for key, (place, usual) in zip(keys, _usual(vocabulary).items(), strict=True):
        token = named.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str) or token not in id_of:
            index = ids.get(f"{key}_id")
            token = token_of.get(index) if type(index) is int else None
        if token not in (None, usual):
            found[place] = token
    return found


def write_for_transformers(folder, vocabulary, config):
    """Write a vocabulary's files and what transformers wants to know of them.

    Args:
        config: the ModelConfig, which says lower_case, start_token and end_token.
    """
    for name, content in vocabulary.items():
        (folder / HF_NAMES.get(name, name)).write_bytes(content)
    if "vocab.txt" in vocabulary:
        there = tokens(vocabulary)
        names = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        names |= {"cls_token": "[CLS]", "mask_token": "[MASK]"}
        named = {key: token for key, token in names.items() if token in there}
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": config.extra.get("lower_case", True),
            "tokenize_chinese_chars": True,
            "strip_accents": None,
        }
    else:
        start, end = special(vocabulary, config)
        named = {"bos_token": start, "eos_token": end, "unk_token": end}
        named = {key: token for key, token in named.items() if token is not None}
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    settings |= {"model_max_length": config.n_ctx, **named}
    write_object(folder / "tokenizer_config.json", settings)
    write_object(folder / "special_tokens_map.json", named)

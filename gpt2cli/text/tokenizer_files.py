"""A folder's tokenizer files -> a Description: the values of one tokenizer.json.

`encoder.json` with `vocab.bpe` (or `vocab.json` with `merges.txt`) and `vocab.txt` are put into the
form in which the tokenizers library keeps every tokenizer, as transformers does
(tokenization_gpt2.py, tokenization_bert.py). `tokenizer_config.json`, `special_tokens_map.json` and
`added_tokens.json` add tokens and options, as in tokenization_utils_base.py, `_from_pretrained`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import regex

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text.description import BYTE_OF, Description, leaves

END = "<|endoftext|>"
KINDS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("vocab.txt",))
JSON = "tokenizer.json"
SENTENCEPIECE = ("spiece.model", "tokenizer.model", "spm.model")

# The classes of transformers that the files alone describe; the last two are generic.
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast")
CLASSES = (*GPT2_CLASSES, *BERT_CLASSES, "PreTrainedTokenizerFast", "TokenizersBackend")
SENTENCEPIECE_CLASSES = ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast")
MODELS = ("BPE", "WordPiece", "Unigram", "WordLevel", "SentencePiece")
# Keys that name one special token, or several (tokenization_utils_base.py).
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
NAMED_LISTS = ("additional_special_tokens", "extra_special_tokens")
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Options that change how text is read -> the values with which they do nothing.
NOT_OBEYED: dict[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True, None),
    "never_split": (None, []),
    "split_special_tokens": (False, None),
    "word_delimiter_token": (None,),
}
# Options of BertTokenizer -> fields of BertNormalizer.
BERT_OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
PLAIN = {"normalized": False}  # of an added token: its text is found before any normalizer
SYMBOLS = frozenset(BYTE_OF)
MARK = regex.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # how people spell added tokens


def names_in(folder: str | Path) -> list[str]:
    """Return the names of a folder's files with a vocabulary, complete or not."""
    known = (*(name for kind in KINDS for name in kind), JSON, *SENTENCEPIECE)
    return [name for name in known if (Path(folder) / name).is_file()]


def describe(folder: ModelFolder, n_vocab: int | None = None) -> Description:
    """Put the tokenizer files of a folder together.

    Args:
        folder: it also gives lower_case, start_token, end_token and end_ids of hparams.json.
        n_vocab: rows of the token embedding; added tokens beyond them are left out (default: as
            the folder's sizes say).

    Raises:
        UserError: files are missing or damaged, or ask for a tokenizer that gpt2cli does not have.
    """
    return _Reader(folder, n_vocab).described()


class _Reader:
    """The files of one folder while they are put together."""

    def __init__(self, folder: ModelFolder, n_vocab: int | None) -> None:
        self.folder, self.path = folder, folder.path
        self.config = self._object("tokenizer_config.json")
        self.made_for = self.config.get("tokenizer_class")
        # transformers reads special_tokens_map.json only without an added_tokens_decoder
        is_newer = "added_tokens_decoder" in self.config
        named = {**self.config, **({} if is_newer else self._object("special_tokens_map.json"))}
        self.named = {key: token for key in NAMED if (token := _content(named.get(key)))}
        self.listed = [token for key in NAMED_LISTS for token in _contents(named.get(key))]
        sizes = folder.sizes
        self.hparams = {} if sizes is None else sizes.extra
        self.is_gpt2_ml = sizes is not None and sizes.arch == "gpt2_ml"
        if n_vocab is None and sizes is not None and not self.is_gpt2_ml:
            n_vocab = sizes.n_vocab
        self.n_vocab = n_vocab
        self.notes: list[str] = []

    def described(self) -> Description:
        """Return the Description; see `describe` for the errors."""
        for option, harmless in NOT_OBEYED.items():
            if option in self.config and self.config[option] not in harmless:
                self.notes.append(f"{option} in tokenizer_config.json is not obeyed")
        is_whole = self.folder.has(JSON)
        path, values = self._tokenizer_json() if is_whole else self._from_vocabulary()
        found = Description(path, values)
        try:
            if found.kind not in MODELS:
                raise UserError(f"{path}: its model is {found.kind}, which gpt2cli does not have")
            if is_whole:
                _check_ids(found.vocab, path)
            values["added_tokens"] = self._added_tokens(found)
            self._check_template(found)
            start, end, ends = self._ends(found)
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
            raise UserError(f"{path} does not have the tokenizers format ({error!r})") from None
        is_plain = not is_whole and not self.config.get("add_prefix_space")
        notes = tuple(self.notes)
        return replace(found, is_plain=is_plain, start=start, end=end, ends=ends, notes=notes)

    def _object(self, name: str) -> dict[str, Any]:
        """Return the values of a JSON file; nothing where there is none."""
        if not self.folder.has(name):
            return {}
        return files.parse_object(self.folder.read(name), self.folder.place(name))

    def _tokenizer_json(self) -> tuple[Path, dict[str, Any]]:
        """Read tokenizer.json, and the options of tokenizer_config.json that change it.

        transformers lets these options win if they are of the class that the file was made for
        (tokenization_gpt2.py, tokenization_bert.py).
        """
        path = self.folder.place(JSON)
        values = files.parse_object(self.folder.read(JSON), path)
        model = values.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
            raise UserError(f"{path} does not have the tokenizers format: it has no vocabulary")
        try:
            splitters = leaves(values.get("pre_tokenizer") or {}, "pretokenizers")
            if self.made_for in GPT2_CLASSES and "add_prefix_space" in self.config:
                for part in splitters:
                    if part.get("type") == "ByteLevel":
                        part["add_prefix_space"] = self.config["add_prefix_space"] is True
            self._normalize(leaves(values.get("normalizer") or {}, "normalizers"))
        except AttributeError as error:
            raise UserError(f"{path} does not have the tokenizers format ({error!r})") from None
        if values.get("decoder") is None:  # transformers would write spaces between the tokens
            kinds = [part.get("type") for part in splitters]
            values["decoder"] = _byte_level() if "ByteLevel" in kinds else _pieces(model)
        return path, values

    def _normalize(self, parts: list[dict[str, Any]]) -> None:
        """Apply BertTokenizer's options to the normalizer of a tokenizer.json."""
        bert = [part for part in parts if part.get("type") == "BertNormalizer"]
        for option, field in BERT_OPTIONS.items():
            if option not in self.config:
                continue
            if bert and self.made_for in BERT_CLASSES:
                bert[0][field] = self.config[option]
            lowers = field == "lowercase" and any(p.get("type") == "Lowercase" for p in parts)
            done = bool(bert and bert[0].get(field)) or lowers
            if self.config[option] and not done:
                self.notes.append(
                    f"{option} in tokenizer_config.json is not obeyed: {JSON} decides"
                )

    def _from_vocabulary(self) -> tuple[Path, dict[str, Any]]:
        """Read encoder.json and vocab.bpe, vocab.json and merges.txt, or vocab.txt.

        Raises:
            UserError: files are missing, or belong to a tokenizer that they do not describe.
        """
        present = names_in(self.path)
        kind = next((kind for kind in KINDS if all(map(self.folder.has, kind))), None)
        model = next((name for name in present if name in SENTENCEPIECE), None)
        if kind is None and model:
            return self.folder.place(model), self._sentencepiece(model)
        if kind is None:
            found = f"only {' and '.join(sorted(present))}" if present else "none of them"
            raise UserError(
                f"no vocabulary in {self.path.absolute()}: it needs encoder.json and vocab.bpe, or "
                f"vocab.json and merges.txt, or vocab.txt, or {JSON}, but has {found}. Copy them "
                "from the model that this one is based on"
            )
        if self.made_for not in (None, *CLASSES):
            raise UserError(
                f"{self.path / 'tokenizer_config.json'}: tokenizer_class is {self.made_for!r:.60}, "
                f"and there is no {JSON} that describes it. Load it in transformers "
                "(AutoTokenizer) and save it with save_pretrained, or name another vocabulary "
                "with --vocab"
            )
        if kind == ("vocab.txt",):
            return self.folder.place(kind[0]), self._wordpiece(kind[0])
        return self.folder.place(kind[0]), self._bpe(*kind)

    def _bpe(self, vocab_name: str, merges_name: str) -> dict[str, Any]:
        """Return GPT2Tokenizer as a tokenizer.json."""
        path = self.folder.place(vocab_name)
        vocab = files.parse_object(self.folder.read(vocab_name), path)
        _check_ids(vocab, path)
        merges = list(self._merges(merges_name, vocab, vocab_name))
        has_prefix = self.config.get("add_prefix_space") is True
        before = [self.named.get("bos_token", END)] if self.config.get("add_bos_token") else []
        after = [self.named.get("eos_token", END)] if self.config.get("add_eos_token") else []
        splitter = {"type": "ByteLevel", "add_prefix_space": has_prefix}
        return {
            "version": "1.0",
            "normalizer": None,
            "pre_tokenizer": {**splitter, "trim_offsets": True, "use_regex": True},
            "post_processor": template(before, after, vocab),
            "decoder": _byte_level(),
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }

    def _merges(self, name: str, vocab: Mapping[str, int], vocab_name: str) -> Iterator[str]:
        """Yield the pairs of a file of merges, in order of rank; a space is between the two."""
        path = self.folder.place(name)
        for number, line in enumerate(_lines(self.folder, name), 1):
            if not line or (number == 1 and line.startswith("#version")):
                continue
            parts = line.split(" ")
            if len(parts) != 2 or not SYMBOLS.issuperset(parts[0] + parts[1]):
                raise UserError(
                    f"{path} line {number} is not two tokens: {line!r:.60}. Fetch it again"
                )
            for token in (*parts, parts[0] + parts[1]):
                if token not in vocab:
                    raise UserError(
                        f"{path} line {number} names {token!r}, which {vocab_name} lacks: the two "
                        "files do not belong to one model. Copy both from the same place"
                    )
            yield line

    def _wordpiece(self, name: str) -> dict[str, Any]:
        """Return BertTokenizer as a tokenizer.json; line 0 of vocab.txt is id 0."""
        lines = _lines(self.folder, name)
        vocab = {token: index for index, token in enumerate(lines)}
        lower_case = self.hparams.get("lower_case", self.config.get("do_lower_case", True))
        if type(lower_case) is not bool:
            raise UserError(
                f"{self.path}: lower_case must be true or false, got {json.dumps(lower_case)}"
            )
        unknown = self.named.get("unk_token", "[UNK]")
        cls: str | None = self.named.get("cls_token", "[CLS]")
        sep: str | None = self.named.get("sep_token", "[SEP]")
        if self.made_for is None:  # hparams.json decides
            cls = self.hparams.get("start_token", None if self.is_gpt2_ml else cls)
            sep = self.hparams.get("end_token", None if self.is_gpt2_ml else sep)
        before, after = ([token] if token in vocab else [] for token in (cls, sep))
        return {
            "version": "1.0",
            "normalizer": {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": self.config.get("tokenize_chinese_chars", True),
                "strip_accents": self.config.get("strip_accents"),
                "lowercase": lower_case,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": template(before, after, vocab),
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {
                "type": "WordPiece",
                "unk_token": unknown,
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": vocab,
            },
        }

    def _sentencepiece(self, name: str) -> dict[str, Any]:
        """Return T5Tokenizer; other classes add pieces or options of their own.

        Raises:
            UserError: it was made for another class, or the sentencepiece package is missing.
        """
        path = self.folder.place(name)
        if self.made_for not in (None, *SENTENCEPIECE_CLASSES):
            raise UserError(
                f"{path} was made for {self.made_for!r:.60}, and gpt2cli reads the SentencePiece "
                "models of T5Tokenizer only. Load it in transformers (AutoTokenizer) and save it "
                f"with save_pretrained, which writes {JSON}"
            )
        from gpt2cli.text import sentencepiece_model

        values = sentencepiece_model.values_of(self.folder.read(name), path)
        if self.config.get("do_lower_case"):
            values["normalizer"] = {"type": "Lowercase"}
        return values

    def _added_tokens(self, found: Description) -> list[dict[str, Any]]:
        """Return the added and special tokens of all files, as in a tokenizer.json."""
        entries: dict[str, dict[str, Any]] = {}
        for entry in found.values.get("added_tokens") or []:
            entries[entry["content"]] = added_entry(entry["content"], entry["id"], entry)
        newer = self.config.get("added_tokens_decoder")
        for index, entry in (newer or {}).items():
            entries[entry["content"]] = added_entry(entry["content"], int(index), entry)
        if newer is None:
            for token, index in self._object("added_tokens.json").items():
                entries[token] = added_entry(token, index, {"special": token in self.listed})
        tokens = {**found.vocab, **{token: entry["id"] for token, entry in entries.items()}}
        free = max(tokens.values(), default=-1) + 1
        for token in self._special(found):
            if token not in tokens:
                tokens[token], free = free, free + 1
            given = entries.get(token, {"normalized": False})
            entries[token] = added_entry(token, tokens[token], {**given, "special": True})
        kept = []
        for token, entry in sorted(entries.items(), key=lambda item: item[1]["id"]):
            if self.n_vocab is None or entry["id"] < self.n_vocab:
                kept.append(entry)
            else:
                self.notes.append(
                    f"the added token {token!r} is read as plain text: its id {entry['id']} is not "
                    f"in the model, which has {self.n_vocab:,} ids"
                )
        return kept

    def _special(self, found: Description) -> list[str]:
        """Return the texts of the special tokens, those in the vocabulary alone included.

        Of a byte-pair vocabulary without other files that are the tokens that no merge makes, if
        they look like <|endoftext|>, <s> or [PAD].
        """
        named = [*self.named.values(), *self.listed]
        named += [self.hparams[key] for key in ("start_token", "end_token") if key in self.hparams]
        vocab = found.vocab
        if found.kind == "BPE" and not self.folder.has(JSON):
            merged = set(found.merged)
            named = [token for token in named if token not in merged and len(token or "") > 1]
            if not self.config:
                named += [t for t in vocab if t not in merged and MARK.fullmatch(t)]
            named += [END] if END in vocab else []
        if found.kind == "WordPiece" and not self.folder.has(JSON):
            named += [token for token in BERT_SPECIAL if token in vocab]
        return list(dict.fromkeys(token for token in named if token))

    def _check_template(self, found: Description) -> None:
        """Reject ids of a post-processor that the model lacks; note options that it contradicts."""
        before, after = found.around()
        known = set(found.tokens.values())
        if not known.issuperset([*before, *after]):
            raise ValueError("its post-processor has tokens that its vocabulary lacks")
        for option, ids in (("add_bos_token", before), ("add_eos_token", after)):
            if self.config.get(option) is True and not ids:
                self.notes.append(
                    f"{option} in tokenizer_config.json is not obeyed: {JSON} decides"
                )

    def _ends(self, found: Description) -> tuple[str | None, str | None, tuple[int, ...]]:
        """Return the start token, the end token and the ids that end a sample."""
        tokens = found.tokens
        usual = ("[CLS]", "[SEP]") if found.kind == "WordPiece" else (END, END)
        keys = ("cls_token", "sep_token") if found.kind == "WordPiece" else ()
        chosen: list[str | None] = []
        for n, (option, key) in enumerate(
            (("start_token", "bos_token"), ("end_token", "eos_token"))
        ):
            names = [self.named.get(key), *(self.named.get(k) for k in keys[n : n + 1]), usual[n]]
            token = None if self.is_gpt2_ml else next((t for t in names if t in tokens), None)
            if option in self.hparams:
                token = self.hparams[option]
                if token is not None and token not in tokens:
                    raise UserError(
                        f"{self.path}: {option} {token!r} in hparams.json is not in the vocabulary"
                    )
            chosen.append(token)
        start, end = chosen
        ends = self.hparams.get("end_ids", [] if end is None else [tokens[end]])
        known = set(tokens.values())
        if not isinstance(ends, list) or not all(type(i) is int and i in known for i in ends):
            raise UserError(
                f"{self.path}: end_ids {ends!r:.60} in hparams.json must be a list of ids that are "
                "in the vocabulary"
            )
        return start, end, tuple(ends)


def added_entry(text: str, index: int, flags: Mapping[str, Any] = PLAIN) -> dict[str, Any]:
    """Return an added token as a tokenizer.json has it, with AddedToken's defaults.

    Raises:
        ValueError: the text or the id is not one.
    """
    if type(text) is not str or not text or type(index) is not int or index < 0:
        raise ValueError(f"added token {text!r:.40} with id {index!r:.40}")
    special = flags.get("special") is True
    normalized = flags.get("normalized", not special) is True
    spaces = {flag: flags.get(flag) is True for flag in ("single_word", "lstrip", "rstrip")}
    return {"id": index, "content": text, **spaces, "normalized": normalized, "special": special}


def _content(value: object) -> str | None:
    """Return the text of a token that is given as text or as an object; None for anything else."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) and found else None


def _contents(values: object) -> list[str]:
    """Return the texts of several tokens."""
    values = list(values.values()) if isinstance(values, dict) else values
    found = map(_content, values) if isinstance(values, list) else []
    return [token for token in found if token is not None]


def _lines(folder: ModelFolder, name: str) -> list[str]:
    """Return the lines of a file, whichever system's line ends it has."""
    text = files.decode(folder.read(name), folder.place(name))
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{folder.place(name)} line {line} contains a NUL byte: it is damaged, or UTF-16 "
            "without a byte order mark. Save it as UTF-8, or fetch it again"
        )
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _check_ids(vocab: Mapping[str, int], path: Path) -> None:
    """Reject (UserError) ids that are not whole numbers, or that two tokens have."""
    token_of: dict[int, str] = {}
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise UserError(f"{path}: the id of {token!r} is {index!r}, not a whole number from 0")
        if token_of.setdefault(index, token) is not token:
            raise UserError(f"{path}: {token_of[index]!r} and {token!r} have the same id {index}")


def _byte_level() -> dict[str, Any]:
    """Return the decoder of GPT-2."""
    options = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {"type": "ByteLevel", **options}


def _pieces(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the decoder that belongs to a model without one."""
    if model.get("type") != "WordPiece":
        return None
    return {"type": "WordPiece", "prefix": "##", "cleanup": True}


def template(
    before: list[str], after: list[str], vocab: Mapping[str, int]
) -> dict[str, Any] | None:
    """Return a post-processor that puts tokens around a text; None if there are none."""
    if not before and not after:
        return None
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    pieces += [{"Sequence": {"id": "A", "type_id": 0}}]
    pieces += [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
    special = {t: {"id": t, "ids": [vocab[t]], "tokens": [t]} for t in (*before, *after)}
    pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pair,
        "special_tokens": special,
    }

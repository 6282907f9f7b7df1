"""A folder's tokenizer files -> a Description: the values of one tokenizer.json.

`encoder.json` with `vocab.bpe` (or `vocab.json` with `merges.txt`) and `vocab.txt` are put into the
form in which the tokenizers library keeps every tokenizer, as transformers does
(tokenization_gpt2.py, tokenization_bert.py). `tokenizer_config.json`, `special_tokens_map.json` and
`added_tokens.json` add tokens and options, as in tokenization_utils_base.py, `_from_pretrained`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import regex

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text import vocabulary_files
from gpt2cli.text.added_tokens import PLAIN, AddedTokens, SpecialTokens
from gpt2cli.text.classes import (
    BERT_CLASSES,
    BERT_OPTIONS,
    BERT_SPECIAL,
    CLASSES,
    END,
    GPT2_CLASSES,
    SENTENCEPIECE_CLASSES,
    default_tokens,
    replaced,
)
from gpt2cli.text.description import SYMBOLS, Description, leaves, misshapen

KINDS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("vocab.txt",))
JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SENTENCEPIECE = ("spiece.model", "tokenizer.model", "spm.model")
MODELS = ("BPE", "WordPiece", "Unigram", "WordLevel", "SentencePiece")
# Options that change how text is read -> the values with which they do nothing.
NOT_OBEYED: dict[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True, None),
    "never_split": (None, []),
    "split_special_tokens": (False, None),
    "word_delimiter_token": (None,),
}
MARK = regex.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # how people spell added tokens


def names_in(folder: str | Path) -> list[str]:
    """Return the names of a folder's files with a vocabulary, complete or not."""
    known = (*(name for kind in KINDS for name in kind), JSON, *SENTENCEPIECE)
    return [name for name in known if (Path(folder) / name).is_file()]


def describe(
    folder: ModelFolder, n_vocab: int | None = None, made_for: object = None
) -> Description:
    """Put the tokenizer files of a folder together.

    Args:
        folder: it also gives lower_case, start_token, end_token, end_ids and tokenizer_class of
            hparams.json.
        n_vocab: rows of the token embedding; added tokens beyond them are left out (default: as
            the folder's sizes say).
        made_for: transformers' class of the tokenizer, where tokenizer_config.json names none.

    Raises:
        UserError: files are missing or damaged, or ask for a tokenizer that is not supported.
    """
    return _Reader(folder, n_vocab, made_for).described()


class _Reader:
    """The files of one folder while they are put together."""

    def __init__(self, folder: ModelFolder, n_vocab: int | None, made_for: object) -> None:
        self.folder, self.path = folder, folder.path
        sizes = folder.sizes
        self.hparams = {} if sizes is None else sizes.extra
        for key in ("start_token", "end_token"):
            token = self.hparams.get(key)
            if token is not None and not isinstance(token, str):
                shown = json.dumps(token)
                raise UserError(
                    f"{folder.sizes_path}: {key} must be a token or null, got {shown:.60}"
                )
        self.config = self._object(CONFIG)
        named = (self.config.get("tokenizer_class"), made_for, self.hparams.get("tokenizer_class"))
        self.made_for = next((name for name in named if name is not None), None)
        others = self._object("special_tokens_map.json")
        self.special = SpecialTokens.read(self.config, others, default_tokens(self.made_for))
        self.named = self.special.by_key
        self.given = set(SpecialTokens.read(self.config, others, {}).texts())
        self.around: tuple[list[str | None], list[str | None]] = ([], [])
        self.is_gpt2_ml = sizes is not None and sizes.arch == "gpt2_ml"
        if n_vocab is None and sizes is not None and not self.is_gpt2_ml:
            n_vocab = sizes.n_vocab
        self.n_vocab = n_vocab
        self.in_json: list[str] = []  # added tokens of tokenizer.json
        self.notes: list[str] = []

    def described(self) -> Description:
        """Return the Description; see `describe` for the errors."""
        for option, harmless in NOT_OBEYED.items():
            if option in self.config and self.config[option] not in harmless:
                self.notes.append(f"{option} in {CONFIG} is ignored")
        is_whole = self.folder.has(JSON)
        path, values = self._tokenizer_json() if is_whole else self._from_vocabulary()
        found = Description(path, values)
        try:
            if found.kind not in MODELS:
                raise UserError(
                    f"{path}: its model is {found.kind}, which gpt2cli does not support"
                )
            if is_whole:
                vocabulary_files.check_ids(found.vocab, path)
            values["added_tokens"] = self._added_tokens(found)
            if not is_whole:
                values["post_processor"] = self._template(found)
            self._check_template(found)
            if is_whole:
                self._note_class(found)
            cleans = self.config.get("clean_up_tokenization_spaces") is True
            if cleans and found.kind != "WordPiece" and not found.is_byte_level:
                self.notes.append(f"clean_up_tokenization_spaces in {CONFIG} is ignored")
            start, end, ends = self._ends(found)
        except (
            LookupError,
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
            StopIteration,
        ) as error:
            reason = error if type(error) is ValueError else repr(error)
            raise UserError(f"{path} is not a valid tokenizer.json ({reason})") from None
        is_plain = not is_whole and not self.config.get("add_prefix_space")
        notes = tuple(dict.fromkeys(self.notes))
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
            raise UserError(f"{path} is not a valid tokenizer.json: it has no vocabulary")
        if wrong := misshapen(values):
            raise UserError(f"{path} is not a valid tokenizer.json: {wrong} has another type")
        try:
            splitters = leaves(values.get("pre_tokenizer") or {}, "pretokenizers")
            self._set_prefix(splitters)
            self._normalize(leaves(values.get("normalizer") or {}, "normalizers"))
            if values.get("padding"):  # its token is a special one
                pad = str(values["padding"]["pad_token"])
                if self.named.setdefault("pad_token", pad) == pad:
                    self.special.all.append((pad, PLAIN))
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a valid tokenizer.json ({error!r})") from None
        if model.get("dropout"):
            model["dropout"] = None
            self.notes.append(f"dropout in {JSON} is ignored: a text always gives the same ids")
        if values.get("decoder") is None:  # transformers would write spaces between the tokens
            kinds = [part.get("type") for part in splitters]
            values["decoder"] = vocabulary_files.decoder_of(model, kinds)
            if values["decoder"]:
                self.notes.append(f"{JSON} has no decoder; {values['decoder']['type']} is used")
        return path, values

    def _set_prefix(self, splitters: list[dict[str, Any]]) -> None:
        """Apply add_prefix_space, an option of GPT2Tokenizer, to the pre-tokenizer."""
        is_of_class = self.made_for in GPT2_CLASSES
        given = self.config.get("add_prefix_space", False if is_of_class else None)
        for part in splitters:
            if part.get("type") != "ByteLevel" or given is None:
                continue
            if is_of_class or self.made_for is None:
                part["add_prefix_space"] = given is True
            elif part.get("add_prefix_space", True) != given:
                self.notes.append(
                    f"add_prefix_space in {CONFIG} is ignored: {JSON} takes precedence"
                )

    def _normalize(self, parts: list[dict[str, Any]]) -> None:
        """Apply BertTokenizer's options to the normalizer of a tokenizer.json."""
        bert = [part for part in parts if part.get("type") == "BertNormalizer"]
        for option, (field, default) in BERT_OPTIONS.items():
            if bert and self.made_for in BERT_CLASSES:
                bert[0][field] = self.config.get(option, default)
            lowers = field == "lowercase" and any(p.get("type") == "Lowercase" for p in parts)
            done = bool(bert and bert[0].get(field)) or lowers
            if self.config.get(option) and not done:
                self.notes.append(f"{option} in {CONFIG} is ignored: {JSON} takes precedence")

    def _note_class(self, found: Description) -> None:
        """Note where transformers would not run the tokenizer.json as it is."""
        has_option = self.made_for is not None or "add_prefix_space" in self.config
        fields = replaced(self.made_for, found, self.named, has_option)
        newer = self.config.get("added_tokens_decoder")
        if newer is not None and self.made_for in (None, *GPT2_CLASSES, *BERT_CLASSES):
            known = {entry["content"] for entry in newer.values()} | {*self.special.texts()}
            if not known.issuperset(self.in_json):
                fields.append("added_tokens")
        name = "GPT2Tokenizer" if self.made_for is None else self.made_for
        if fields:
            self.notes.append(
                f"{JSON} takes precedence; transformers 5 reads it as {name}, without its "
                f"{', '.join(fields)}"
            )
        elif self.made_for not in (None, *CLASSES):
            self.notes.append(f"tokenizer_class {name!r:.60} is ignored: {JSON} takes precedence")

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
                f"{self.path}: tokenizer_class is {self.made_for!r:.60}, "
                f"and there is no {JSON} that describes it. Load it in transformers "
                "(AutoTokenizer) and save it with save_pretrained, or name another vocabulary "
                "with --vocab"
            )
        is_list = kind == ("vocab.txt",)
        if self.made_for in (GPT2_CLASSES if is_list else BERT_CLASSES):
            self.notes.append(
                f"tokenizer_class {self.made_for!r} is ignored: it does not read {kind[0]}"
            )
            self.made_for = None
            self.special = SpecialTokens.read(
                self.config, self._object("special_tokens_map.json"), {}
            )
            self.named = self.special.by_key
        if is_list:
            return self.folder.place(kind[0]), self._wordpiece(kind[0])
        return self.folder.place(kind[0]), self._bpe(*kind)

    def _bpe(self, vocab_name: str, merges_name: str) -> dict[str, Any]:
        """Return GPT2Tokenizer as a tokenizer.json."""
        before = [self.named.get("bos_token", END)] if self.config.get("add_bos_token") else []
        after = [self.named.get("eos_token", END)] if self.config.get("add_eos_token") else []
        self.around = before, after
        vocab = vocabulary_files.read_bpe(self.folder, vocab_name)
        merges = vocabulary_files.read_merges(self.folder, merges_name, vocab, vocab_name)
        has_prefix = self.config.get("add_prefix_space") is True
        return vocabulary_files.gpt2(vocab, [*merges], has_prefix)

    def _wordpiece(self, name: str) -> dict[str, Any]:
        """Return BertTokenizer as a tokenizer.json."""
        lower_case = self.hparams.get("lower_case", self.config.get("do_lower_case", True))
        if type(lower_case) is not bool:
            raise UserError(
                f"{self.path}: lower_case must be true or false, got {json.dumps(lower_case)}"
            )
        cls, sep = self.named.get("cls_token", "[CLS]"), self.named.get("sep_token", "[SEP]")
        if self.made_for is None:  # hparams.json decides
            cls = self.hparams.get("start_token", None if self.is_gpt2_ml else cls)
            sep = self.hparams.get("end_token", None if self.is_gpt2_ml else sep)
        self.around = [cls], [sep]
        options = {
            "handle_chinese_chars": self.config.get("tokenize_chinese_chars", True),
            "strip_accents": self.config.get("strip_accents"),
            "lowercase": lower_case,
        }
        vocab = vocabulary_files.read_wordpiece(self.folder, name)
        return vocabulary_files.bert(vocab, self.named.get("unk_token", "[UNK]"), options)

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
        added = AddedTokens(found.vocab)
        self.in_json = [entry["content"] for entry in found.values.get("added_tokens") or []]
        for entry in found.values.get("added_tokens") or []:
            added.put(entry["content"], entry, entry["id"], JSON)
        newer = self.config.get("added_tokens_decoder")
        older = {} if newer is not None else self._object("added_tokens.json")
        for index, entry in sorted((newer or {}).items(), key=lambda item: int(item[0])):
            added.put(entry["content"], entry, int(index))
        for token, index in sorted(older.items(), key=lambda item: int(item[1])):
            if added.entries.get(token, {}).get("id") != index:  # tokenizer.json's flags count
                added.put(token, {"special": token in self.given}, index, "added_tokens.json")
        in_files = dict(added.entries)  # their flags count
        for token, flags in self._special(found):
            added.put(token, {**in_files.get(token, flags), "special": True})
        defaults = set(default_tokens(self.made_for).values()) - self.given
        kept = [*added.within(self.n_vocab, {token for token in defaults if token})]
        self.notes += added.notes
        return kept

    def _special(self, found: Description) -> list[tuple[str, Mapping[str, Any]]]:
        """Return text and flags of the special tokens, those in the vocabulary alone included."""
        chosen = (self.hparams.get(key) for key in ("start_token", "end_token"))
        more = [token for token in chosen if token in found.vocab and MARK.fullmatch(token)]
        named = self.special.all
        if self.folder.has(JSON):
            more = []
        elif found.kind == "BPE":
            ordinary = SYMBOLS | set(found.merged)
            for token in self.special.texts():
                if token in ordinary and token in self.given:
                    self.notes.append(f"the special token {token!r} is also text: read as text")
            named = [(token, flags) for token, flags in named if token not in ordinary]
            more = [token for token in (*more, *self._marks(found)) if token not in ordinary]
        elif found.kind == "WordPiece" and self.made_for not in BERT_CLASSES:
            more += [token for token in BERT_SPECIAL if token in found.vocab]
        known = set(self.special.texts())
        return [*named, *((token, PLAIN) for token in dict.fromkeys(more) if token not in known)]

    def _marks(self, found: Description) -> list[str]:
        """Return the special tokens of a byte-pair vocabulary that no file names.

        <|endoftext|> is one, unless the files name others in its place. In a vocabulary without
        other files, so are the tokens that no merge makes, if they look like <s> or [PAD].
        """
        vocab, merged = found.vocab, set(found.merged)
        marks = [t for t in vocab if t not in merged and MARK.fullmatch(t) and t != END]
        if self.config:
            marks = []
        if marks:
            shown = ", ".join(map(repr, marks))
            self.notes.append(
                f"tokens that no merge makes are read as tokens: {shown:.200}; transformers reads "
                "their text as plain text"
            )
        if any(key not in self.named for key in default_tokens(GPT2_CLASSES[0])):
            has_room = self.n_vocab is None or self.n_vocab > len(vocab)
            if END in vocab:
                marks.append(END)
            elif self.made_for is None and self.folder.has("vocab.json") and has_room:
                self.notes.append(f"transformers adds {END!r} to the vocabulary; here it is text")
        return marks

    def _template(self, found: Description) -> dict[str, Any] | None:
        """Return the post-processor of a class: the tokens that it puts around a text."""
        before, after = ([t for t in side if t in found.tokens] for side in self.around)
        for token in (*self.around[0], *self.around[1]):
            if token is not None and token not in found.tokens and self.config:
                self.notes.append(f"{token!r} is not put around texts: it is not in the vocabulary")
            if token is None and self.made_for in BERT_CLASSES:
                self.notes.append("cls_token or sep_token is null, so no token is put around texts")
        return vocabulary_files.template(before, after, found.tokens)

    def _check_template(self, found: Description) -> None:
        """Reject ids of a post-processor that the model lacks; note options that it contradicts."""
        before, after = found.around()
        known = set(found.tokens.values())
        if not known.issuperset([*before, *after]):
            raise ValueError("its post-processor has tokens that its vocabulary lacks")
        for option, ids in (("add_bos_token", before), ("add_eos_token", after)):
            if self.config.get(option) is True and not ids:
                self.notes.append(f"{option} in {CONFIG} is ignored: {JSON} takes precedence")

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

"""The tokenizer files of other programs under our names, and back under transformers'.

They are kept as they are, byte for byte. What config.json and generation_config.json say about
special tokens goes into hparams.json.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpt2cli import files
from gpt2cli.console import counted
from gpt2cli.errors import UserError
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import folders
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text import encoder, tokenizer_files, vocabulary_files
from gpt2cli.text.added_tokens import added_entry
from gpt2cli.text.classes import END
from gpt2cli.text.description import Description

OUR_NAMES = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
HF_NAMES = {ours: theirs for theirs, ours in OUR_NAMES.items()}
# Files that only transformers writes; without them we write those it needs.
FOREIGN = ("tokenizer.json", "special_tokens_map.json", *tokenizer_files.SENTENCEPIECE)


@dataclass(frozen=True)
class VocabularyFile(ModelFolder):
    """A vocab.txt under another name; the files beside it do not count.

    Attributes:
        file: its path.
    """

    file: Path = Path()

    def place(self, name: str) -> Path:
        """Return the path of the file under any name."""
        return self.file

    def has(self, name: str) -> bool:
        """Return whether this is the file."""
        return name == "vocab.txt" and self.file.is_file()


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary and everything that decides how it is used.

    Attributes:
        files: our name of each file -> its content.
        described: the tokenizer.
        options: keys of hparams.json, where they differ from our encoder's defaults.
    """

    files: dict[str, bytes]
    described: Description
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return self.described.tokens

    @property
    def is_wordpiece(self) -> bool:
        """Whether it is BERT's, not GPT-2's or any other kind."""
        return self.described.kind == "WordPiece"

    def notes(self) -> Iterator[str]:
        """Yield a sentence for each difference from transformers."""
        yield from self.described.notes
        if self.options.get("tokenizer") == "tokenizers":
            yield "its tokenizer differs from GPT-2's and BERT's; the tokenizers library runs it"
        named = {index: token for token, index in self.tokens.items()}
        after = [named[index] for index in self.described.around()[1]]
        if after and not self.described.is_plain:
            yield (
                f"its tokenizer puts {' '.join(after)} after a text; gpt2cli does so after a "
                "document, but not after a prompt, because the model must continue it"
            )

    def with_added(self, texts: Sequence[str], path: Path) -> "Vocabulary":
        """Return the vocabulary with new tokens, whose ids follow its highest.

        tokenizer.json gets them, or else added_tokens.json, as transformers' add_tokens does.

        Args:
            texts: the texts of the tokens.
            path: where the vocabulary is from, for messages.

        Raises:
            UserError: a text is already a token.
        """
        old = next((text for text in texts if text in self.tokens), None)
        if old is not None:
            raise UserError(
                f"{path} already has the token {old!r} (id {self.tokens[old]}). Remove that "
                "--add_token"
            )
        first = max(self.tokens.values()) + 1
        ids = {text: first + n for n, text in enumerate(dict.fromkeys(texts))}
        new = [added_entry(text, index) for text, index in ids.items()]
        # those whose files give no id must come before the new ones
        listed = [*self.described.values["added_tokens"], *new]
        made = _with_entries(self.files, listed, self.described.vocab)
        described = replace(
            self.described, values={**self.described.values, "added_tokens": listed}
        )
        return Vocabulary(made, described, self.options | _verdict(described, made))

    def write(self, folder: Path, names: Mapping[str, str] | None = None) -> None:
        """Write its files; `names` gives another program's name of a file."""
        for name, content in self.files.items():
            (folder / (names or {}).get(name, name)).write_bytes(content)


def _with_entries(
    old: Mapping[str, bytes], entries: Sequence[dict[str, Any]], vocab: Mapping[str, int]
) -> dict[str, bytes]:
    """Return the files with those of the added tokens that they lack."""
    made = dict(old)
    config = _values(made, "tokenizer_config.json")
    if "tokenizer.json" in made:
        values = _values(made, "tokenizer.json")
        there = values.get("added_tokens") or []
        known = {entry["content"] for entry in there}
        values["added_tokens"] = [*there, *(e for e in entries if e["content"] not in known)]
        made["tokenizer.json"] = _encoded(values)
    if "added_tokens_decoder" in config:
        flags = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}
        config["added_tokens_decoder"] = {**flags, **config["added_tokens_decoder"]}
        made["tokenizer_config.json"] = _encoded(config)
    elif "tokenizer.json" not in made:
        ids = {e["content"]: e["id"] for e in entries if e["content"] not in vocab}
        made["added_tokens.json"] = _encoded({**_values(made, "added_tokens.json"), **ids})
    return made


def write_object(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    path.write_bytes(_encoded(values))


def _encoded(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _values(made: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return the values of a JSON file; nothing where there is none."""
    return files.parse_object(made[name], name) if name in made else {}


def read(path: Path, n_vocab: int | None = None, home: Path | None = None) -> Vocabulary | None:
    """Read a vocabulary; None if there is none.

    Args:
        path: a folder, or a vocabulary file: vocab.txt by any name, or another file of a folder.
        n_vocab: the model's number of ids; added tokens beyond it are left out.
        home: the folder of a Hugging Face model, whose JSON files name its special tokens by id.

    Raises:
        UserError: a file is damaged, or lacks its companion, or gpt2cli has no such tokenizer.
    """
    folder = _folder_of(path)
    if not isinstance(folder, VocabularyFile) and not tokenizer_files.names_in(folder.path):
        return None
    made_for = None if home is None else _object(home / "config.json").get("tokenizer_class")
    described = tokenizer_files.describe(folder, n_vocab, made_for)
    if home is not None:
        described = _with_ids(described, home)
    named = {OUR_NAMES.get(name, name): name for name in folders.ENCODER_FILES if folder.has(name)}
    found = {ours: folder.read(name) for ours, name in named.items()}
    options = _options(described, found)
    if made_for is not None and not _values(found, "tokenizer_config.json").get("tokenizer_class"):
        options["tokenizer_class"] = made_for
    return Vocabulary(found, described, options)


def _object(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file; nothing where there is none."""
    return files.read_object(path) if path.is_file() else {}


def _folder_of(path: Path) -> ModelFolder:
    """Return the folder that a --vocab means."""
    names = {tokenizer_files.JSON, *(name for kind in tokenizer_files.KINDS for name in kind)}
    is_list = path.name == "vocab.txt" and (path.parent / "encoder.json").exists()
    if path.is_file() and (path.name not in names or is_list):
        return VocabularyFile(path.parent, file=path)
    return folders.open_folder(path.parent if path.is_file() else path)


def _with_ids(described: Description, home: Path) -> Description:
    """Return a tokenizer with the start and end tokens that transformers' `generate` uses.

    They come from generation_config.json, or else from config.json, or else from the tokenizer. Ids
    that are not in the vocabulary are ignored.
    """
    given: dict[str, tuple[Any, str]] = {}
    for name in ("config.json", "generation_config.json"):
        values = _object(home / name)
        for key in ("bos_token_id", "eos_token_id"):
            if values.get(key) is not None:
                given[key] = values[key], name
    token_of = {index: token for token, index in described.tokens.items()}
    known: dict[str, list[int]] = {}
    notes = [*described.notes]
    for key, (value, name) in given.items():
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        known[key] = [index for index in ids if type(index) is int and index in token_of]
        notes += [
            f"{key} {index!r:.40} in {name} is not an id of the vocabulary, so it is ignored"
            for index in ids
            if index not in known[key]
        ]
    described = replace(described, notes=tuple(notes))
    if starts := known.get("bos_token_id"):
        described = replace(described, start=token_of[starts[0]])
    if ends := known.get("eos_token_id"):
        end = described.end
        if end is None or described.tokens[end] not in ends:
            end = token_of[ends[0]]
        described = replace(described, end=end, ends=tuple(ends))
    return described


def _options(described: Description, made: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the keys of hparams.json with which the files alone give this tokenizer."""
    is_wordpiece = described.kind == "WordPiece"
    usual = ("[CLS]", "[SEP]") if is_wordpiece else (END,) * 2
    options: dict[str, Any] = {}
    for option, token, default in zip(
        ("start_token", "end_token"), (described.start, described.end), usual, strict=True
    ):
        if token != default and (token is not None or default in described.tokens):
            options[option] = token
    end = None if described.end is None else described.tokens[described.end]
    if described.ends != (() if end is None else (end,)):
        options["end_ids"] = list(described.ends)
    if described.is_plain and is_wordpiece and not described.values["normalizer"]["lowercase"]:
        options["lower_case"] = False
    return options | _verdict(described, made)


def _verdict(described: Description, made: Mapping[str, bytes]) -> dict[str, str]:
    """Return the keys of hparams.json that say which encoder runs a tokenizer.

    There are none for GPT-2's and BERT's own, unless a merge is missing. The checksum notices that
    the files were replaced.
    """
    if described.kind == "SentencePiece":
        return {}
    found = encoder.verdict(described)
    if encoder.needs_no_verdict(described) and found != "tokenizers":
        return {}
    contents = (made[name] for name in folders.ENCODER_FILES if name in made)
    return {"tokenizer": found, "tokenizer_crc32": encoder.checksum(found, contents)}


def hf_ids(vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Return bos_token_id, eos_token_id and pad_token_id of a transformers config."""
    if vocabulary is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    described, tokens = vocabulary.described, vocabulary.tokens
    ends = list(described.ends)
    return {
        "bos_token_id": None if described.start is None else tokens[described.start],
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": tokens.get("[PAD]") if vocabulary.is_wordpiece else None,
    }


def write_for_transformers(folder: Path, vocabulary: Vocabulary, config: ModelConfig) -> None:
    """Write a vocabulary's files, and the JSON files from which transformers reads its options.

    Files that came from transformers are written as they were.
    """
    vocabulary.write(folder, HF_NAMES)
    if is_foreign(vocabulary):
        return
    described, there = vocabulary.described, vocabulary.tokens
    if vocabulary.is_wordpiece:
        names = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        names |= {"cls_token": "[CLS]", "mask_token": "[MASK]"}
        named = {key: token for key, token in names.items() if token in there}
        settings = _wordpiece_settings(folder, described)
    else:
        tokens_of = {"bos_token": described.start, "eos_token": described.end}
        tokens_of |= {"unk_token": described.end}
        named = {key: token for key, token in tokens_of.items() if token is not None}
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    settings |= {"model_max_length": config.n_ctx, **named}
    write_object(folder / "tokenizer_config.json", settings)
    write_object(folder / "special_tokens_map.json", named)


def is_foreign(vocabulary: Vocabulary) -> bool:
    """Return whether the files came from transformers."""
    if any(name in vocabulary.files for name in FOREIGN):
        return True
    has_config = "tokenizer_config.json" in vocabulary.files
    return has_config and {*_values(vocabulary.files, "tokenizer_config.json")} != {"do_lower_case"}


def _wordpiece_settings(folder: Path, described: Description) -> dict[str, Any]:
    """Write tokenizer.json; return BertTokenizer's options.

    BertTokenizer puts [SEP] after every text, so a text-generation pipeline would continue an
    ended text. The generic class reads tokenizer.json, where only [CLS] comes before a text.
    """
    before, _ = described.around()
    named = {index: token for token, index in described.tokens.items()}
    template = vocabulary_files.template([named[i] for i in before], [], described.tokens)
    write_object(folder / "tokenizer.json", {**described.values, "post_processor": template})
    normalizer = described.values["normalizer"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "do_lower_case": normalizer["lowercase"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        "strip_accents": normalizer["strip_accents"],
    }


def check_fits(vocabulary: Vocabulary, n_vocab: int, folder: Path) -> None:
    """Reject (UserError) a vocabulary with more tokens than the model."""
    largest = max(vocabulary.tokens.values(), default=-1)
    if largest >= n_vocab:
        raise UserError(
            f"{folder}: the vocabulary has {counted(largest + 1, 'token')}, but the model only "
            f"{n_vocab:,}. Name the vocabulary that belongs to it with --vocab"
        )

"""Added and special tokens: which ones the JSON files name, and their ids.

As transformers collects them (tokenization_utils_base.py `_from_pretrained`,
tokenization_utils_tokenizers.py `__init__`) and the tokenizers library numbers them
(added_vocabulary.rs `add_tokens`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpt2cli import counts

# Keys of one special token each; any other key that ends in _token is one too.
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTS = ("extra_special_tokens", "additional_special_tokens")
PLAIN = {"normalized": False}  # of an added token: its text is found before any normalizer


def added_entry(text: str, index: int, flags: Mapping[str, Any] = PLAIN) -> dict[str, Any]:
    """Return an added token as a tokenizer.json has it, with AddedToken's defaults.

    Raises:
        ValueError: the text or the id is not one.
    """
    if type(text) is not str or not text or not counts.is_whole(index):
        raise ValueError(f"added token {text!r:.40} with id {index!r:.40}")
    text.encode()  # no lone surrogates; UnicodeEncodeError is a ValueError
    special = flags.get("special") is True
    normalized = flags.get("normalized", not special) is True
    spaces = {flag: flags.get(flag) is True for flag in ("single_word", "lstrip", "rstrip")}
    return {"id": index, "content": text, **spaces, "normalized": normalized, "special": special}


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens that tokenizer_config.json and special_tokens_map.json name.

    Attributes:
        by_key: key, such as bos_token -> text; None where the file says null.
        all: text and flags of each, in the order in which transformers adds them; a later one
            replaces an earlier one.
    """

    by_key: dict[str, str | None]
    all: list[tuple[str, Mapping[str, Any]]]

    @classmethod
    def read(
        cls,
        config: Mapping[str, Any],
        others: Mapping[str, Any],
        defaults: Mapping[str, str | None],
    ) -> "SpecialTokens":
        """Read the values of the files.

        Args:
            config: of tokenizer_config.json.
            others: of special_tokens_map.json; transformers reads it only without an
                added_tokens_decoder.
            defaults: texts of the keys that neither has.
        """
        if "added_tokens_decoder" in config:
            others = {}
        if config.keys() & {*LISTS}:  # only the first list counts
            others = {k: v for k, v in others.items() if k != "additional_special_tokens"}
        values = {**defaults, **config, **others}
        keys = (*NAMED, *(key for key in values if key.endswith("_token") and key not in NAMED))
        tokens = {key: values[key] for key in keys if key in values}
        extra, older = (values.get(name) for name in LISTS)
        if isinstance(extra, dict):
            tokens |= extra
            extra = None
        listed = extra or older
        given: list[Any] = []
        for token in (*tokens.values(), *(listed if isinstance(listed, list) else [])):
            if token not in given:
                given.append(token)
        by_key = {key: _content(token) for key, token in tokens.items()}
        return cls(
            {k: text for k, text in by_key.items() if text is not None or tokens[k] is None},
            [
                (text, token if isinstance(token, dict) else PLAIN)
                for token in given
                if (text := _content(token))
            ],
        )

    def texts(self) -> list[str]:
        """Return all texts, each once."""
        return [*dict(self.all)]


class AddedTokens:
    """Added tokens while they are collected.

    Args:
        vocab: token -> id of the model of the tokenizer.

    Attributes:
        entries: text -> the token as in a tokenizer.json.
        notes: a sentence for each id that transformers 5 gives in another way.
    """

    def __init__(self, vocab: Mapping[str, int]) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._vocab = vocab
        self._token_of = {index: token for token, index in vocab.items()}
        self._usual: dict[str, int] = {}  # the ids that the tokenizers library gives

    def put(
        self,
        text: str,
        flags: Mapping[str, Any],
        index: int | None = None,
        file: str = "tokenizer_config.json",
    ) -> None:
        """Add a token, or replace the flags of one that is there.

        Args:
            text: its text.
            flags: as in `added_entry`.
            index: its id in the file; None if the file gives no id.
            file: name of the file, for notes.

        Raises:
            ValueError: the text or the id is not one, or another token has the id.
        """
        source = f"of {file}"
        if index is None:
            source = "after all others"
            index = self.entries[text]["id"] if text in self.entries else self._free(text)
        entry = added_entry(text, index, flags)
        if entry["id"] != (usual := self._usual_id(text)):
            if text in self._vocab:
                entry["id"] = usual
                self.notes.append(
                    f"{file} gives {text!r} the id {index}, but the vocabulary has it as {usual}, "
                    "which counts"
                )
            else:
                self.notes.append(
                    f"{text!r} has the id {index} {source}; transformers 5 gives it {usual}"
                )
        other = self._token_of.setdefault(entry["id"], text)
        if other != text:
            raise ValueError(f"{other!r} and the added token {text!r} have the same id {index}")
        self.entries[text] = entry

    def _free(self, text: str) -> int:
        """Return the id of a token whose file gives none."""
        usual = self._usual_id(text)
        taken = self._token_of.get(usual, text) != text
        return max(self._token_of) + 1 if taken else usual

    def _usual_id(self, text: str) -> int:
        """Return the id that the tokenizers library gives a token."""
        if text not in self._usual:
            after = max(max(self._usual.values(), default=-1) + 1, len(self._vocab))
            self._usual[text] = self._vocab.get(text, after)
        return self._usual[text]

    def within(self, n_vocab: int | None, defaults: set[str]) -> Iterator[dict[str, Any]]:
        """Yield the tokens for which a model has rows, and note the others.

        Args:
            n_vocab: rows of the token embedding; None if they are not known.
            defaults: texts of tokens that no file names; they are left out without a note.
        """
        for text, entry in sorted(self.entries.items(), key=lambda item: item[1]["id"]):
            fits = text not in defaults if n_vocab is None else entry["id"] < n_vocab
            if fits or text in self._vocab:
                yield entry
            elif text not in defaults:
                self.notes.append(
                    f"the added token {text!r} is read as plain text: its id {entry['id']} is not "
                    f"in the model, which has {n_vocab:,} ids"
                )


def _content(value: object) -> str | None:
    """Return the text of a token that is given as text or as an object; None for anything else."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) and found else None

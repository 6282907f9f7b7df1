"""Any tokenizer.json, through the tokenizers library."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2cli.errors import UserError
from gpt2cli.text.description import Description, without_surrogates
from gpt2cli.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers


class TokenizerJson(Tokenizer):
    """A tokenizer that does what its tokenizer.json says; see `encoder` for the attributes.

    Args:
        described: the tokenizer.

    Raises:
        UserError: the library rejects it.
    """

    def __init__(self, described: Description) -> None:
        super().__init__(described)
        self.described = described
        self._tokenizer = _built(described, described.values)
        for token, index in self.added.items():
            if self._tokenizer.token_to_id(token) != index:
                raise UserError(
                    f"{described.path}: the added token {token!r} has the id {index}, but the "
                    f"tokenizers library gives it {self._tokenizer.token_to_id(token)}. Added "
                    "tokens must follow the vocabulary without a gap. Load it in transformers "
                    "(AutoTokenizer) and save it with save_pretrained"
                )
        self._plain: tokenizers.Tokenizer | None = None
        self.CUT = self._where_to_cut()

    def arrays(self, texts: Iterable[str], special: bool = False) -> list[np.ndarray]:
        """See `Tokenizer.arrays`."""
        texts = [without_surrogates(text) for text in texts]
        tokenizer = self._tokenizer if special else self._without_added()
        try:
            found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library has no narrower one
            raise UserError(
                f"{self.described.path} cannot encode this text ({error}). Remove the characters "
                "that its vocabulary lacks, or use a model with another tokenizer"
            ) from None
        return [np.array(one.ids, np.int32) for one in found]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _without_added(self) -> tokenizers.Tokenizer:
        """Return the tokenizer for plain text: no text in it is an added token.

        Models may contain their special tokens as well, so these get a name that no text has. A
        token of one character is text, and so is one that a merge makes.
        """
        if self._plain is None:
            values = copy.copy(self.described.values)
            model = values["model"] = copy.copy(values["model"])
            hidden = {text: f"\uffff{index}" for text, index in self.added.items() if len(text) > 1}
            for token in (model.get("unk_token"), *self.described.merged):
                hidden.pop(token, None)
            if isinstance(model["vocab"], list):
                unknown = model.get("unk_id")
                model["vocab"] = [
                    [piece if n == unknown else hidden.get(piece, piece), score]
                    for n, (piece, score) in enumerate(model["vocab"])
                ]
            else:
                model["vocab"] = {hidden.get(t, t): n for t, n in model["vocab"].items()}
            self._plain = _built(self.described, {**values, "added_tokens": []})
        return self._plain


def _built(described: Description, values: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the library's tokenizer; UserError if it rejects the values."""
    import tokenizers

    prefix = described.model.get("continuing_subword_prefix")
    if prefix and described.kind == "BPE":  # the library would end the process
        rights = (
            m.split(" ")[-1] if isinstance(m, str) else m[-1] for m in values["model"]["merges"]
        )
        if not all(right.startswith(prefix) for right in rights):
            raise UserError(
                f"{described.path}: a merge contradicts continuing_subword_prefix {prefix!r:.40}"
            )
    # truncation and padding are settings of a call, and would cut documents
    values = {**values, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(values))
    except BaseException as error:  # a panic of the library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(
            f"{described.path} is not a valid tokenizer.json ({str(error)[:200]})"
        ) from None

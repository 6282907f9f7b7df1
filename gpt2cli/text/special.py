"""Special tokens and lower case: how a folder's files say that its vocabulary reads text."""

import json
from collections.abc import Mapping

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.storage.folders import ModelFolder


def reading_options(
    folder: ModelFolder, vocab: Mapping[str, int], start: str | None, end: str | None
) -> tuple[bool, str | None, str | None]:
    """Return (lower_case, start token, end token).

    hparams.json may have lower_case, start_token and end_token, null for none. GPT2_ML's models
    have neither token, because their training text had none. Otherwise Hugging Face's
    do_lower_case counts.

    Args:
        folder: the vocabulary's folder.
        vocab: token -> id.
        start: the start token by default.
        end: the end token by default.

    Raises:
        UserError: a value is of the wrong type or not in the vocabulary.
    """
    lower_case = True
    if folder.has("tokenizer_config.json"):
        where = folder.path / "tokenizer_config.json"
        values = files.parse_object(folder.read(where.name), where)
        lower_case = values.get("do_lower_case", True)
    if folder.sizes is not None:
        extra = folder.sizes.extra
        lower_case = extra.get("lower_case", lower_case)
        if folder.sizes.arch == "gpt2_ml":
            start = end = None
        start, end = extra.get("start_token", start), extra.get("end_token", end)
        for key in ("start_token", "end_token"):
            token = extra.get(key)
            if token is not None and token not in vocab:
                raise UserError(
                    f"{folder.path}: {key} {token!r} in hparams.json is not in the vocabulary"
                )
    if type(lower_case) is not bool:
        raise UserError(
            f"{folder.path}: lower_case must be true or false, got {json.dumps(lower_case)}"
        )
    return lower_case, start, end

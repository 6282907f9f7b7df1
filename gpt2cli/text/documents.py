"""Records -> documents: a text, a prompt with its completion, or the messages of a dialogue.

A document is a list of parts. A dialogue is encoded in parts: one up to each place where the loss
begins or stops to count, so that a prompt has the same ids here as in `sample`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.options import FileOptions, TextOptions, split_template
from gpt2cli.storage.folders import ModelFolder

SURROGATE = re.compile("[\ud800-\udfff]")
PAIR = ("prompt", "completion")  # of OpenAI's fine-tuning files
MESSAGE = {"role", "content"}
# The completion follows the prompt directly, as in OpenAI's fine-tuning.
PAIR_TEMPLATE = "{prompt}{completion}"


class Part(NamedTuple):
    """A part of a document, cut where the encoder allows it."""

    text: str
    opens: bool  # whether the document starts with this part
    closes: bool  # whether the document ends with this part
    learnt: bool = True  # whether --loss completion counts it, and the end token after it
    is_dialogue: bool = False  # whether only the last end token ends the document
    is_literal: bool = False  # whether it is the template's own text, where special tokens count
    is_turn: bool = False  # whether an end token follows it, though the document may continue


class Record(NamedTuple):
    """A record of a file.

    Attributes:
        value: a text, or an object with fields.
        where: its file and place, for messages.
    """

    value: Any
    where: str


def parts_of(record: Record, options: TextOptions) -> list[Part]:
    """Return the parts of a record's document; none if the record is empty.

    Raises:
        UserError: the record has no text, several, or not the fields of --template.
    """
    value, where = record
    if options.template is not None:
        return _filled(value, where, options.template, options)
    if isinstance(value, Mapping) and options.json_field is None:
        forms = forms_in(value)
        if len(forms) > 1:
            raise UserError(
                f"{where} has {' and '.join(forms)}. Choose one with --json_field NAME, or write a "
                "--template with its fields in braces"
            )
        if forms == ["messages"]:
            return _messages(value["messages"], where, None, options)
        if forms == ["prompt and completion"]:
            return _filled(value, where, PAIR_TEMPLATE, options)
    text = text_of(value, where, options)
    return [Part(text, True, True)] if text else []


def forms_in(fields: Any) -> list[str]:
    """Return the forms of a document that an object's fields, or a file's columns, have."""
    forms = ["messages"] if "messages" in fields else []
    forms += ["prompt and completion"] if all(name in fields for name in PAIR) else []
    return forms + (["text"] if "text" in fields else [])


def text_of(value: Any, where: str, options: FileOptions, default: str = "text") -> str:
    """Return the text of a record: the record, or the field of --json_field or `default`.

    Raises:
        UserError: there is none; the message names the fields.
    """
    name = options.json_field or default
    if isinstance(value, Mapping):
        if name not in value:
            texts = ", ".join(str(f) for f, v in value.items() if isinstance(v, str))
            hint = f"Its text fields are {texts}: name one with --json_field"
            if not texts:
                hint = f"Its fields are: {', '.join(map(str, value)) or 'none'}"
            raise UserError(
                f'{where} must be a JSON string or an object with a "{name}" string. {hint}'
            )
        return _clean(value[name], f"{where}, {name}", options)
    if not isinstance(value, str):
        raise UserError(f'{where} must be a JSON string or an object with a "{name}" string')
    return _clean(value, where, options)


def _clean(text: Any, where: str, options: FileOptions) -> str:
    """Return a text without NUL characters and lone surrogates; --errors replace makes them U+FFFD.

    Raises:
        UserError: it is not a text, or has such characters and --errors is strict.
    """
    if not isinstance(text, str):
        raise UserError(f"{where} must be a text, not {_kind(text)}")
    place = text.find("\0")
    what = "a NUL character"
    if place < 0 and not text.isascii():
        text = _joined(text)
        match = SURROGATE.search(text)
        place, what = match.start() if match else -1, "a lone surrogate (half of a character)"
    if place < 0:
        return text
    if options.errors == "strict":
        raise UserError(
            f"{where}: character {place + 1} of the text is {what}. Remove it, or replace such "
            "characters by U+FFFD with --errors replace"
        )
    return SURROGATE.sub("\ufffd", _joined(text)).replace("\0", "\ufffd")


def _joined(text: str) -> str:
    """Join pairs of surrogates to their character."""
    if SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _filled(value: Any, where: str, template: str, options: TextOptions) -> list[Part]:
    """Return the parts of a record in a template; its completion and the text after it count.

    The completion is the field of that name, or else the last one.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is not an object, but --template needs its fields")
    pieces = split_template(template)
    names = [name for _, name in pieces if name is not None]
    if set(names) <= MESSAGE and "messages" in value:
        return _messages(value["messages"], where, template, options)
    last = "completion" if "completion" in names else names[-1]
    return _closed(list(_pieces(pieces, value, where, {last}, options)), options)


def _messages(value: Any, where: str, template: str | None, options: TextOptions) -> list[Part]:
    """Return the parts of a list of messages; those of the assistant count in the loss.

    A message with "weight": 0 does not, as in OpenAI's fine-tuning files. Without a template an end
    token follows each message, as in DialoGPT (arXiv 1911.00536, section 3.1).
    """
    if not isinstance(value, list) or not value:
        is_text = isinstance(value, str)
        hint = ". To read it as text, name it with --csv_column or --json_field" if is_text else ""
        raise UserError(
            f'{where}: "messages" must be a list of objects with "role" and "content"{hint}'
        )
    pieces = split_template(template or "{content}")
    parts: list[Part] = []
    for number, message in enumerate(value, 1):
        place = f"{where}, message {number}"
        if not isinstance(message, Mapping) or not message.keys() >= MESSAGE:
            raise UserError(f'{place} must be an object with "role" and "content"')
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise UserError(f'{place}: "weight" must be 0 or 1')
        learnt = {"content"} if message["role"] == "assistant" and weight != 0 else set()
        parts += _pieces(pieces, message, place, learnt, options)
        if template is None:
            parts[-1] = parts[-1]._replace(is_turn=True)
    return _closed(parts, options)


def _pieces(
    pieces: Sequence[tuple[str, str | None]],
    fields: Mapping[str, Any],
    where: str,
    learnt: set[str],
    options: TextOptions,
) -> Iterator[Part]:
    """Yield the parts of a template filled with fields; text counts if the field before it does."""
    is_learnt = False
    for text, name in pieces:
        if text:
            yield Part(text, False, False, is_learnt, True, is_literal=True)
        if name is None:
            continue
        if name not in fields:
            raise UserError(
                f"{where} has no field {name}, which --template names. It has "
                f"{', '.join(map(str, fields)) or 'none'}"
            )
        is_learnt = name in learnt
        yield Part(_clean(fields[name], f"{where}, {name}", options), False, False, is_learnt, True)


def _closed(parts: list[Part], options: TextOptions) -> list[Part]:
    """Join neighbours that are encoded in the same way, and mark the first and the last part.

    Returns:
        No parts if all fields are empty.
    """
    if not any(part.text for part in parts if not part.is_literal):
        return []
    joined = [parts[0]]
    for number, part in enumerate(parts[1:], 2):
        before = joined[-1]
        same_tokens = options.special == "token" or before.is_literal == part.is_literal
        # the template's own text at the end stays by itself: it may be the end token
        may_join = same_tokens and not (part.is_literal and number == len(parts))
        if may_join and before.learnt == part.learnt and not before.is_turn:
            is_literal = before.is_literal and part.is_literal
            text = before.text + part.text
            joined[-1] = before._replace(text=text, is_literal=is_literal, is_turn=part.is_turn)
        else:
            joined.append(part)
    joined[0] = joined[0]._replace(opens=True)
    joined[-1] = joined[-1]._replace(closes=True)
    return joined


def chat_template_of(folder: ModelFolder) -> Path | None:
    """Return the file of a model folder that has a template for messages; None without one.

    Raises:
        UserError: tokenizer_config.json is damaged.
    """
    if folder.has("chat_template.jinja"):
        return folder.path / "chat_template.jinja"
    where = folder.path / "tokenizer_config.json"
    if folder.has(where.name):
        values = files.parse_object(folder.read(where.name), where)
        if values.get("chat_template"):
            return where
    return None

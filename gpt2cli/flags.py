"""How a frozen dataclass becomes the flags of a command: types, defaults, help, checks.

The fields are the flags. The docstring has sections of fields (`Sampling:` and, below it,
`top_k: sample from ...`), an `Environment:` section of the same form, and `Examples:`.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from gpt2cli.counts import MAX_COUNT
from gpt2cli.errors import UsageError

NOT_FIELDS = ("Environment", "Examples")  # sections that describe something else
LAST = ("Folders and messages", "Messages")  # sections of nearly every command


class Flag(typing.NamedTuple):
    """A field of an options class.

    Attributes:
        hint: its type.
        default: its default, or dataclasses.MISSING.
        help: its text in the docstring.
    """

    hint: Any
    default: Any
    help: str


def spelled(name: str) -> str:
    """Return a field's name on the command line: from_ (from is a Python keyword) is --from."""
    return name.rstrip("_")


def summary_of(cls: type) -> str:
    """Return the first line of an options class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def description_of(cls: type) -> str:
    """Return the docstring of an options class without its sections."""
    text = re.split(r"^[A-Z][\w ]*:\n {4}", inspect.getdoc(cls) or "", maxsplit=1, flags=re.M)[0]
    return text.strip()


def section(cls: type, title: str) -> dict[str, str]:
    """Return a section of the class's own docstring: name -> text. Empty where there is none."""
    return _documented(cls).get(title, {})


def examples_of(cls: type) -> list[str]:
    """Return the command lines under `Examples:`."""
    text = (inspect.getdoc(cls) or "").partition("Examples:\n")[2]
    return [line.strip() for line in text.splitlines() if line.strip()]


@functools.cache
def sections_of(cls: type) -> dict[str, list[str]]:
    """Return the fields of each section: a class's own before inherited ones, LAST at the end."""
    order = {field.name: place for place, field in enumerate(dataclasses.fields(cls))}
    placed: dict[str, str] = {}
    titles: list[str] = []
    for base in cls.__mro__:
        for title, texts in _documented(base).items():
            if title not in NOT_FIELDS and title not in titles:
                titles.append(title)
            for name in texts:
                if title not in NOT_FIELDS:
                    placed.setdefault(name, title)
    titles.sort(key=LAST.__contains__)
    members = {
        title: [n for n, t in placed.items() if t == title and n in order] for title in titles
    }
    return {
        title: sorted(names, key=order.__getitem__) for title, names in members.items() if names
    }


@functools.cache
def fields_of(cls: type) -> dict[str, Flag]:
    """Return a Flag for each field, section by section."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for named in _documented(base).values():
            texts |= named
    placed = [name for names in sections_of(cls).values() for name in names]
    ordered = [*placed, *(name for name in fields if name not in placed)]
    return {n: Flag(hints[n], fields[n].default, texts.get(n, "")) for n in ordered}


def _documented(cls: type) -> dict[str, dict[str, str]]:
    """Return the sections of a docstring: title -> name -> text."""
    found: dict[str, dict[str, str]] = {}
    for title, body in re.findall(
        r"^([A-Z][\w ]*):\n((?: {4}.*\n?|\n)+)", inspect.cleandoc(cls.__doc__ or "") + "\n", re.M
    ):
        entries = re.findall(r"^ {4}(\w+): ((?:.+\n?)(?: {8}.+\n?)*)", body, re.M)
        found[title] = {name: " ".join(text.split()) for name, text in entries}
    return found


def describe_type(hint: Any) -> str:
    """Return a field's type as help and errors name it: `int`, `adam|sgd|adamw`, `true|false`."""
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    if _is_union(hint):
        return describe_type(_inner(hint))
    if hint is bool:
        return "true|false"
    if hint == tuple[str, ...]:
        return "text (may be repeated)"
    return {int: "int", float: "float", str: "text"}[hint]


def describe_default(default: Any) -> str:
    """Return ` (default: 40)`, or nothing where the help names the default or there is none."""
    if default is dataclasses.MISSING:
        return " (required)"
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        default = str(default).lower()
    return f" (default: {default})"


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _inner(hint: Any) -> Any:
    """Return the type in `TYPE | None`."""
    return next(t for t in typing.get_args(hint) if t is not type(None))


def _accepted(hint: Any, value: Any) -> Any:
    """Return the value as the field's type; TypeError or ValueError if it is not of that type."""
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError
        return value
    if _is_union(hint):
        return None if value is None else _accepted(_inner(hint), value)
    if hint == tuple[str, ...]:
        value = (value,) if isinstance(value, str) else tuple(value)
        if not all(isinstance(item, str) for item in value):
            raise TypeError
        return value
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not math.isfinite(value) or (
            value and not 1e-37 < abs(float(value)) < 1e38
        ):  # of float32
            raise ValueError
        return float(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # NumPy's whole numbers as well
    if hint is str and hasattr(value, "__fspath__"):
        return str(value)
    if type(value) is not hint:
        raise TypeError
    return value


def parse_value(hint: Any, text: str) -> Any:
    """Return typed text as the field's type. Text stays text: no quotes, no tuples, no None.

    Raises:
        ValueError: the text is not of that type.
    """
    if _is_union(hint):
        hint = _inner(hint)
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]
    if hint in (int, float):
        return hint(text)
    return _accepted(hint, text)


def nearest(word: str, words: Iterable[str], dashes: str = "") -> str:
    """Return ` (did you mean WORD?)`, or nothing where no word is close."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {dashes}{close[0]}?)" if close else ""


def check(options: Any, **limits: tuple[float | None, float | None]) -> None:
    """Check the types of all fields and the limits of some; set each field to its exact type.

    Args:
        options: an instance of an options class.
        limits: (lowest, highest) allowed value of a field; None leaves that end open.

    Raises:
        UsageError: a value has the wrong type or is outside its limits.
    """
    cls: type = type(options)
    counts = {}
    for name, flag in fields_of(cls).items():
        value = getattr(options, name)
        try:
            object.__setattr__(options, name, _accepted(flag.hint, value))
        except (TypeError, ValueError, OverflowError):
            wanted = describe_type(flag.hint)
            raise UsageError(f"--{spelled(name)} takes {wanted}, not {value!r}") from None
        if flag.hint in (int, int | None):
            counts[name] = (-MAX_COUNT, MAX_COUNT)
    for name, (low, high) in (counts | limits).items():
        value = getattr(options, name)
        high = MAX_COUNT if high is None and name in counts else high
        if value is None:
            continue
        if low is not None and value < low:
            raise UsageError(f"--{name} must be at least {low}, got {value}")
        if high is not None and value > high:
            raise UsageError(f"--{name} must be at most {high}, got {value}")

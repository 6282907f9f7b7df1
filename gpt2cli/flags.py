"""How a frozen dataclass becomes the flags of a command: types, defaults, help, checks.

The fields are the flags, the text after a field's name under `Args:` is its help.
"""

import dataclasses
import math
import numbers
import re
import types
import typing
from typing import Literal

from gpt2cli.errors import UsageError


def spelled(name):
    """A field's name on the command line: a trailing _ keeps Python's own words apart."""
    return name.rstrip("_")


def fields_of(config_class):
    """Field name -> (type, default or dataclasses.MISSING, help); inherited fields come last."""
    hints = typing.get_type_hints(config_class)
    help_of = {}
    for base in reversed(config_class.__mro__):
        arguments = (base.__doc__ or "").partition("Args:\n")[2]
        for name, text in re.findall(r"^ {8}(\w+): ((?:.+\n?)(?: {12}.+\n?)*)", arguments, re.M):
            help_of[name] = " ".join(text.split())
    own = config_class.__annotations__
    fields = sorted(dataclasses.fields(config_class), key=lambda f: f.name not in own)
    return {f.name: (hints[f.name], f.default, help_of.get(f.name, "")) for f in fields}


def describe_type(hint):
    """How help and errors name a field's type: `int`, `adam|sgd|adamw`, `true|false`, ..."""
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return describe_type(next(t for t in typing.get_args(hint) if t is not type(None)))
    if hint is bool:
        return "true|false"
    if hint == tuple[str, ...]:
        return "text, may be repeated"
    return {int: "int", float: "float", str: "text"}[hint]


def _accepted(hint, value):
    """The value as the field's type, or raise TypeError/ValueError."""
    if hint is typing.Any:  # its class looks at it
        return value
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError
        return value
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = next(t for t in typing.get_args(hint) if t is not type(None))
        return None if value is None else _accepted(inner, value)
    if hint == tuple[str, ...]:
        value = (value,) if isinstance(value, str) else tuple(value)
        if not all(isinstance(item, str) for item in value):
            raise TypeError
        return value
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not math.isfinite(value) or (value and not 1e-37 < abs(value) < 1e38):  # of float32
            raise ValueError
        return float(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # NumPy's whole numbers as well
    if hint is str and hasattr(value, "__fspath__"):
        return str(value)
    if type(value) is not hint:
        raise TypeError
    return value


def parse_value(hint, text):
    """What somebody typed, as the field's type. Text stays text: no quotes, no tuples, no None.

    Raises:
        ValueError: it is not of that type.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]
    if hint in (int, float):
        return hint(text)
    return _accepted(hint, text)


def check(config, **limits):
    """Check types of all fields, then `name=(low, high)` limits, both ends allowed, None open."""
    for name, (hint, _, _) in fields_of(type(config)).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, _accepted(hint, value))
        except (TypeError, ValueError, OverflowError):
            raise UsageError(
                f"--{spelled(name)} takes {describe_type(hint)}, not {value!r}"
            ) from None
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is None:
            continue
        if low is not None and value < low:
            raise UsageError(f"--{name} must be at least {low}, got {value}")
        if high is not None and value > high:
            raise UsageError(f"--{name} must be at most {high}, got {value}")

"""Numbers from files, servers, flags and the environment: one strict reader for each kind.

In JSON, neither true nor "1" is the number 1, and a number may have thousands of digits. In a text,
int() would also accept "+1", " 1 ", "1_0" and the digits of every script.
"""

import re
from typing import Any

MAX_COUNT = 2**31 - 1  # counts and ids are 32-bit numbers in TensorFlow
MAX_BYTES = 2**63 - 1  # sizes of files are 64-bit numbers in Linux
LARGEST_REAL = 1e30  # no setting of a model is larger; its square fits into float64


def is_whole(value: Any, least: int = 0, most: int = MAX_COUNT) -> bool:
    """Return whether a value of JSON is a whole number within these limits."""
    return type(value) is int and least <= value <= most


def is_real(value: Any) -> bool:
    """Return whether a value of JSON is a finite number of a usual size."""
    return type(value) in (int, float) and -LARGEST_REAL < value < LARGEST_REAL


def whole_of(text: Any, most: int = MAX_COUNT) -> int | None:
    """Return the value of a text of ASCII digits; None for any other text or a larger value."""
    if type(text) is not str or not re.fullmatch("[0-9]{1,19}", text):
        return None
    value = int(text)
    return value if value <= most else None

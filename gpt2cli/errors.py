"""Errors the user can fix. Any other exception is a bug. cli.py maps them to exit statuses."""

import contextlib
import re
from collections.abc import Iterator


class UserError(Exception):
    """An error the user can fix: the text says what happened, where, and what to do now."""


class UsageError(UserError):
    """A wrong command line or Python call: an unknown flag, a bad value."""


class BusyError(UserError):
    """Another process is doing the same work, or stopped it: retrying later may succeed."""


class NewerFormatError(UserError):
    """A later version of gpt2cli wrote a file: it is not damaged, and must not be replaced."""


@contextlib.contextmanager
def names_without_dashes() -> Iterator[None]:
    """Name settings as Python does in the messages of errors: `top_p`, not `--top_p`."""
    try:
        yield
    except UserError as error:
        # a command line in the message stays one, and so does -- in a path
        flag = r"(gpt2cli [a-z]+ [^.;]*)|(?<![\w/.-])--(?=[a-z])"
        error.args = (re.sub(flag, lambda match: match[1] or "", str(error)),)
        raise

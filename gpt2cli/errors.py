"""Errors the user can fix. Any other exception is a bug."""


class UserError(Exception):
    """An error the user can fix: the text says what happened, where, and what to do now."""


class UsageError(UserError):
    """A wrong command line or Python call: an unknown flag, a bad value."""


class BusyError(UserError):
    """Another process is doing the same work, or stopped it: retrying later may succeed."""

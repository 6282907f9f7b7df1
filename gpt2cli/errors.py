"""The errors that are the user's to mend; every other exception is a bug of ours."""


class UserError(Exception):
    """Something the person at the keyboard can mend: the text says what, where, what to do now."""


class UsageError(UserError):
    """The command line (or a Python call) itself is wrong: an unknown flag, a bad value."""


class BusyError(UserError):
    """Another process is at the same work, or ended it: later the same command may succeed."""

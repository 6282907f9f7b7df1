"""A folder that is found again if somebody renames it while it is in use."""

import contextlib
import os
import weakref
from pathlib import Path

from gpt2cli.console import say


class HeldFolder:
    """A folder in use.

    Args:
        path: the folder; it need not exist.

    Attributes:
        path: its last known path.
    """

    def __init__(self, path: str | Path) -> None:
        self.hold(path)

    def hold(self, path: str | Path) -> None:
        """Use this folder from now on."""
        self.path = Path(path)
        self._handle: int | None = None  # stays the folder's, whatever its name becomes
        with contextlib.suppress(OSError):  # Windows opens no folders
            self._handle = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)

    def find(self) -> bool:
        """Find out where the folder is; if it was moved, print its new path.

        Returns:
            False if it was removed, or moved to an unknown place.
        """
        if self._handle is None:
            return self.path.is_dir()
        if self._is_at(self.path):
            return True
        with contextlib.suppress(OSError):
            found = Path(os.readlink(f"/proc/self/fd/{self._handle}"))  # Linux alone
            if self._is_at(found):
                say(f"{self.path} was moved to {found}; the run is saved there")
                self.path = found
                return True
        return False

    def _is_at(self, path: Path) -> bool:
        """Whether a path leads to this folder."""
        assert self._handle is not None
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._handle))
        except OSError:
            return False

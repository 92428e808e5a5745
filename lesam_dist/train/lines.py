"""A file of lines that a full disk does not tear: what it does not take now is written when there is room again."""

from __future__ import annotations

import errno
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class Lines:
    """Appends whole lines to a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._fails = False

    def append(self, line: str) -> str | None:
        """Add a line, behind those that wait.

        Returns:
            What to tell the user, where writing has begun to fail, or works again; else None.

        Raises:
            OSError: for anything but a disk that takes no more.
        """
        self._waiting += line.encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]  # of a full disk a part of it
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            told, self._fails = self._fails, True
            reason = f"warning: {self.path} cannot be written ({error.strerror}): the run goes on"
            return None if told else f"{reason}, and writes these lines when it can."
        told, self._fails = self._fails, False
        return f"{self.path} is written again, with all lines." if told else None

    def close(self) -> None:
        """Close the file; what still waits is lost."""
        self._file.close()

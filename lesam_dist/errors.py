"""Errors that a user can act on, and the nearest valid name for a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 60  # characters of a user's text that an error shows


class UserError(Exception):
    """Something outside the program is wrong: an argument, a file, a folder, a device.

    The message says what happened, with the value, and what to do. The command line prints it without a
    traceback and exits with status 2.
    """


class SharedError(UserError):
    """A `UserError` that every process raises with the same message, and that none of them caused alone."""


class DivergedError(SharedError):
    """A run whose loss or gradients have stopped being numbers."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a ``name`` that is not among the ``valid`` ones, with the nearest of them.

    Args:
        kind: what the name is of, e.g. ``"model"``.
        name: what the user wrote.
        valid: every name that would have been accepted.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(names)}."
    return UserError(f"unknown {kind} '{one_line(name)}': {hint}")


def one_line(text: str) -> str:
    """What a user wrote, for an error: without line breaks, and not too long."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."


class PreemptedError(SharedError):
    """A run that was asked to end, and has saved what it needs to go on; its status is `PREEMPTED`."""


PREEMPTED = 75
"""Exit status of a run that ended because a signal asked it to: EX_TEMPFAIL of sysexits.h, "try again"."""

"""The arguments of every command but `lesam-dist train`, whose fields are those of the config."""

from __future__ import annotations

import argparse
import textwrap
from typing import NoReturn

from lesam_dist.errors import UserError

_WIDTH = 78


class Parser(argparse.ArgumentParser):
    """A command's arguments, none abbreviated; what is wrong with them is a `UserError`.

    Args:
        command: what stands behind `lesam-dist`.
        description: what the command does, wrapped by `wrapped`.
        epilog: what stands at the end of its help, line by line.
        usage: in place of argparse's own.
    """

    def __init__(self, command: str, description: str, epilog: str, usage: str | None = None) -> None:
        super().__init__(
            prog=f"lesam-dist {command}",
            usage=usage,
            description=wrapped(description),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise it.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message} ({self.prog} --help)")


def examples(*commands: str) -> str:
    """An epilog of command lines, each without its `lesam-dist`."""
    return "\n".join(["examples:" if len(commands) > 1 else "example:", *(f"  lesam-dist {c}" for c in commands)])


def wrapped(text: str) -> str:
    """Its paragraphs in lines that fit a terminal; those that are indented stay as they are."""
    wrapper = textwrap.TextWrapper(_WIDTH, break_on_hyphens=False)
    paragraphs = text.strip("\n").split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else wrapper.fill(part) for part in paragraphs)

"""The arguments of the commands that help, see `lesam_dist.guide`."""

from __future__ import annotations

import argparse
import textwrap
from typing import NoReturn

from lesam_dist.errors import UserError


class Parser(argparse.ArgumentParser):
    """A command's arguments; what is wrong with them is a `UserError`."""

    def __init__(self, command: str, description: str, *examples: str) -> None:
        lines = "\n".join(f"  lesam-dist {example}" for example in examples)
        super().__init__(
            prog=f"lesam-dist {command}",
            description=textwrap.fill(description, 78),
            epilog=f"examples:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UserError(f"{message} ({self.prog} --help)")

"""What the commands on checkpoints share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lesam_dist.errors import UserError


class Parser(argparse.ArgumentParser):
    """A command's arguments; what is wrong with them is a `UserError`."""

    def __init__(self, command: str, description: str, example: str) -> None:
        super().__init__(
            prog=f"lesam-dist {command}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UserError(f"{message} ({self.prog} --help)")

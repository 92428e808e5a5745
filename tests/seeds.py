"""Seeds of random inputs: fresh for every change of the project, the same for every run of one commit."""

from __future__ import annotations

import os
import subprocess
import zlib
from functools import cache
from pathlib import Path

import torch


@cache
def _tree() -> str | None:
    """The hash of all committed files; `None` outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD^{tree}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def seed_of(test: str) -> int:
    """The seed of `test`: SEED=n if that is set, a new one each time for SEED=new and outside git.

    Else it is drawn from the commit and the test's name, so that who runs a commit again sees what its author saw.
    """
    wanted, tree = os.environ.get("SEED"), _tree()
    if wanted not in (None, "", "new"):
        return int(wanted)
    if wanted == "new" or tree is None:
        return torch.seed() % 2**31
    return zlib.crc32(f"{tree} {test}".encode()) % 2**31

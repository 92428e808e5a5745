"""Seeds of random inputs: fresh for every change of the project, the same for every run of one commit."""

from __future__ import annotations

import os
import subprocess
import zlib
from functools import cache
from pathlib import Path

import torch


@cache
def _code() -> str | None:
    """The paths and hashes of all committed Python files; `None` outside git."""
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "ls-tree", "-r", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    files = "\n".join(line for line in done.stdout.splitlines() if line.endswith(".py"))
    return files if done.returncode == 0 else None


def seed_of(test: str) -> int:
    """The seed of `test`: SEED=n if that is set, a new one each time for SEED=new and outside git.

    Else it is drawn from the commit's code and the test's name, so that who runs a commit again sees what its author
    saw; a commit that changes documents alone draws the same.
    """
    wanted, code = os.environ.get("SEED"), _code()
    if wanted not in (None, "", "new"):
        return int(wanted)
    if wanted == "new" or code is None:
        return torch.seed() % 2**31
    return zlib.crc32(f"{code} {test}".encode()) % 2**31

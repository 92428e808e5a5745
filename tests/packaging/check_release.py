"""What `make dist` has built, installed by pip into an environment of its own, and the README's first commands there.

`make release-check` runs this file. It takes minutes and gigabytes, since torch is installed anew, with the versions of
constraints.txt where they are for this Python.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.check_dist import ROOT, WHEEL

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """An environment with the wheel and its extra `train`."""
    with tempfile.TemporaryDirectory(prefix="release-check-") as name:
        venv.create(name, with_pip=True)
        pinned = ["-c", str(ROOT / "constraints.txt")] if sys.version_info[:2] == (3, 11) else []
        run(Path(name), "pip", "install", "--quiet", *pinned, f"{WHEEL}[train]")
        run(Path(name), "pip", "check")
        yield Path(name)


def run(folder: Path, *command: str) -> str:
    """stdout of a command, which sees nothing of this checkout."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables["PATH"] = f"{folder / 'bin'}:{variables['PATH']}"
    words = [str(folder / "bin" / command[0]), *command[1:]]
    result = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=variables)
    assert result.returncode == 0, f"{command}: status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_loop_of_the_readme(folder: Path) -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    loop = "\n".join(line[1:] for line in diff.splitlines() if line[:1] in "+ ")
    before = "import torch\nmodel, criterion, epochs = torch.nn.Linear(6, 3), torch.nn.CrossEntropyLoss(), 2\n"
    before += "loader = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(3)]\n"
    after = "\nimport lesam_dist\nprint(float(loss), lesam_dist.__file__)"
    loss, where = run(folder, "python", "-c", before + loop + after).split()
    assert float(loss) > 0
    assert where.startswith(str(folder)), "it is the wheel's"


def test_the_first_command_of_the_readme(folder: Path) -> None:
    """It trains to what the README says: 98 to 99 %."""
    (section,) = re.findall(r"^## One command\n(.*?)^## ", README, re.M | re.DOTALL)
    command = re.findall(r"^    (lesam-dist .*)$", section, re.M)[0]
    out = run(folder, *shlex.split(command))
    assert float(re.findall(r"top-1 ([\d.]+) %", out)[-1]) >= 97.5, out

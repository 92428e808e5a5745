"""Environments that have a built wheel and what it requires, made in seconds: packages are linked from this one.

Installing torch takes minutes and gigabytes. What a requirement brings is installed here already, as the development
environment has every extra; so the files of just those distributions are linked, as their metadata lists them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Environment:
    """A new virtual environment in ``folder`` with ``wheel``, what it requires, and what ``extra`` does."""

    def __init__(self, folder: Path, wheel: Path, extra: str = "") -> None:
        venv.create(folder, symlinks=True, with_pip=False)
        self.python = folder / "bin" / "python"
        self.folder = folder
        self._pip("install", "--quiet", "--no-deps", "--no-index", str(wheel))
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = folder / "lib" / version / "site-packages"
        (own,) = distributions(path=[str(site)])
        for other in closure(own, extra):
            _link(other, site)
        self._pip("check")

    def run(self, *command: str, status: int = 0) -> tuple[str, str]:
        """stdout and stderr of a command, which sees nothing of this checkout and of this process's variables."""
        variables = {"PATH": f"{self.python.parent}:/usr/bin:/bin", "HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        return _run([str(self.python.parent / command[0]), *command[1:]], status, cwd=self.folder, env=variables)

    def _pip(self, *arguments: str) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.python)]
        others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # would count as installed
        _run([*pip, *arguments], env=others)


def closure(top: Distribution, extra: str) -> Iterator[Distribution]:
    """What ``top`` and its ``extra`` require, directly or not, as it is installed here.

    Raises:
        PackageNotFoundError: it is not.
    """
    top_name = canonicalize_name(top.metadata["Name"])
    found = {top_name: top}
    seen: set[tuple[str, str]] = set()
    todo = [(top_name, extra)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in map(Requirement, found[name].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                if needed not in found:
                    found[needed] = distribution(needed)
                    yield found[needed]
                todo += [(needed, e) for e in ("", *requirement.extras)]


def _link(installed: Distribution, site: Path) -> None:
    for file in installed.files or []:
        if ".." in file.parts or file.suffix in (".h", ".hpp"):
            continue  # scripts in bin; headers, two thirds of torch's files
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        source = str(installed.locate_file(file))
        with suppress(FileNotFoundError):  # RECORD lists bytecode that was never written
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)


def _run(command: Sequence[str], status: int = 0, **options: object) -> tuple[str, str]:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
    if result.returncode != status:
        raise AssertionError(f"{command}: status {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result.stdout, result.stderr

"""Every kernel as its launcher specialises it, compiled without a GPU by every Triton that pyproject.toml admits.

    python -m tests.kernels.compile_kernels            # the table of kernels/README.md, as Markdown
    python -m tests.kernels.compile_kernels --write    # written there

launch_offline.py launches and compiles, in a process for each version of Triton. Versions that are not installed are
fetched once, into .triton/ in the checkout: the wheel alone, put before the installed one. torch is the installed one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "kernels" / "README.md"
ARCHS = (80, 90, 100)
INSTALLED = version("triton")
VERSIONS = ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
"""The last of each minor version; the installed one stands for its own."""
BEGIN, END = "<!-- python -m tests.kernels.compile_kernels --write, of sources {} -->\n", "<!-- end -->"
SOURCES = (
    *("kernels/lesam_kernels", "lesam_dist/optim", "tests/methods.py"),
    *("tests/kernels/launch_offline.py", "tests/kernels/machine_code.py"),
)
"""The kernels, who launches them, what is launched here, and who reads it: a Triton makes the same of the same."""


@dataclass(frozen=True)
class Kernel:
    """One specialisation. Instructions by opcode: "ld.global.v4.b32" in PTX, "LDG.E.128" in SASS."""

    kernel: str
    dtypes: tuple[str, ...]
    options: tuple[str, ...]  # arguments that it has and others of the kernel do not
    registers: int  # per thread
    local: int  # bytes of stack and spills per thread
    shared: int  # bytes per program
    ptx: Counter[str]
    sass: Counter[str]

    def __str__(self) -> str:
        return " ".join([self.kernel, *self.dtypes, *(f"+{option}" for option in self.options)])

    def ptx_count(self, start: str, end: str = "") -> int:
        """How many instructions in PTX begin and end so."""
        return sum(n for opcode, n in self.ptx.items() if opcode.startswith(start) and opcode.endswith(end))

    def sass_count(self, start: str, part: str = "") -> int:
        """How many instructions in SASS begin so, and have this part."""
        return sum(n for opcode, n in self.sass.items() if opcode.startswith(start) and part in opcode)


@dataclass(frozen=True)
class Report:
    """What one version of Triton made for one architecture."""

    triton: str
    arch: int
    never_launched: list[str]
    compiled_again: list[str]
    kernels: list[Kernel] = field(repr=False)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Report:
        types = {"dtypes": tuple, "options": tuple, "ptx": Counter, "sass": Counter}
        kernels = [
            Kernel(**{key: types.get(key, int)(value) if key != "kernel" else value for key, value in kernel.items()})
            for kernel in values.pop("kernels")
        ]
        return cls(kernels=kernels, **values)


class UnavailableError(Exception):
    """This version of Triton cannot be had here; ``has_wheel`` is False where none is published for this Python."""

    def __init__(self, message: str, *, has_wheel: bool) -> None:
        super().__init__(message)
        self.has_wheel = has_wheel


def folder_of(triton: str) -> Path | None:
    """Where a version lies, fetched if it is not there yet; None for the installed one. Raises UnavailableError."""
    if triton == INSTALLED:
        return None
    folder = ROOT / ".triton" / f"{triton}-{sys.implementation.cache_tag}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary", ":all:", "--target", f"{partial}/{triton}", f"triton=={triton}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                # pip lists the versions that it has wheels of; where it could not ask, there are none at all.
                has_wheel = "(from versions: none)" in done.stderr or "No matching distribution" not in done.stderr
                raise UnavailableError(
                    f"Triton {triton} could not be fetched: {done.stderr.strip()}", has_wheel=has_wheel
                )
            os.rename(f"{partial}/{triton}", folder)  # so that it is whole or not there
    return folder


def compile_with(triton: str, archs: Iterable[int]) -> dict[int, Report]:
    """What a version makes for each architecture.

    Raises UnavailableError, and RuntimeError with Triton's message where a kernel does not compile.
    """
    folder = folder_of(triton)
    path = [folder, ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH")]
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    env["PYTHONPATH"] = os.pathsep.join(str(part) for part in path if part)
    command = [sys.executable, "-m", "tests.kernels.launch_offline", *map(str, archs)]
    with tempfile.TemporaryDirectory() as cache:
        env["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Triton {triton} compiles no kernels for {list(archs)}:\n{done.stderr}")
    reports = [Report.of(values) for values in json.loads(done.stdout)]
    assert all(report.triton == triton for report in reports)
    return {report.arch: report for report in reports}


def table(reports: Iterable[Report]) -> str:
    """The worst of all versions, per kernel and architecture, as Markdown."""
    rows: dict[str, list[tuple[int, Kernel]]] = {}
    for report in reports:
        for kernel in report.kernels:
            rows.setdefault(kernel.kernel, []).append((report.arch, kernel))
    lines = [
        f"| kernel | variants | {' | '.join(f'sm_{arch}' for arch in ARCHS)} | shared bytes | spilled bytes |",
        "|---" * (len(ARCHS) + 4) + "|",
    ]
    for name, found in sorted(rows.items()):
        registers = [max(kernel.registers for arch, kernel in found if arch == wanted) for wanted in ARCHS]
        variants = len({str(kernel) for _, kernel in found})
        shared, local = (max(getattr(kernel, key) for _, kernel in found) for key in ("shared", "local"))
        lines.append(f"| `{name}` | {variants} | {' | '.join(map(str, registers))} | {shared} | {local} |")
    return "\n".join(lines) + "\n"


@cache
def sources() -> str:
    """A digest of `SOURCES`, and of what they are compiled with and for."""
    digest = hashlib.blake2b(f"{VERSIONS} {ARCHS}\n".encode(), digest_size=8)
    for path in (ROOT / name for name in SOURCES):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(ROOT).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def is_current() -> bool:
    """Whether the table is of what the sources are now."""
    return in_readme()[1] == sources()


def in_readme() -> tuple[str, str]:
    """The table as kernels/README.md has it, and the digest of the sources that it was written from."""
    begin, end = map(re.escape, (BEGIN, END))
    found = re.search(begin.replace(r"\{\}", r"(\w*)") + f"(.*){end}", README.read_text(), re.DOTALL)
    assert found is not None
    return found[2], found[1]


def main() -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = pool.map(lambda triton: compile_with(triton, ARCHS), VERSIONS)
        reports = [report for found in each for report in found.values()]
    text = table(reports)
    print(text)
    if "--write" in sys.argv:
        old, digest = in_readme()
        whole = README.read_text().replace(BEGIN.format(digest) + old, BEGIN.format(sources()) + text)
        README.write_text(whole)


if __name__ == "__main__":
    main()

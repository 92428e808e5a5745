"""Python and packages: what is there, and whether it is new enough. Nothing is imported for it."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from lesam_dist import __version__
from lesam_dist.doctor.finding import Finding

OPTIONAL = ("triton", "torchvision", "accelerate", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
_OLDEST_PYTHON = (3, 10)
_WITHOUT = {
    "triton": ("no Triton: on GPUs the optimizer works in plain torch", "pip install triton"),
    "torchvision": ("", 'pip install "lesam-dist[train]"'),
    "accelerate": ("", 'pip install "lesam-dist[train]"'),
}


def read_versions() -> dict[str, str | None]:
    """Versions of what the library and the trainer stand on; None of what is not installed."""
    return {name: _version(name) for name in ("torch", *OPTIONAL)}


def read_bounds() -> dict[str, str]:
    """The oldest version of each package that this one takes; empty in a checkout that is not installed."""
    try:
        lines = requires("lesam-dist") or []
    except PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in lines)
    return {each[1]: each[2] for each in found if each}


def check_versions(versions: Mapping[str, str | None], bounds: Mapping[str, str]) -> Iterator[Finding]:
    """One finding per package."""
    yield Finding("lesam_dist", "ok", __version__)
    old = sys.version_info[:2] < _OLDEST_PYTHON
    yield Finding("Python", "problem" if old else "ok", platform.python_version(), "take 3.10 or newer" if old else "")
    for name, found in versions.items():
        if found is not None and _parts(found) < _parts(bounds.get(name, "0")):
            text = f"{found} is older than {bounds[name]}, the oldest that works"
            yield Finding(name, "problem", text, f'pip install --upgrade "{name}>={bounds[name]}"')
        elif found is not None:
            label, build = ("DALI", f" ({name})") if "dali" in name else (name, "")
            yield Finding(label, "ok", f"{found}{build}")
        elif name == "torch":
            yield Finding(name, "problem", "not installed", "pip install torch")
        elif name in _WITHOUT:
            text, remedy = _WITHOUT[name]
            yield Finding(name, "warning", text or "not installed", remedy)


def check_packages(missing: Sequence[str]) -> Iterator[Finding]:
    """Of the extra "train", without which there are no commands but this one."""
    if missing:
        names = ", ".join(missing)
        yield Finding("trainer", "problem", f"not installed: {names}", 'pip install "lesam-dist[train]"')
    else:
        yield Finding("trainer", "ok", "all packages of lesam-dist[train] are there")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _parts(text: str) -> tuple[int, ...]:
    """The numbers at the beginning of a version: "2.9.0+cu128" is 2, 9, 0."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()

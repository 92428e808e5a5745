"""What every benchmark shares: the checkout on the path, where and with what it ran, tables, files, a time budget.

Import it before lesam_dist, so that this checkout is measured and not an installed version.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HOST_TARGET_SECONDS, HOST_TARGET_TENSORS = 100e-6, 161
"""What `host.py` should find at most, for a list as long as ResNet-50's."""

ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT / "kernels", ROOT):
    if str(_folder) not in sys.path:
        sys.path.insert(1, str(_folder))


class Deadline:
    """A time budget in seconds; None never ends. A benchmark asks before each piece of work, and keeps what it has."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def share(self, parts: int) -> Deadline:
        """A deadline for the next of ``parts`` pieces of work that have what is left in common."""
        return Deadline(None if self._end is None else (self._end - time.monotonic()) / parts)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", type=Path, help="also write every number, in seconds and bytes, to this file")
    result.add_argument("--markdown", type=Path, help="also write the text of stdout to this file")
    return result


def words(text: str) -> list[str]:
    """An argparse type: "a,b" to ["a", "b"]."""
    return [word for word in text.split(",") if word]


def environment(device: torch.device, script: str, argv: Sequence[str]) -> dict[str, str]:
    """Where and with what a number was measured: without it a number means nothing."""
    result = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit(),
        "command": shlex.join(["python", f"benchmarks/{script}", *argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        result |= {"cuda": str(torch.version.cuda), "driver": _driver_version()}
    return result


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def commit() -> str:
    """The checkout's commit, with "-dirty" where files differ from it."""
    if shutil.which("git") is None:
        return "unknown"
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(describe, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"


def environment_lines(environment: dict[str, str]) -> str:
    """The environment as Markdown: one line of facts, one with the command."""
    facts = ", ".join(
        value if key == "device" else f"{key} {value}" for key, value in environment.items() if key != "command"
    )
    return f"{facts}\n\n    {environment['command']}\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    cells = [list(header), ["---", *["---:"] * (len(header) - 1)], *[list(row) for row in rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


def number(value: float | None, digits: int, scale: float = 1.0, unit: str = "") -> str:
    """``value * scale`` with this many digits after the point; "-" for None."""
    return "-" if value is None else f"{value * scale:.{digits}f}{unit}"


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, in the unit of the values (seconds)."""
    if len(seconds) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), seconds[0])
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(seconds), "p80": fifths[3]}


def progress(text: str) -> None:
    """What begins now, on stderr: stdout is the report's."""
    print(text, file=sys.stderr, flush=True)


def write(args: argparse.Namespace, document: dict[str, Any], markdown: str) -> None:
    """Write what ``--json`` and ``--markdown`` ask for. Cheap: call it after each piece of work."""
    for path, text in ((args.json, json.dumps(document, indent=1)), (args.markdown, markdown)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")


def first_line(error: BaseException) -> str:
    """An error as one short line of a table."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0] if message else ''}".replace("|", "/")[:200]


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def _driver_version() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else "unknown"

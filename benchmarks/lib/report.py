"""What a benchmark prints and writes: where and with what it ran, tables, numbers."""

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
from collections.abc import Sequence
from typing import Any

import torch

from lib import ROOT

Result = dict[str, Any]
"""What was measured of one thing, in seconds and bytes."""


class Report:
    """The text on stdout, and the files of `--json` and `--markdown`, which hold all there is at any time."""

    def __init__(self, args: argparse.Namespace, script: str, device: torch.device, title: str, **more: Any) -> None:
        """Prints the title and the environment; ``more`` goes into the JSON."""
        self._args = args
        where = environment(device, script, _measuring(args.argv))
        self._document = {"environment": where, **more, "results": []}
        self._text = ""
        self.add(f"## {title}\n\n{environment_lines(where)}")

    def add(self, section: str, results: Sequence[Result] = ()) -> None:
        """One more section of text, and the results that it shows."""
        print(section, flush=True)
        self._text += f"{section}\n"
        self._document["results"] += results
        for path, text in ((self._args.json, json.dumps(self._document, indent=1)), (self._args.markdown, self._text)):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text.rstrip("\n") + "\n")


def _measuring(argv: Sequence[str]) -> list[str]:
    """The arguments without the files that are written: they say where a machine keeps them, and change no number."""
    flags = ("--json", "--markdown", "--journal", "--folder")
    return [word for i, word in enumerate(argv) if not word.startswith(flags) and not (i and argv[i - 1] in flags)]


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
    """A Markdown table; the first column is text, the others numbers. A short row, which says why it has no numbers,
    is filled with "-"."""
    filled = [[*row, *["-"] * (len(header) - len(row))] for row in rows]
    cells = [list(header), ["---", *["---:"] * (len(header) - 1)], *filled]
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

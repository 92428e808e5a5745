"""Everything that needs a GPU, in one command of under nine minutes: tests, kernels, whole steps, one table at the end.

    python benchmarks/gpu.py [--out FOLDER]            needs torch and triton; pytest for the tests

Each part is a process with a time limit of its own: one that fails or hangs is reported, and the rest goes on.
Everything is written to FOLDER, by default benchmarks/results/<device>-<date>: a log per part, the numbers as JSON and
Markdown, and summary.md.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lib import ROOT
from lib.arguments import Parser
from lib.report import device_name, environment, environment_lines, table
from lib.summary import summary

_TOTAL_SECONDS = 530.0
_START_SECONDS = 15.0  # of a script, before it looks at its own clock, and after it


@dataclass(frozen=True)
class Part:
    """A command, its limit in seconds, and whether it writes NAME.json and NAME.md."""

    name: str
    command: tuple[str, ...]
    limit: float
    script: bool = True


_TESTS = ("-m", "pytest", "-q", "-rfE", "--continue-on-collection-errors")
# Each gets its limit or what is left of the total, so the most important come first.
_CUDA = (
    Part("tests-gpu", (*_TESTS, "-m", "gpu", "tests"), 60, script=False),
    Part("tests-kernels", (*_TESTS, "-m", "not gpu", "tests/kernels", "tests/optim"), 150, script=False),
    Part("kernels", ("kernels.py", "--providers", "lesam_dist,lesam_unchecked,foreach,foreach_swap,eager"), 120),
    Part("step", ("step.py", "--batch", "128,32,256", "--repeats", "15"), 150),
    Part("host", ("host.py",), 30),
    Part("peer", ("kernels.py", "--providers", "lesam_dist,pytorch_optimizer", "--models", "resnet50"), 25),
    Part("compile", ("kernels.py", "--providers", "lesam_dist,compile", "--models", "resnet50", "--base", "sgd"), 60),
    Part("bfloat16", ("kernels.py", "--dtype", "bfloat16", "--providers", "lesam_dist,foreach", "--quick"), 30),
)
# The same on a CPU with toy sizes: it shows that the machinery works, and nothing else.
_REHEARSAL = (
    Part("kernels", ("kernels.py", "--device", "cpu", "--models", "tiny", "--quick"), 60),
    Part("step", ("step.py", "--device", "cpu", "--models", "resnet_tiny", "--batch", "2", "--image-size", "32"), 60),
    Part("host", ("host.py", "--repeats", "20"), 60),
)


def run(part: Part, out: Path, limit: float) -> str:
    """Run one part and return one line about it: "ok", pytest's last line, or what went wrong."""
    if part.command[:2] == ("-m", "pytest") and importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    command = [sys.executable, *part.command]
    if part.script:
        command[1] = str(Path(__file__).with_name(part.command[0]))
        command += ["--json", _shown(out / f"{part.name}.json"), "--markdown", _shown(out / f"{part.name}.md")]
        if part.command[0] != "host.py":
            command += ["--seconds", str(max(limit - _START_SECONDS, 1))]
    log = out / f"{part.name}.log"
    with log.open("w") as stream:
        # A group of its own, so that what it started ends with it.
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit:.0f} s, see {log.name}"
    lines = log.read_text().strip().splitlines()
    last = lines[-1].strip("= ") if lines else ""
    if status != 0:
        return f"failed with status {status}: {last[:160]}"
    return "ok" if part.script else last


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    options.add_argument("--out", type=Path, metavar="FOLDER", help="results; default: below benchmarks/results")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a rehearsal with toy sizes")
    args = options.parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here. `--device cpu` rehearses with toy sizes.", file=sys.stderr)
        return 1
    device = torch.device(args.device)
    out: Path = (args.out or _default_folder(device)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + _TOTAL_SECONDS
    where = environment(device, "gpu.py", args.argv)
    print(environment_lines(where), flush=True)

    lines = {}
    for part in _CUDA if args.device == "cuda" else _REHEARSAL:
        start = time.monotonic()
        limit = min(part.limit, end - start)
        line = run(part, out, limit) if limit > _START_SECONDS else "not run: out of time"
        lines[part.name] = line
        print(f"{part.name}: {line} ({time.monotonic() - start:.0f} s)", flush=True)

    outcome = table(["part", "outcome"], [[name, line.replace("|", "/")] for name, line in lines.items()])
    text = f"# Summary\n\n{environment_lines(where)}\n{summary(out)}\n{outcome}"
    (out / "summary.md").write_text(text)
    print(f"\n{text}\nEverything is in {_shown(out)}")
    return int(any(line.startswith(("failed", "stopped")) for line in lines.values()))


def _shown(path: Path) -> str:
    """Relative to the checkout where it lies there: the command line is part of the results."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _default_folder(device: torch.device) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M")
    return Path(__file__).parent / "results" / f"{name}-{date}"


if __name__ == "__main__":
    sys.exit(main())

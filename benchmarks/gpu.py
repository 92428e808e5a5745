"""Everything that needs a GPU: is it right, how fast is it, and which choice is faster. Most important first.

    python benchmarks/gpu.py [--only first] [--out FOLDER]      needs torch and triton; pytest for the tests

Each part is a process with a time limit of its own: one that fails or hangs is named, and the rest goes on. Three sets
of parts, `first`, `second` and `third`, each take less than nine minutes; `--only` takes sets and single parts.
FOLDER, by default benchmarks/results/<device>-<date>, holds two files, rewritten after each part: summary.md has the
targets, outcomes, all tables and the end of each failure; results.tar.gz has each part's log, JSON and Markdown.
`--device cpu` rehearses the same parts with toy sizes, whose numbers mean nothing.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lib import ROOT
from lib.arguments import Parser, names_of
from lib.report import device_name, environment, environment_lines, table
from lib.summary import summary

SET_SECONDS = 540.0
_REHEARSED = "This is a rehearsal with toy sizes: it shows what runs, and its numbers mean nothing.\n"
_START_SECONDS = 15.0  # of a script, before it looks at its own clock, and after it
_END_OF_LOG = 40  # lines of a part that failed, in the summary
_CUDA_TOOLS = "/usr/local/cuda/bin"
# One thread: those that wait for a core spin, and nothing here computes on the CPU.
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
_TIMED = ("kernels.py", "step.py", "ab.py")  # these take --seconds


@dataclass(frozen=True)
class Part:
    """A command and its limit.

    Attributes:
        name: of its files, NAME.log, NAME.json and NAME.md.
        command: a script of this folder with its options, or ``-m`` or ``-c`` and the rest for Python.
        limit: seconds.
        needs: modules without which it is not run.
        under: a program with options that runs it.
        env: environment variables of its process.
        gpus: fewest GPUs with which it is run.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    gpus: int = 0

    @property
    def is_script(self) -> bool:
        return self.command[0].endswith(".py")


_PYTEST = ("-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors")
_OFFLINE = "--ignore-glob=*/test_compiled.py"  # compiles for hundreds of seconds, and needs no GPU
_HERE = ("tests/kernels", "tests/optim")  # import with torch, triton, pytest and numpy alone
_OTHERS = ("tests/data/test_cifar.py", "tests/train/test_meter.py", "tests/train/test_evaluate.py")
_SANITIZED = ("smoke.py", "--launchers", "sum_sq,restore_adamw", "--dtypes", "float32,bfloat16")
_NO_CACHE = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # so that each tensor has bounds that memcheck knows


def _sanitizer(tool: str) -> Part:
    under = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    return Part(tool, _SANITIZED, 75, under=under, env=_NO_CACHE)


_FIRST = (
    Part("smoke", ("smoke.py",), 90),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
    Part("tests-gpu", (*_PYTEST, _OFFLINE, "-m", "gpu", "tests/kernels"), 60, needs=("pytest",)),
    Part("replay", ("replay.py",), 60),
    Part(
        "kernels",
        (
            *("kernels.py", "--models", "resnet50,vit_b_16,large"),
            *("--providers", "lesam_dist,lesam_unchecked,foreach,foreach_swap,eager"),
        ),
        180,
    ),
)
_SECOND = (
    Part("ab", ("ab.py",), 120),
    Part("step", ("step.py", "--batch", "128,32"), 200),
    Part("tests", (*_PYTEST, _OFFLINE, "-m", "not gpu and not full", *_HERE), 210, needs=("pytest", "numpy")),
)
_THIRD = (
    Part("host", ("host.py",), 40),
    Part("ranks", ("ranks.py",), 60, gpus=2),
    Part("bfloat16", ("kernels.py", "--dtype", "bfloat16", "--providers", "lesam_dist,foreach", "--quick"), 45),
    Part("small", ("kernels.py", "--models", "small1000,wrn_28_10", "--providers", "lesam_dist,foreach"), 40),
    Part("compile", ("kernels.py", "--providers", "lesam_dist,compile", "--models", "resnet50", "--base", "sgd"), 90),
    Part("step-256", ("step.py", "--batch", "256", "--models", "resnet50"), 80),
    Part(
        "early",
        ("step.py", "--models", "vit_l_16", "--batch", "8,32", "--variants", "sgd,lesam,lesam_early,lesam_graph"),
        100,
    ),
    Part("tests-others", (*_PYTEST, "-m", "gpu", *_OTHERS), 60, needs=("pytest", "numpy", "PIL", "torchvision")),
    Part(
        "peer",
        ("kernels.py", "--providers", "lesam_dist,pytorch_optimizer", "--models", "resnet50"),
        25,
        needs=("pytorch_optimizer",),
    ),
)
SETS = {"first": _FIRST, "second": _SECOND, "third": _THIRD}
# The same with toy sizes: it shows that the machinery works, and nothing else.
_CPU = ("--device", "cpu")
_COLLECT = ("--collect-only",)
REHEARSAL = {
    "first": (
        Part("smoke", ("smoke.py", *_CPU), 60, needs=("numpy",)),
        Part("tests-gpu", (*_FIRST[3].command, *_COLLECT), 60, needs=("pytest", "numpy")),
        Part("replay", ("replay.py", *_CPU), 150, needs=("numpy",)),
        Part("kernels", ("kernels.py", *_CPU, "--models", "tiny", "--quick"), 60),
    ),
    "second": (
        Part("ab", ("ab.py", *_CPU), 60, needs=("numpy",)),
        Part(
            "step", ("step.py", *_CPU, "--models", "resnet_tiny", "--batch", "2", "--image-size", "32"), 90
        ),
        Part("tests", (*_SECOND[2].command, *_COLLECT), 60, needs=("pytest", "numpy")),
    ),
    "third": (
        Part("host", ("host.py", "--repeats", "20"), 60),
        Part("ranks", ("ranks.py", *_CPU), 90),
    ),
}  # fmt: skip


def run(part: Part, out: Path, limit: float) -> str:
    """Run one part and return one line about it: "ok", what it says of itself, or what went wrong."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"not run: it needs {', '.join(missing)}"
    if part.gpus > torch.cuda.device_count():
        return f"not run: it takes {part.gpus} GPUs, and there are {torch.cuda.device_count()}"
    command = [sys.executable, *part.command]
    if part.is_script:
        command[1] = str(Path(__file__).with_name(part.command[0]))
        command += ["--json", str(out / f"{part.name}.json"), "--markdown", str(out / f"{part.name}.md")]
        if part.command[0] in _TIMED:
            command += ["--seconds", str(max(limit - _START_SECONDS, 1))]
    elif (
        part.command[:2] == _PYTEST[:2]
        and "--collect-only" not in command
        and importlib.util.find_spec("xdist") is not None
    ):
        command += ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "loadfile"]
    if part.under:
        program = shutil.which(part.under[0], path=os.pathsep.join((os.environ.get("PATH", ""), _CUDA_TOOLS)))
        if program is None:
            return f"not run: there is no {part.under[0]}"
        command = [program, *part.under[1:], *command]
    log = out / f"{part.name}.log"
    with log.open("w") as stream:
        # A group of its own, so that what it started ends with it.
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**_ENVIRONMENT, **os.environ, **dict(part.env)},
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit:.0f} s, see {log.name}"
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines() if line.strip("= ")]
    told = [line for line in lines if "SUMMARY:" in line] if part.under else lines
    last = told[-1] if told else ""
    if status != 0:
        return f"failed with status {status}: {last[:160]}"
    return "ok" if part.is_script and not part.under else last


def write(folder: Path, out: Path, head: str, outcomes: dict[str, tuple[str, float]], on_cuda: bool) -> str:
    """Rewrite summary.md and results.tar.gz; returns the summary's beginning, up to the parts' own tables."""
    rows = [[name, line.replace("|", "/"), f"{seconds:.0f}"] for name, (line, seconds) in outcomes.items()]
    targets = summary(out, list(outcomes)) if on_cuda else _REHEARSED
    beginning = f"{head}\n{targets}\n{table(['part', 'outcome', 's'], rows)}"
    sections = []
    for name, (line, _) in outcomes.items():
        shown, log = out / f"{name}.md", out / f"{name}.log"
        if shown.exists():
            sections.append(f"<!-- {name} -->\n\n{shown.read_text()}")
        if line.startswith(("failed", "stopped")) and log.exists():
            end = "\n".join(log.read_text(errors="replace").splitlines()[-_END_OF_LOG:])
            sections.append(f"## {name}: the end of its log\n\n```\n{end}\n```\n")
    (folder / "summary.md").write_text("\n".join([beginning, *sections]))
    archive = folder / "results.tar.gz"
    with tarfile.open(archive.with_suffix(".new"), "w:gz") as tar:
        for path in sorted(out.iterdir()):
            tar.add(path, arcname=f"{folder.name}/{path.name}")
    archive.with_suffix(".new").replace(archive)  # a process that is stopped here leaves the last one whole
    return beginning


def chosen(names: Sequence[str], sets: dict[str, tuple[Part, ...]]) -> list[Part]:
    """The parts that are named, or in a set that is, in their order."""
    return [part for key, parts in sets.items() for part in parts if key in names or part.name in names]


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    every = [*SETS, *(part.name for parts in SETS.values() for part in parts)]
    text = f"sets or parts, of {', '.join(every)}; default: all"
    options.add_argument("--only", type=names_of(every), default=list(SETS), metavar="A,B", help=text)
    options.add_argument("--out", type=Path, metavar="FOLDER", help="results; default: below benchmarks/results")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a rehearsal with toy sizes")
    options.add_argument("--commit", metavar="HASH", help="said in the summary; default: what git says here")
    args = options.parse(argv)
    on_cuda = args.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        print("There is no CUDA device here. `--device cpu` rehearses with toy sizes.", file=sys.stderr)
        return 1
    device = torch.device(args.device)
    folder: Path = (args.out or _default_folder(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    where = environment(device, "gpu.py", args.argv)
    where["commit"] = args.commit or where["commit"]
    head = f"# {'GPU run' if on_cuda else 'Rehearsal on a CPU'}\n\n{environment_lines(where)}"
    print(head, flush=True)

    outcomes: dict[str, tuple[str, float]] = {}
    beginning = head
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        for part in chosen(args.only, SETS if on_cuda else REHEARSAL):
            start = time.monotonic()
            line = run(part, out, part.limit)
            seconds = time.monotonic() - start
            outcomes[part.name] = line, seconds
            print(f"{part.name}: {line} ({seconds:.0f} s)", flush=True)
            beginning = write(folder, out, head, outcomes, on_cuda)
    print(f"\n{beginning}\nEverything is in {_shown(folder)}: summary.md and results.tar.gz")
    return int(any(line.startswith(("failed", "stopped")) for line, _ in outcomes.values()))


def _shown(path: Path) -> str:
    """Relative to the checkout where it lies there."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _default_folder(device: torch.device) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M")
    return Path(__file__).parent / "results" / f"{name}-{date}"


if __name__ == "__main__":
    sys.exit(main())

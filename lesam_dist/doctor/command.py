"""`lesam-dist doctor`: all checks, as a table or as JSON."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from lesam_dist.config.parser import Parser, examples
from lesam_dist.doctor.devices import check_cuda, read_cuda
from lesam_dist.doctor.finding import Finding, guarded
from lesam_dist.doctor.host import (
    check_cpus,
    check_disk,
    check_shared_memory,
    read_cpus,
    read_disk,
    read_shared_memory,
)
from lesam_dist.doctor.images import check_decoder, check_folder, read_decoder, read_folder
from lesam_dist.doctor.kernels import check_kernels, read_kernels
from lesam_dist.doctor.launcher import check_launcher
from lesam_dist.doctor.versions import check_packages, check_versions, read_bounds, read_versions
from lesam_dist.errors import UserError, one_line

_TEXT = """See whether this machine has what a run needs: packages, GPUs, kernels, decoders, CPUs, shared memory, disk
and the launcher's environment. Each finding is ok, a warning or a problem, with what to do. Status 1 where there is a
problem, else 0."""
_WIDTH, _INDENT = 79, 23


def doctor(argv: Sequence[str], missing: Sequence[str] = ()) -> int:
    """Print all findings.

    Args:
        argv: of the command.
        missing: packages of the trainer that are not installed.

    Returns:
        The exit status: 1 where there is a problem, else 0.

    Raises:
        UserError: for wrong arguments, or a data set's folder that is not there.
    """
    arguments = parser().parse_args(list(argv))
    root = _folder(arguments.data) if arguments.data else None
    findings = list(examine(Path(arguments.run_dir), root, missing))
    if arguments.json:
        print(json.dumps({"findings": [asdict(each) for each in findings], "worst": worst(findings)}, indent=1))
    else:
        print("\n".join(table(findings)))
    return int(worst(findings) == "problem")


def parser() -> Parser:
    """Its arguments."""
    found = Parser(
        "doctor", _TEXT, examples("doctor", "doctor --run_dir /scratch/run --data /data/imagenet", "doctor --json")
    )
    found.add_argument("--run_dir", metavar="DIR", default="runs", help="where runs would write (default: runs)")
    found.add_argument("--data", metavar="DIR", help="a data set to look at: class folders, or packed")
    found.add_argument("--json", action="store_true", help="print the findings as JSON")
    return found


def examine(run_dir: Path, root: Path | None, missing: Sequence[str] = ()) -> Iterator[Finding]:
    """Every finding; a check that fails is one."""
    yield from guarded("packages", lambda: check_versions(read_versions(), read_bounds()))
    yield from guarded("trainer", lambda: check_packages(missing))
    gpus = 0
    if find_spec("torch") is not None:
        found = guarded("CUDA", lambda: check_cuda(read_cuda()))
        gpus = sum(each.name.startswith("GPU ") for each in found)
        yield from found
        yield from guarded("kernels", lambda: check_kernels(read_kernels()))
    yield from guarded("decoding", lambda: check_decoder(read_decoder(gpus > 0), gpus))
    if root is not None:
        yield from guarded("data", lambda: check_folder(read_folder(root)))
    yield from guarded("CPUs", lambda: check_cpus(read_cpus(), gpus))
    yield from guarded("/dev/shm", lambda: check_shared_memory(read_shared_memory()))
    yield from guarded("disk", lambda: check_disk(read_disk(run_dir)))
    yield from guarded("launcher", lambda: check_launcher(os.environ, gpus))


def worst(findings: Iterable[Finding]) -> str:
    """The worst status among them."""
    found = {each.status for each in findings}
    return next((status for status in ("problem", "warning") if status in found), "ok")


def table(findings: Sequence[Finding]) -> Iterator[str]:
    """A line for each finding, and one that counts them."""
    inside = " " * _INDENT
    for each in findings:
        start = f"{each.status:9s}{each.name:{_INDENT - 10}s} "
        yield textwrap.fill(start + each.text, _WIDTH, subsequent_indent=inside, break_on_hyphens=False)
        if each.remedy:
            first = f"{inside}-> "
            yield textwrap.fill(first + each.remedy, _WIDTH, subsequent_indent=f"{inside}   ", break_on_hyphens=False)
    counts = {status: sum(each.status == status for each in findings) for status in ("problem", "warning")}
    yield ""
    yield ", ".join(f"{count or 'no'} {status}{'s' * (count != 1)}" for status, count in counts.items()) + "."


def _folder(text: str) -> Path:
    if "://" in text:
        raise UserError(f"--data is '{one_line(text)}', an address: doctor looks at folders alone.")
    root = Path(text).expanduser()
    if not os.path.isdir(root):  # False of a name that is too long, too
        raise UserError(f"--data: folder '{one_line(text)}' does not exist.")
    return root

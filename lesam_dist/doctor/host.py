"""The machine around the GPUs: CPUs, shared memory, the disk that a run writes to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lesam_dist.doctor.finding import Finding, gib
from lesam_dist.parallel.place import usable_cores

_SHM = Path("/dev/shm")
_SHM_LEAST = 1 << 30  # workers hand over batches of 256 images of 224 pixels, 154 MB each
_DISK_LEAST, _DISK_ENOUGH = 1 << 30, 10 << 30
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cpus:
    """CPUs of the machine, those that this process may use, and how many of them its cgroup allows; None: all."""

    machine: int
    usable: int
    limit: float | None


@dataclass(frozen=True)
class Disk:
    """The folder that a run would make, or the first one above it that is there; ``free`` in bytes."""

    path: Path
    free: int
    error: str = ""


def read_cpus(cgroups: Path = _CGROUPS) -> Cpus:
    """Ask the kernel."""
    return Cpus(os.cpu_count() or 1, usable_cores(), _limit(cgroups))


def check_cpus(cpus: Cpus, gpus: int) -> Iterator[Finding]:
    """Whether there are enough of them to read images for this many GPUs."""
    count = cpus.usable if cpus.limit is None else min(cpus.usable, cpus.limit)
    text = f"{count:g}" + (f" of the machine's {cpus.machine}" if count < cpus.machine else "")
    if cpus.limit is not None and cpus.limit < cpus.usable:
        text += ", by the container's limit"
    if gpus and count < 4 * gpus:
        remedy = "give the container more, or decode on the GPU by DALI; --data.workers at most that many"
        yield Finding("CPUs", "warning", f"{text}: less than 4 for each GPU", remedy)
    else:
        yield Finding("CPUs", "ok", text)


def read_shared_memory(path: Path = _SHM) -> int | None:
    """Size of /dev/shm in bytes; None where there is none."""
    return shutil.disk_usage(path).total if path.is_dir() else None


def check_shared_memory(size: int | None) -> Iterator[Finding]:
    """What data workers hand batches over by."""
    if size is None:
        yield Finding("/dev/shm", "ok", "not there: workers use files")
    elif size < _SHM_LEAST:
        remedy = "docker run --shm-size 8g, or --ipc host; or --data.workers 0"
        yield Finding("/dev/shm", "warning", f"{gib(size)}: too small for large batches of data workers", remedy)
    else:
        yield Finding("/dev/shm", "ok", gib(size))


def read_disk(folder: Path) -> Disk:
    """Write a file into the folder, or into the first one above it that is there."""
    path = folder.expanduser().absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return Disk(path, free, error.strerror or str(error))
    return Disk(path, free)


def check_disk(disk: Disk) -> Iterator[Finding]:
    """Whether a run can write there, and its checkpoints have room."""
    where = f"in {disk.path}"
    if disk.error:
        remedy = "choose another folder with --run_dir DIR"
        yield Finding("disk", "problem", f"{where} nothing can be written: {disk.error}", remedy)
    elif disk.free < _DISK_LEAST:
        yield Finding("disk", "problem", f"{gib(disk.free)} free {where}: no room for checkpoints", "make room")
    elif disk.free < _DISK_ENOUGH:
        remedy = "--checkpoint.keep 1, or a larger disk for large models"
        yield Finding("disk", "warning", f"{gib(disk.free)} free {where}", remedy)
    else:
        yield Finding("disk", "ok", f"{gib(disk.free)} free {where}, which can be written to")


def _limit(cgroups: Path) -> float | None:
    """CPUs that the cgroup, of version 2 or 1, allows; None where it sets no limit."""
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroups / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroups / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)

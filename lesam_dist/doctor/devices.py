"""GPUs: the driver, what torch sees of them, their memory, and NCCL between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lesam_dist.doctor.finding import Finding, gib

_OLDEST = (8, 0)  # the oldest compute capability that the kernels are compiled for in tests
_BUSY = 0.5
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A device as torch sees it; memory in bytes."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int


@dataclass(frozen=True)
class Cuda:
    """What there is of CUDA.

    Attributes:
        built: the CUDA version that torch is built with; None of a build for CPUs.
        driver: whether NVIDIA's driver is loaded, with its own name for its version; "" without one.
        supports: the newest CUDA version that the driver runs, as (13, 0); None where that is not known.
        gpus: all that torch sees.
        nccl: its version, "" without it.
    """

    built: str | None
    driver: str
    supports: tuple[int, int] | None
    gpus: Sequence[Gpu]
    nccl: str


def read_cuda() -> Cuda:
    """Ask torch and the driver."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = []
    for index in range(count):
        known = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(known.name, (known.major, known.minor), total, free))
    number = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    supports = (number // 1000, number % 1000 // 10) if number else None
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl and count else ""
    return Cuda(torch.version.cuda, _driver(), supports, gpus, nccl or ("there" if has_nccl else ""))


def check_cuda(cuda: Cuda) -> Iterator[Finding]:
    """Whether GPUs can be used, and each of them."""
    yield _usable(cuda)
    for index, gpu in enumerate(cuda.gpus):
        yield _gpu(index, gpu)
    if len(cuda.gpus) > 1 and not cuda.nccl:
        yield Finding("NCCL", "problem", "not in this torch, which GPUs need to work together", "pip install torch")
    elif cuda.gpus:
        yield Finding("NCCL", "ok", cuda.nccl)
    else:
        yield Finding("NCCL", "ok", "not needed: processes without GPUs use gloo")


def _usable(cuda: Cuda) -> Finding:
    built = f"torch is built with CUDA {cuda.built}" if cuda.built else "torch is built for CPUs alone"
    if cuda.gpus:
        driver = f", the driver is {cuda.driver}" if cuda.driver else ""
        runs = f" and runs CUDA up to {'.'.join(map(str, cuda.supports))}" if cuda.supports else ""
        return Finding("CUDA", "ok", f"{built}{driver}{runs}")
    if not cuda.driver:
        return Finding(
            "CUDA", "warning", "no GPU here: runs train on the CPU", "small data sets, such as digits, do so"
        )
    if not cuda.built:
        return Finding("CUDA", "problem", f"there is a driver ({cuda.driver}), but {built}", "install torch with CUDA")
    need = tuple(int(part) for part in cuda.built.split("."))
    if cuda.supports and cuda.supports[0] < need[0]:
        runs = ".".join(map(str, cuda.supports))
        text = f"{built}, but the driver ({cuda.driver}) runs CUDA up to {runs}"
        return Finding("CUDA", "problem", text, "update the driver, or install torch for that CUDA version")
    text = f"there is a driver ({cuda.driver}), but torch sees no GPU"
    return Finding("CUDA", "problem", text, "look at CUDA_VISIBLE_DEVICES, nvidia-smi, or docker run --gpus all")


def _gpu(index: int, gpu: Gpu) -> Finding:
    name, capability = f"GPU {index}", ".".join(map(str, gpu.capability))
    text = f"{gpu.name}, {gib(gpu.total)}, compute capability {capability}"
    if gpu.capability < _OLDEST:
        return Finding(name, "warning", f"{text}: older than what is tested", "--optimizer.backend reference is safe")
    if gpu.free < _BUSY * gpu.total:
        return Finding(name, "warning", f"{text}: {gib(gpu.free)} are free", "see in nvidia-smi who has the rest")
    return Finding(name, "ok", text)


def _driver() -> str:
    """The driver's version; "" where none is loaded."""
    try:
        words = _DRIVER.read_text().split("\n")[0].split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "loaded")

"""What to change when memory runs out: one line with the fields that need it, in the order in which to try them."""

from __future__ import annotations

import errno
import re
from typing import Literal

import torch

from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError


class NoMemoryError(UserError):
    """Memory has run out; the message says what to change."""


_Place = Literal["device", "host", "shared", "worker"]

_SIGNS: dict[_Place, re.Pattern[str]] = {  # looked for in this order
    "worker": re.compile(r"DataLoader worker.*(killed by signal: Killed|exited unexpectedly)", re.DOTALL),
    "shared": re.compile(
        r"out of shared memory|Bus error|/dev/shm|</?torch_\w+>.*(No space|Cannot allocate)", re.DOTALL
    ),
    "device": re.compile(
        r"(CUDA|HIP|XPU|MPS\w*).{0,80}out of memory|CU(BLAS|DNN|SOLVER|FFT)_STATUS_ALLOC_FAILED|CUDABadAlloc"
        r"|CUDA allocation failed|cudaErrorMemoryAllocation|[Cc]uda failure.*out of memory",
        re.DOTALL,
    ),
    "host": re.compile(r"DefaultCPUAllocator|[Cc]annot allocate memory|bad_alloc|not enough memory|MemoryError"),
}
_SIZE = r"([\d.]+ [KMGT]?i?B|\d+ bytes)"
_ASKED = re.compile(rf"(?:[Tt]ried to allocate|Unable to allocate|unable to mmap) {_SIZE}")
_FREE = re.compile(rf"total capacity of {_SIZE} of which {_SIZE} is free")
_SCATTERED = re.compile(rf"{_SIZE} is reserved by PyTorch but unallocated")
_UNITS = {"bytes": 1.0, "B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}


def explain_memory(error: BaseException, config: Config, phase: str, device: str) -> NoMemoryError | None:
    """What a user can do about an error that says that memory ran out; None for any other error.

    Args:
        error: of torch, Python, NumPy, DALI, or a data loader whose worker was killed.
        config: the run, which says what is left to change.
        phase: what the process was doing, e.g. "step 812: pass 1"; one with "evaluating" is an evaluation.
        device: type of the run's device; on "cpu" the network's memory is the host's.
    """
    place = _place_of(error)
    if place is None:
        return None
    text = str(error)
    what = {
        "device": "the GPU is out of memory",
        "host": "this host is out of memory",
        "shared": "/dev/shm, by which data.workers hand over their batches, is full",
        "worker": "a data worker was killed, most likely as this host is out of memory (dmesg says)",
    }[place]
    numbers = []
    if asked := _ASKED.search(text):
        numbers.append(f"{_readable(asked[1])} asked for")
    if free := _FREE.search(text):
        numbers.append(f"{free[2]} of {free[1]} free")
    evaluates = "evaluating" in phase
    changes = _for_data(config, place, evaluates)
    if place == "device" or (place == "host" and device == "cpu"):
        changes = _for_network(config, evaluates, device) + (changes if place == "host" else [])
    if place == "shared":
        changes.append("a larger /dev/shm (docker run --shm-size, or --ipc host)")
    elif place == "device" and _is_scattered(text):
        changes.insert(0, "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment, as much lies in pieces")
    else:
        changes.append("fewer processes per host" if place != "device" else "more processes, or a GPU with more memory")
    said = f" ({', '.join(numbers)})" if numbers else ""
    return NoMemoryError(f"{what} in {phase}{said}. Try, in this order: {'; '.join(changes)}.")


def _place_of(error: BaseException) -> _Place | None:
    if isinstance(error, UserError) or not isinstance(error, (MemoryError, RuntimeError, OSError)):
        return None
    text = f"{type(error).__name__}: {error}"
    for place, sign in _SIGNS.items():
        if sign.search(text):
            return place
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    is_host = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return "host" if is_host else None


def _for_network(config: Config, evaluates: bool, device: str) -> list[str]:
    """What makes weights, activations and gradients smaller, from what changes least to what changes most."""
    data, precision, parallel = config.data, config.precision, config.parallel
    changes = []
    if evaluates and data.eval_batch_size > 1:
        changes.append(f"data.eval_batch_size below {data.eval_batch_size}")
    keeps_results = data.accumulation_mode == "batch"
    more_parts = f"data.micro_batches above {data.micro_batches}"
    can_part = not evaluates and data.micro_batches < data.batch_size
    if can_part and keeps_results:
        changes.append(more_parts)
    if precision.compute == "fp32" and device != "cpu":
        changes.append("precision.compute bf16 (now fp32)")
    if not evaluates and not config.model.activation_checkpointing:
        changes.append("model.activation_checkpointing true, for networks without BatchNorm (now false)")
    if not parallel.is_sharded and config.optimizer.scope == "global":
        changes.append(f"parallel.strategy fsdp on several processes (now {parallel.strategy})")
    if parallel.is_sharded and precision.gather_dtype == "fp32" and device != "cpu":
        also = "" if precision.compute == "bf16" else ", with precision.compute bf16"
        changes.append(f"precision.gather_dtype bf16 (now fp32){also}")
    if parallel.is_sharded and not parallel.reshard_after_forward:
        changes.append("parallel.reshard_after_forward true (now false)")
    if can_part and not keeps_results:
        changes.append(more_parts)
    if not evaluates and data.batch_size > 1:
        changes.append(f"data.batch_size below {data.batch_size}, with optimizer.lr to match")
    return changes


def _for_data(config: Config, place: _Place, evaluates: bool) -> list[str]:
    """What makes smaller what the host keeps of images and checkpoints."""
    data = config.data
    changes = [f"data.workers below {data.workers}"] if data.workers > 0 else []
    name, size = ("eval_batch_size", data.eval_batch_size) if evaluates else ("batch_size", data.batch_size)
    if size > 1:
        changes.append(f"data.{name} below {size}")
    if place in ("host", "worker") and config.checkpoint.asynchronous != "never":
        changes.append(f"checkpoint.asynchronous never (now {config.checkpoint.asynchronous})")
    return changes


def _is_scattered(text: str) -> bool:
    """Whether torch holds enough memory for what was asked for, but not in one piece."""
    asked, scattered = _ASKED.search(text), _SCATTERED.search(text)
    return asked is not None and scattered is not None and _bytes(scattered[1]) >= _bytes(asked[1])


def _bytes(size: str) -> float:
    number, unit = size.split()
    return float(number) * _UNITS.get(unit, 1.0)


def _readable(size: str) -> str:
    if not size.endswith(" bytes"):
        return size
    number = _bytes(size)
    unit = next((unit for unit in ("TiB", "GiB", "MiB", "KiB") if number >= _UNITS[unit]), "bytes")
    return f"{number / _UNITS[unit]:.4g} {unit}"

"""Memory that runs out: what a user is told to change, on messages as torch, NumPy and Python really write them."""

from __future__ import annotations

import mmap
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lesam_dist.config.schema import Config
from lesam_dist.train.out_of_memory import explain_memory
from lesam_dist.train.passes import Passes

# What CUDA's allocator says (c10/cuda/CUDACachingAllocator.cpp); there may be no GPU here.
ON_A_GPU = (
    "CUDA out of memory. Tried to allocate {asked}. GPU 0 has a total capacity of 79.15 GiB of which 1.20 GiB is free. "
    "Including non-PyTorch memory, this process has 77.93 GiB memory in use. Of the allocated memory 70.10 GiB is "
    "allocated by PyTorch, and {scattered} is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


class Dies(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), 9)
        return 0


def an_array_in_torch(size: int) -> Any:
    return torch.empty(size, dtype=torch.uint8)


def an_array_in_numpy(size: int) -> Any:
    return np.ones(size, dtype=np.uint8)


def a_list(size: int) -> Any:
    return [0] * size


def a_map(size: int) -> Any:
    return mmap.mmap(-1, size)


def shared_memory(size: int) -> Any:
    return torch.UntypedStorage._new_shared(size * 1000)


def a_worker(size: int) -> Any:
    return list(DataLoader(Dies(), num_workers=1, multiprocessing_context="fork"))


HOST = (an_array_in_torch, an_array_in_numpy, a_list, a_map)


@pytest.fixture
def little_memory(seed: int) -> Iterator[int]:
    """Within, this process may have 1 GiB more than it has; a size that does not fit."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    try:
        yield random.Random(seed).randint(2 * 2**30, 2**33)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def what_it_raises(function: Callable[[int], Any], size: int) -> BaseException:
    try:
        function(size)
    except Exception as error:
        return error
    raise AssertionError("there was enough memory")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("function", HOST)
def test_real_errors_of_the_host(little_memory: int, function: Callable[[int], Any]) -> None:
    error = what_it_raises(function, little_memory)
    config = Config()
    config.data.workers = 7
    found = explain_memory(error, config, "step 12: pass 1", "cuda")
    assert found is not None, repr(error)
    message = str(found)
    assert message.startswith("this host is out of memory in step 12: pass 1")
    assert message.index("data.workers below 7") < message.index("data.batch_size below 256")
    assert "micro_batches" not in message, "which is the device's"
    assert "\n" not in message
    if function is an_array_in_torch:
        assert f"({little_memory / 2**30:.4g} GiB asked for)" in message
    on_the_cpu = explain_memory(error, config, "step 12: pass 1", "cpu")
    assert "Try, in this order: data.micro_batches above 1; " in str(on_the_cpu)


def test_a_worker_that_was_killed_and_memory_that_is_shared() -> None:
    config = Config()
    found = explain_memory(what_it_raises(a_worker, 0), config, "step 1: waiting for a batch", "cuda")
    assert str(found).startswith("a data worker was killed, most likely as this host is out of memory")
    free = os.statvfs("/dev/shm")
    size = free.f_bavail * free.f_frsize
    found = explain_memory(what_it_raises(shared_memory, size), config, "step 1: waiting for a batch", "cuda")
    assert str(found).startswith("/dev/shm, by which data.workers hand over their batches, is full")
    assert "docker run --shm-size" in str(found)


def test_what_is_not_about_memory_is_left_alone() -> None:
    for error in (ValueError("out of memory"), RuntimeError("shape mismatch"), OSError(28, "No space left on device")):
        assert explain_memory(error, Config(), "step 1: pass 1", "cuda") is None


def test_a_gpu_s_message_has_its_numbers_and_what_is_left_to_change() -> None:
    config = Config()
    error = torch.OutOfMemoryError(ON_A_GPU.format(asked="2.00 GiB", scattered="512.00 MiB"))
    message = str(explain_memory(error, config, "step 3: pass 2", "cuda"))
    start = "the GPU is out of memory in step 3: pass 2 (2.00 GiB asked for, 1.20 GiB of 79.15 GiB free). "
    assert message.startswith(
        start + "Try, in this order: data.micro_batches above 1; precision.compute bf16 (now fp32)"
    )
    fields = ("micro_batches", "compute bf16", "activation_checkpointing", "strategy fsdp", "data.batch_size below 256")
    assert sorted(fields, key=message.index) == list(fields)
    assert "expandable" not in message
    assert "eval_batch_size" not in message
    evaluating = str(explain_memory(error, config, "step 3: evaluating", "cuda"))
    assert "Try, in this order: data.eval_batch_size below 256; precision.compute bf16" in evaluating
    assert "micro_batches" not in evaluating
    scattered = torch.OutOfMemoryError(ON_A_GPU.format(asked="2.00 GiB", scattered="2.50 GiB"))
    assert "in this order: PYTORCH_ALLOC_CONF=expandable_segments:True" in str(
        explain_memory(scattered, config, "", "cuda")
    )


def test_what_is_at_its_end_is_not_named(seed: int) -> None:
    """Whatever is drawn, no advice asks for what the run has already."""
    draw = random.Random(seed)
    config = Config()
    config.data.batch_size = draw.choice([1, 8])
    config.data.micro_batches = draw.choice([1, config.data.batch_size])
    config.data.workers = draw.choice([0, 3])
    config.precision.compute = draw.choice(["fp32", "bf16", "fp16"])
    config.precision.gather_dtype = draw.choice(["fp32", "bf16"])
    config.model.activation_checkpointing = draw.choice([False, True])
    config.parallel.strategy = draw.choice(["none", "ddp", "fsdp", "hsdp"])
    device, phase = draw.choice(["cpu", "cuda"]), draw.choice(["step 1: pass 1", "step 1: evaluating"])
    error: Exception = torch.OutOfMemoryError(ON_A_GPU.format(asked="1.00 GiB", scattered="1.00 MiB"))
    error = MemoryError() if device == "cpu" else error
    message = str(explain_memory(error, config, phase, device))
    training = "evaluating" not in phase
    sharded = config.parallel.strategy in ("fsdp", "hsdp")
    expected = {
        "micro_batches": training and config.data.micro_batches < config.data.batch_size,
        "precision.compute bf16 (": config.precision.compute == "fp32" and device == "cuda",
        "gather_dtype": sharded and config.precision.gather_dtype == "fp32" and device == "cuda",
        "activation_checkpointing": training and not config.model.activation_checkpointing,
        "strategy": not sharded,
        "data.batch_size": training and config.data.batch_size > 1,
        "eval_batch_size": not training,
        "data.workers": device == "cpu" and config.data.workers > 0,
    }
    for name, named in expected.items():
        assert (name in message) == named, f"{name}: {message}"


def test_a_run_says_it_in_one_line(
    command: Callable[..., tuple[int, str, str]],
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Wherever it happens: in the passes of a random step, or in an evaluation."""
    draw = random.Random(seed)
    left, evaluates = draw.randrange(12), draw.random() < 0.3

    def fail_later(self: Passes, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            assert self._on_pass is not None
            self._on_pass("pass 1 or 2")
            an_array_in_torch(10**14)
        return pass_over(self, **options)

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    step, pass_over = 1 + left // 2, Passes.__call__
    if evaluates:
        monkeypatch.setattr("lesam_dist.train.validation.evaluate", fail)
    else:
        monkeypatch.setattr(Passes, "__call__", fail_later)
    status, _, err = command(*small, "--run_dir", str(tmp_path / "run"), "--parallel.device", "cpu")
    assert status == 2, err
    phase = "evaluating one batch." if evaluates else f"step {step}: pass 1 or 2 (90.95 TiB asked for)."
    assert err.startswith(f"lesam-dist: error: this host is out of memory in {phase} Try, in this order: data.")
    assert err.count("\n") == 2
    assert err.splitlines()[1].startswith("lesam-dist: with one of these changes as a flag behind it, go on with: ")

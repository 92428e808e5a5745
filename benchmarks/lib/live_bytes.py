"""How many bytes live at once: from CUDA's allocator, or, since a CPU's counts nothing, from a list of all storages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lesam_dist.parallel.shards import local_shard

_GRACE = 0.005  # seconds


class LiveBytes(TorchDispatchMode):
    """Within, every storage that an operator returns is known, and the sum of their bytes, with its peak.

    An operator's own workspace does not show. Storages are held weakly and asked for their size each time, because
    FSDP2 frees and refills storages by resizing. torch.profiler would not do: it sees the frees of its own thread, and
    gloo's threads free the collectives' buffers. They do so a little late, which is no need of the step: a new peak
    counts when it still is one after a moment. torch.distributed._tools.FSDPMemTracker patches FSDP2's internals.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: WeakSet[torch.UntypedStorage] = WeakSet()
        self._recording = False
        self._peak = 0

    def record(self) -> None:
        """From here on, keep the peak."""
        self._recording, self._peak = True, self._now()

    def peak(self) -> int:
        """The most bytes that lived at once since `record`."""
        return self._peak

    def _now(self) -> int:
        return sum(storage.nbytes() for storage in self._storages)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = len(self._storages)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._storages.add(local_shard(leaf).untyped_storage())
        if self._recording and len(self._storages) > known and self._now() > self._peak:
            if dist.is_initialized():
                time.sleep(_GRACE)
            self._peak = max(self._peak, self._now())
        return result


class CudaBytes:
    """The same from torch's caching allocator, which hands out multiples of 512 bytes; workspaces are counted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> CudaBytes:
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self) -> None:
        """From here on, keep the peak."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """The most bytes that lived at once since `record`, less those from before the beginning."""
        return torch.cuda.max_memory_allocated(self._device) - self._before


def meter(device: torch.device) -> LiveBytes | CudaBytes:
    """Counts what is allocated on ``device`` by this thread, within it."""
    return CudaBytes(device) if device.type == "cuda" else LiveBytes()


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages in which these tensors lie, each counted once; of a DTensor, this rank's shard."""
    storages = [local_shard(tensor).untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

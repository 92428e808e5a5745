"""Sums of squares of the gradients, taken while backward goes on: see `Options.norm_in_backward`.

Parameters are cut into groups once. When a backward has made the gradients of a whole group, the group's sum is taken,
on a stream of its own, and kept with the gradients that it is of. A step that needs a norm adds the groups' sums up. A
group whose gradients are others by then, or have changed, is summed anew; by the same code, so that processes agree to
the bit whatever was early on which of them. Always added in the order of the groups, not in that of arrival.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lesam_dist.optim.engine.backend import choose, select
from lesam_dist.optim.engine.options import Backend
from lesam_dist.optim.engine.reference import Radius
from lesam_dist.optim.engine.rows import Gradients, Rows
from lesam_dist.parallel.shards import local_shard

Arrivals = Literal["hooks", "buckets"]
"""Who tells of a gradient that is final: the hook of its parameter, or that of a DDP bucket."""

GROUPS = 8  # of one list of rows: the last one's sum is not hidden, and each costs a launch
LEAST_BYTES = 2**24  # of a group: 6 microseconds at 3 TB/s, half of what its launch costs the host


class EarlySums:
    """The sums of some lists of rows.

    Args:
        rows: where the parameters are. On one process their gradients are final when torch's post-accumulate-grad
            hooks run, and under FSDP2, which runs these hooks on the reduced shards.
        backend: who takes the sums.
        arrivals: "hooks" to register these; "buckets" where DDP's call `arrived`, see `GuardedOptimizer.sum_buckets`.

    Raises:
        RuntimeError: for "hooks" on parameters whose gradients somebody reduces afterwards.
    """

    def __init__(self, rows: Sequence[Rows], backend: Backend, arrivals: Arrivals = "hooks") -> None:
        if arrivals == "hooks":
            _require_final(p for each in rows for p in each.params)
        self._sets = [_Set(each, choose(backend, each)) for each in rows]
        self._where = {
            p: (own, group, index)
            for own in self._sets
            for group in own.groups
            for index, p in enumerate(group.rows.params)
        }
        self._lock = threading.Lock()  # gloo's threads may tell of two buckets at one time
        handles = []
        if arrivals == "hooks":
            this = weakref.ref(self)  # parameters outlive the optimizer

            def hook(p: Tensor) -> None:
                if (sums := this()) is not None and p.grad is not None:
                    sums.arrived(p, p.grad)

            handles = [p.register_post_accumulate_grad_hook(hook) for p in self._where if p.requires_grad]
        self.remove = weakref.finalize(self, _remove, handles)

    def arrived(self, p: Tensor, grad: Tensor) -> None:
        """Take it that this gradient is final, on the current stream; a parameter that is not ours is ignored."""
        where = self._where.get(p)
        if where is None:
            return
        own, group, index = where
        with self._lock:
            if group.arrived(index, local_shard(grad)):
                own.sum_early(group)

    def take(self, grads: Sequence[Gradients], perturbed_only: bool = False) -> list[Tensor]:
        """The sum of squares of each list of rows, float64 0-d and new, of just these gradients; taken only once."""
        return [own.take(each, perturbed_only) for own, each in zip(self._sets, grads, strict=True)]

    def push(self, radii: Sequence[Radius]) -> None:
        """See `SharpnessAware.push_scalars`: a captured graph takes its sums where its gradients are."""
        for own in self._sets:
            for group in own.groups:
                group.ops.push(radii, None)

    def drop(self) -> None:
        """Let go of the gradients that were kept, and of their sums."""
        for own in self._sets:
            own.drop()


class _Set:
    """The groups of one list of rows, those that are perturbed first."""

    def __init__(self, rows: Rows, backend: Backend) -> None:
        self._device = rows.device
        perturbed, others = ([i for i, on in enumerate(rows.perturbed) if on == which] for which in (True, False))
        parts = [_cut(rows, perturbed), _cut(rows, others)]
        self.groups = [_Group(rows, places, backend) for each in parts for places in each]
        self._perturbed = self.groups[: len(parts[0])]
        self._early: tuple[Tensor, Tensor] | None = None  # of the perturbed and of all groups, once all have arrived
        self._stream: torch.cuda.Stream | None = None
        self._running = False

    @torch.no_grad()
    def sum_early(self, group: _Group) -> None:
        """Take a group's sum beside what the current stream goes on with."""
        if self._device.type != "cuda":
            self._sum(group)
            return
        self._stream = self._stream or torch.cuda.Stream(self._device)
        # Also orders this after the step that read the last sums, whose memory is used again.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._running = True
        with torch.cuda.stream(self._stream):
            self._sum(group)

    def _sum(self, group: _Group) -> None:
        group.sum_up()
        if all(each.sum_sq is not None for each in self.groups):
            total = self._total(self.groups)
            is_all = len(self._perturbed) == len(self.groups)
            self._early = (total if is_all else self._total(self._perturbed), total)

    def take(self, grads: Gradients, perturbed_only: bool) -> Tensor:
        self._join()
        groups = self._perturbed if perturbed_only else self.groups
        stale = [group for group in groups if not group.is_of(grads)]
        for group in stale:
            group.sum_anew(grads)
        early = None if stale or self._early is None else self._early[0 if perturbed_only else 1]
        total = self._total(groups) if early is None else early
        self.drop()
        return total

    def drop(self) -> None:
        self._join()
        self._early = None
        for group in self.groups:
            group.clear()

    def _join(self) -> None:
        """Let the current stream wait for the sums; so gradients are freed after they were read."""
        if self._running and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._running = False

    def _total(self, groups: Sequence[_Group]) -> Tensor:
        sums = [group.sum_sq for group in groups if group.sum_sq is not None]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=self._device)


class _Group:
    """Parameters that are summed by one launch, and which of their gradients are there."""

    def __init__(self, rows: Rows, places: Sequence[int], backend: Backend) -> None:
        self._places = places
        self.rows = Rows(rows.device, rows.axes, dtensors=rows.dtensors)
        for i in places:
            self.rows.params.append(rows.params[i])
            self.rows.shards.append(rows.shards[i])
            self.rows.groups.append(rows.groups[i])
        self.ops = select(backend, self.rows)
        self._needed = sum(p.requires_grad for p in self.rows.params)
        self._grads: Gradients = [None] * len(places)  # kept until the sum is taken: no other has their addresses
        self.clear()

    def clear(self) -> None:
        self._grads[:] = [None] * len(self._places)  # in place: what makes the sum has the list, too
        self._versions: list[int] = []
        self._missing = self._needed
        self.sum_sq: Tensor | None = None

    def arrived(self, index: int, grad: Tensor) -> bool:
        """Keep a gradient; returns whether the group is complete."""
        if self._grads[index] is not None:  # another backward
            self.clear()
        self._grads[index] = grad
        self._missing -= 1
        return self._missing == 0

    def sum_up(self) -> None:
        """Take the sum of the gradients that are kept."""
        self._versions = [0 if g is None else g._version for g in self._grads]
        self.sum_sq = self.ops.sum_sq_second(self._grads)

    def sum_anew(self, grads: Gradients) -> None:
        """Take the sum of the group's part of these gradients."""
        self._grads[:] = [grads[i] for i in self._places]
        self.sum_up()

    def is_of(self, grads: Gradients) -> bool:
        """Whether there is a sum, of just these gradients as they are now."""
        if self.sum_sq is None:
            return False
        own = zip(self._grads, self._versions, (grads[i] for i in self._places), strict=True)
        return all(_is_same(kept, now) and (now is None or now._version == version) for kept, version, now in own)


def _is_same(kept: Tensor | None, now: Tensor | None) -> bool:
    """Whether they are the same memory; DDP's gradients are new objects each time."""
    return kept is now or (kept is not None and now is not None and kept.data_ptr() == now.data_ptr())


def _cut(rows: Rows, places: Sequence[int]) -> list[list[int]]:
    """Cut into groups of about equal size, from the last parameter, whose gradient comes first, to the first."""
    sizes = [rows.shards[i].numel() * rows.shards[i].element_size() for i in places]
    limit = max(LEAST_BYTES, sum(sizes) // GROUPS)
    groups: list[list[int]] = []
    room = 0
    for i, size in zip(reversed(places), reversed(sizes), strict=True):
        if not groups or room <= 0:
            groups.append([])
            room = limit
        groups[-1].append(i)
        room -= size
    return groups


def _require_final(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where a parameter's own hook would see what is not reduced yet."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes > 1 and any(not isinstance(p, DTensor) for p in params):
        raise RuntimeError(
            f"norm_in_backward: a parameter is whole on each of {processes} processes, so its gradient is reduced "
            "after the hooks of backward. Call optimizer.sum_buckets(model) before the first backward, with a "
            "DistributedDataParallel, or leave norm_in_backward out."
        )


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()

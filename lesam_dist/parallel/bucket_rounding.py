"""DDP's reduction in bfloat16, in the passes that may round. No postponed annotations here: DDP compares those of a
hook as objects."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lesam_dist.parallel.bucket_average import average_each


class Rounding:
    """Whether the gradients of the backward that runs now are averaged in a smaller dtype; off at first.

    Args:
        dtype: that gradients are rounded to, and added up in.
        world_size: of the default process group.
        each: reduce each gradient by itself, see `average_each`, instead of whole buckets.
    """

    def __init__(self, dtype: torch.dtype, world_size: int, each: bool) -> None:
        self.dtype, self.world_size, self.each = dtype, world_size, each
        self.enabled = False

    @contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Inside, gradients are rounded or not."""
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before


def round_buckets(model: DistributedDataParallel, rounding: Rounding) -> None:
    """Register the hook, of which DDP takes one."""
    model.register_comm_hook(rounding, average_rounded)
    model._rounding = rounding  # type: ignore[assignment]  # where `rounding_of` finds it


def rounding_of(model: nn.Module) -> Rounding | None:
    """What `round_buckets` gave this model; None for any other."""
    rounding: Rounding | None = getattr(model, "_rounding", None)
    return rounding


def average_rounded(rounding: Rounding, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Average a bucket over all processes; they get the same bits, rounded or not.

    An average is divided before it is rounded: that rounds each process's part once, and each of the sums. An infinite
    or nan gradient stays so.
    """
    buffer = bucket.buffer()
    if not rounding.enabled or buffer.dtype != torch.float32:
        if rounding.each:
            return average_each(rounding.world_size, bucket)
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]
    rounded = (buffer / rounding.world_size).to(rounding.dtype)
    parts = rounded.split([g.numel() for g in bucket.gradients()]) if rounding.each else [rounded]
    reductions = [dist.all_reduce(part, async_op=True).get_future() for part in parts]
    reduced = torch.futures.collect_all(reductions) if rounding.each else reductions[0]  # of a GPU's there is one
    return reduced.then(lambda _: buffer.copy_(rounded))

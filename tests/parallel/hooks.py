"""DDP communication hooks that count. No postponed annotations here: DDP compares them as objects."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lesam_dist.parallel.bucket_average import average_each


def counting_hook(reductions: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Reduce as DDP does, and note which bucket."""
    reductions.append(bucket.index())
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


def counting_average(reductions: list[int]) -> Callable[[int, dist.GradBucket], torch.futures.Future[torch.Tensor]]:
    """`average_each`, which notes in ``reductions`` which bucket."""

    def hook(world_size: int, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reductions.append(bucket.index())
        return average_each(world_size, bucket)

    return hook


def other_buffer(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Reduce a copy of the bucket, rounded to bfloat16, and let DDP take the gradients from there."""
    rounded = (bucket.buffer() / dist.get_world_size()).bfloat16()
    future = dist.all_reduce(rounded, async_op=True).get_future()
    return future.then(lambda done: done.value()[0].to(bucket.buffer().dtype))

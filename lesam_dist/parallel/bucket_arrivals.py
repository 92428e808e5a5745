"""Tells of gradients that DDP has reduced. No postponed annotations here: DDP compares those of a hook as objects."""

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

BucketHook = Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]  # type: ignore[name-defined]


def tell_of_buckets(
    model: DistributedDataParallel,
    listener: WeakMethod[Callable[[list[Tensor], list[Tensor]], None]],
    hook: BucketHook | None,
    state: Any,
) -> None:
    """Register a hook that reduces a bucket by another one (None: as DDP does), then calls ``listener(params, grads)``.

    It is called on the stream that the reduction is done on, while backward may go on. The gradients are views of the
    bucket, and so are those in ``.grad`` when backward is done, where the model has gradient_as_bucket_view.
    """
    if hook is None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        hook = allreduce_hook
    reduce = hook

    def reduce_and_tell(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        params, grads = bucket.parameters(), bucket.gradients()
        buffer: Tensor = bucket.buffer()

        def tell(future: torch.futures.Future[Tensor]) -> Tensor:
            reduced: Tensor = future.value()
            if reduced.data_ptr() != buffer.data_ptr():
                buffer.copy_(reduced.view_as(buffer))
            if (told := listener()) is not None:
                told(params, grads)
            return buffer

        return reduce(state, bucket).then(tell)

    model.register_comm_hook(state, reduce_and_tell)

"""How DDP averages gradients on the CPU. No postponed annotations here: DDP compares those of a hook as objects."""

import torch
import torch.distributed as dist


def average_each(world_size: int, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Average each gradient of a bucket by itself, so that a resumed run has the bits of the one it goes on with.

    gloo adds three processes or more up in an order that depends on an element's place in what is reduced, and DDP
    fills its buckets anew after the first backward that it sees: with whole buckets, the first step after a resume
    would add in another order.

    Args:
        world_size: of the default process group.
        bucket: gradients that are ready at one time, in one buffer.
    """
    buffer = bucket.buffer().div_(world_size)
    reductions = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    return torch.futures.collect_all(reductions).then(lambda _: buffer)

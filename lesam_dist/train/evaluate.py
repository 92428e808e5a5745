"""Evaluation that counts every sample once, at any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lesam_dist.parallel import Distributed
from lesam_dist.wrapping import is_sharded

Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    here: Distributed,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Top-1 accuracy and cross entropy over the samples of all ranks.

    Sums are reduced, not means: ranks may hold different numbers of samples, or none.

    Args:
        model: not wrapped by DDP. Sharded by FSDP2, its forwards are collective: a rank that runs out of batches goes
            on with empty ones until all have. Left in the mode it came in.
        batches: this rank's share, images (B, C, H, W) and labels (B,).
        here: this process among all.
        autocast: dtype of the forward, or None.

    Returns:
        ``acc1`` in per cent, ``loss`` per sample, and the ``samples`` counted.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=here.device)
    for images, labels in _in_step(batches, here) if is_sharded(model) else batches:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        correct = (logits.argmax(dim=1) == labels).sum()
        sums += torch.stack([loss.double(), correct.double(), torch.tensor(len(labels)).to(sums)])
    model.train(was_training)
    if here.world_size > 1:
        dist.all_reduce(sums)
    loss_sum, correct_sum, samples = sums.tolist()
    return {"acc1": 100 * correct_sum / samples, "loss": loss_sum / samples, "samples": samples}


def _in_step(batches: Batches, here: Distributed) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, then empty ones until every rank has run out."""
    source = iter(batches)
    while True:
        batch = next(source, None)
        # Every rank learns who goes on, and the shape of an image from one that has any.
        shapes: list[list[int] | None] = [None] * here.world_size
        dist.all_gather_object(shapes, None if batch is None else list(batch[0].shape[1:]))
        shape = next((s for s in shapes if s is not None), None)
        if shape is None:
            return
        if batch is None:
            images = torch.empty(0, *shape, device=here.device)
            batch = images, images.new_empty(0, dtype=torch.long)
        yield batch

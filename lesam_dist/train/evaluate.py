"""Evaluation that counts every sample once, at any number of processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lesam_dist.parallel import Distributed


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    here: Distributed,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Top-1 accuracy and cross entropy over the samples of all ranks.

    Sums are reduced, not means: ranks may hold different numbers of samples, or none.

    Args:
        model: not wrapped by DDP (ranks may run different numbers of batches); left in the mode it came in.
        batches: this rank's share, images (B, C, H, W) and labels (B,).
        here: this process among all.
        autocast: dtype of the forward, or None.

    Returns:
        ``acc1`` in per cent, ``loss`` per sample, and the ``samples`` counted.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=here.device)
    for images, labels in batches:
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

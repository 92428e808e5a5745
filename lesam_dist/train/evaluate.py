"""Evaluation that counts every sample once, at any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, repeat

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import is_sharded
from lesam_dist.train.calibration import BINS, calibration_of, calibration_sums

_TOP = 5
Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    world: Distributed,
    autocast: torch.dtype | None = None,
    *,
    count: int | None = None,
    leave: Callable[[], bool] | None = None,
) -> dict[str, float] | None:
    """Top-1 and top-5 accuracy and cross entropy over the samples of all ranks.

    Sums are reduced, not means: ranks may hold different numbers of samples, or none. The host waits for the device
    once, at the end.

    Args:
        model: not wrapped by DDP. Where FSDP2 shards it, its forwards are collective: a rank that runs out of batches
            goes on with empty ones until all have. Its mode (training or not) is the same afterwards.
        batches: this rank's share, images (B, C, H, W) and labels (B,).
        world: this process among all.
        autocast: dtype of the forward, or None.
        count: number of this rank's batches; needed where the model is sharded, and not used elsewhere.
        leave: asked before each batch; where it is true on any process, all leave without a result, each as soon as
            it can. Not asked for a sharded model, whose forwards nobody may leave alone.

    Returns:
        None where a process has left, else
        ``acc1`` and, for more than 5 classes, ``acc5`` in per cent, ``loss`` per sample (which is the negative
        log-likelihood), ``ece``, the expected calibration error from 0 to 1 (`lesam_dist.train.calibration`), and the
        ``samples`` counted.

    Raises:
        ValueError: for a sharded model without ``count``.
    """
    if is_sharded(model):
        if count is None:
            raise ValueError("the forwards of a sharded model are collective: pass count, the number of batches")
        batches, leave = _in_step(batches, count, world), None
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    bins = torch.zeros(4, BINS + 1, dtype=torch.float64, device=world.device)
    counts = [0, 0, 0]  # samples; those with more than 5 classes: the same, but on a rank without any; who has left
    for images, labels in batches:
        if leave is not None and leave():
            counts[2] = 1
            break
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        correct = logits.argmax(dim=1) == labels
        among_five = torch.zeros_like(correct)
        if logits.shape[1] > _TOP:
            among_five = (logits.topk(_TOP, dim=1).indices == labels[:, None]).any(dim=1)
            counts[1] += len(labels)
        counts[0] += len(labels)
        sums += torch.stack([loss.double(), correct.sum().double(), among_five.sum().double()])
        bins += calibration_sums(logits, labels)
    model.train(was_training)
    sums = torch.cat([sums, torch.tensor(counts, dtype=sums.dtype).to(sums.device), bins.flatten()])
    world.move("at the end of an evaluation")
    if world.world_size > 1:
        dist.all_reduce(sums)
    total = sums.cpu()
    loss_sum, correct_sum, among_five_sum, samples, of_many, left = total[:6].tolist()
    if left:
        return None
    result = {"acc1": 100 * correct_sum / samples}
    if of_many:
        result["acc5"] = 100 * among_five_sum / samples
    ece = calibration_of(total[6:].view_as(bins)).ece
    return result | {"loss": loss_sum / samples, "ece": ece, "samples": samples}


def _in_step(batches: Batches, count: int, world: Distributed) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, then empty ones until every rank has had as many as the one with the most."""
    source = iter(batches)
    first = list(islice(source, 1))
    # What an image looks like comes from a rank that has one: another may have none at all.
    ranks: list[tuple[int, list[tuple[torch.Size, torch.dtype]]]]
    ranks = world.gather((count, [(images.shape[1:], images.dtype) for images, _ in first]))
    most = max(count for count, _ in ranks)
    if most == 0:
        return
    shape, dtype = next(chain.from_iterable(images for _, images in ranks))
    images = torch.empty(0, *shape, dtype=dtype, device=world.device)
    empty = images, images.new_empty(0, dtype=torch.long)
    yield from islice(chain(first, source, repeat(empty)), most)

"""Mixup and CutMix: the formulas, the draws, and one global batch on any number of processes and in both passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lesam_dist.config.schema import Config, DataConfig
from lesam_dist.errors import UserError
from lesam_dist.optim import SAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.classification.task import Classification
from lesam_dist.tasks.images.mixing import Mix, Mixing, draw_mix, mix, require_pairs
from lesam_dist.train.updates import Updates
from tests.parallel import processes
from tests.told import told

BATCH, CLASSES, SIDE = 8, 5, 12
EPS = 2**-23
TARGETS = 4 * EPS * CLASSES * 10  # targets are rounded to float32, and no logarithm of a probability here is below -10
BOTH = DataConfig(mixup=0.4, cutmix=1.0, mix_probability=0.8)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(0, CLASSES, (BATCH,))


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_draws_are_of_seed_and_step_and_distributed_as_said(seed: int) -> None:
    """Shares and moments of 3000 steps, within five standard deviations."""
    n = 3000
    drawn = [draw_mix(BOTH, SIDE, SIDE, seed=seed, step=step) for step in range(n)]
    assert drawn[::300] == [draw_mix(BOTH, SIDE, SIDE, seed=seed, step=step) for step in range(0, n, 300)]
    assert drawn[:50] != [draw_mix(BOTH, SIDE, SIDE, seed=seed + 1, step=step) for step in range(50)]
    mixed = [each for each in drawn if each is not None]
    assert abs(len(mixed) / n - 0.8) < 5 * (0.8 * 0.2 / n) ** 0.5
    blends = np.array([each.share for each in mixed if each.box is None])
    assert abs(len(blends) / len(mixed) - 0.5) < 5 * (0.25 / len(mixed)) ** 0.5
    # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2 a + 1)), and none of its fourth powers exceeds 1/16.
    variance = 1 / (4 * (2 * 0.4 + 1))
    assert abs(blends.mean() - 0.5) < 5 * (variance / len(blends)) ** 0.5
    assert abs(((blends - 0.5) ** 2).mean() - variance) < 5 * (1 / 16 / len(blends)) ** 0.5


def test_boxes(seed: int) -> None:
    """They lie in the image, have the area that their share says, and centres all over it."""
    height, width = 40, 24
    data = DataConfig(cutmix=1.0)
    boxes = []
    for step in range(2000):
        how = draw_mix(data, height, width, seed=seed, step=step)
        assert how is not None
        assert how.box is not None
        top, bottom, left, right = how.box
        assert 0 <= top <= bottom <= height
        assert 0 <= left <= right <= width
        assert how.share == 1 - (bottom - top) * (right - left) / (height * width)
        boxes.append(how.box)
    top, bottom, left, right = np.array(boxes, dtype=float).T
    # A box that is not cut off has the image's shape, and the share 1 - l of its area is uniform for alpha = 1.
    inner = (top > 0) & (bottom < height) & (left > 0) & (right < width)
    assert np.abs((bottom - top)[inner] / height - (right - left)[inner] / width).max() < 2 / width
    assert (0.5 * (top + bottom) < height / 2).mean() == pytest.approx(0.5, abs=5 * 0.5 / 2000**0.5 + 0.5 / height)


def test_nothing_is_mixed_where_it_is_off(seed: int) -> None:
    images, labels = batch()
    mixing = Mixing(Config(seed=seed), CLASSES)
    out = mixing(3, images, labels)
    assert out[0] is images
    assert out[1] is labels


# ---- what is done ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [None, (2, 9, 0, 5)], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pairs(seed: int, box: Any, memory_format: torch.memory_format) -> None:
    """Image by image in float64. What went in is what it was."""
    images, labels = batch()
    images = images.to(memory_format=memory_format)
    before, share = images.clone(), float(np.random.default_rng(seed).random())
    out, targets = mix(images, labels, CLASSES, Mix(share, box))
    assert out.is_contiguous(memory_format=memory_format)
    assert torch.equal(images, before)
    for i in range(BATCH):
        j = i + 1 if i % 2 == 0 else i - 1
        a, b = (before[k].double() for k in (i, j))
        if box is None:
            expected = share * a + (1 - share) * b
            # lerp: a difference, a product and a sum, each rounded once, of numbers up to |a| + |b|.
            torch.testing.assert_close(
                out[i].double(), expected, rtol=0, atol=4 * EPS * float(a.abs().max() + b.abs().max())
            )
        else:
            top, bottom, left, right = box
            expected = a.clone()
            expected[:, top:bottom, left:right] = b[:, top:bottom, left:right]
            assert torch.equal(out[i].double(), expected)
        target = np.zeros(CLASSES)
        target[int(labels[i])] += share
        target[int(labels[j])] += 1 - share
        np.testing.assert_allclose(targets[i].numpy(), target, rtol=0, atol=4 * EPS)


# ---- in a run --------------------------------------------------------------------------------------------------------


class Seen(nn.Module):
    """A linear classifier that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * SIDE * SIDE, CLASSES).double()
        self.images: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.images.append(images.clone())
        logits: Tensor = self.layer(images.flatten(1).double())
        return logits


def one_step(
    world: Distributed, config: Config, step: int, images: Tensor, labels: Tensor
) -> tuple[list[Tensor], float]:
    """What the passes of a step see on this process, and its loss."""
    model = Seen()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-0.1, 0.1, p.numel(), dtype=p.dtype).view_as(p))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    task = Classification(config, world)
    task.num_classes = CLASSES
    updates = Updates(task, *told(world), model, optimizer, None, None, 10)
    share = BATCH // world.world_size
    part = slice(world.rank * share, (world.rank + 1) * share)
    loss = updates.make(step, (images[part], labels[part]), logged=False)
    return model.images, float(loss)


def both_steps(world: Distributed, config: Config, images: Tensor, labels: Tensor) -> list[tuple[list[Tensor], float]]:
    return [one_step(world, config, step, images, labels) for step in range(4)]


@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
def test_passes_and_processes_see_one_batch(seed: int, loss: str) -> None:
    """Both passes of a step see the same bits, two processes together what one has; the loss is the formula's."""
    images, labels = batch()
    config = Config(seed=seed, data=DataConfig(mixup=0.4, cutmix=1.0, micro_batches=2, batch_size=BATCH))
    config.loss.name, config.loss.label_smoothing = loss, 0.1  # type: ignore[assignment]
    alone = both_steps(Distributed(0, 0, 1, torch.device("cpu")), config, images, labels)
    two = processes.run(both_steps, 2, config, images, labels)
    changed = False
    for step, (seen, value) in enumerate(alone):
        first, second = torch.cat(seen[:2]), torch.cat(seen[2:])
        assert torch.equal(first, second)
        changed |= not torch.equal(first, images)  # but where CutMix's rectangle is empty
        parts = [two[rank][step] for rank in range(2)]
        assert torch.equal(torch.cat([torch.cat(part[0][:2]) for part in parts]), first)
        assert np.mean([part[1] for part in parts]) == pytest.approx(value, abs=1e-12)
        how = draw_mix(config.data, SIDE, SIDE, seed=seed, step=step)
        assert how is not None
        assert value == pytest.approx(mixed_loss(loss, first, labels, how.share), abs=TARGETS)
    assert changed


def mixed_loss(name: str, images: Tensor, labels: Tensor, share: float) -> float:
    """share * loss of the own class + (1 - share) * loss of the neighbour's: both losses are linear in the target."""
    weight = torch.linspace(-0.1, 0.1, CLASSES * 3 * SIDE * SIDE, dtype=torch.float64).view(CLASSES, -1)
    logits = images.flatten(1).double() @ weight.T + torch.linspace(-0.1, 0.1, CLASSES, dtype=torch.float64)
    total = 0.0
    for i in range(BATCH):
        for j, part in ((i, share), (i ^ 1, 1 - share)):
            target = torch.full((CLASSES,), 0.1 / CLASSES, dtype=torch.float64)
            target[labels[j]] += 0.9
            if name == "binary":
                terms = target * nn.functional.logsigmoid(logits[i]) + (1 - target) * nn.functional.logsigmoid(
                    -logits[i]
                )
                total -= part * float(terms.mean()) / BATCH
            else:
                total -= part * float((target * logits[i].log_softmax(0)).sum()) / BATCH
    return total


def test_an_odd_share_is_refused() -> None:
    def world(size: int) -> Distributed:
        return Distributed(0, 0, size, torch.device("cpu"))

    config = Config(data=DataConfig(mixup=0.2, batch_size=12))
    require_pairs(config, world(3))
    with pytest.raises(UserError, match=r"each process takes 3 of a batch of 12: choose .* a multiple of 8\."):
        require_pairs(config, world(4))
    require_pairs(Config(data=DataConfig(batch_size=12)), world(4))

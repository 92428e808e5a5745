"""Evaluation against numpy over all samples at once, however they are spread over processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lesam_dist.parallel import Distributed
from lesam_dist.train.evaluate import evaluate
from tests.distributed.processes import run

SAMPLES = 11


def make(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    return net, torch.randn(SAMPLES, 4), torch.randint(0, 3, (SAMPLES,))


def share(here: Distributed, seed: int, owners: list[int]) -> dict[str, float]:
    """Sample i belongs to rank owners[i]; batches of 3, the last one partial."""
    net, x, y = make(seed)
    mine = torch.tensor([i for i, owner in enumerate(owners) if owner == here.rank], dtype=torch.long)
    result = evaluate(net, [(x[part], y[part]) for part in mine.split(3) if len(part)], here)
    assert net.training
    return result


def expected(seed: int) -> dict[str, float]:
    net, x, y = make(seed)
    logits = net.eval()(x).detach().double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    accuracy = 100 * float((logits.argmax(axis=1) == y.numpy()).mean())
    return {"acc1": accuracy, "loss": -float(log_p[np.arange(SAMPLES), y.numpy()].mean()), "samples": SAMPLES}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_counts_once(seed: int, world_size: int) -> None:
    # Uneven on purpose, and with three processes the last one has nothing.
    owners = [0] * 7 + [min(1, world_size - 1)] * 4
    if world_size == 1:
        results = [share(Distributed(0, 0, 1, torch.device("cpu")), seed, owners)]
    else:
        results = run(share, world_size, seed, owners)
    for result in results:
        assert result == pytest.approx(expected(seed), rel=1e-5)

"""float16's loss scale on several processes: an overflow in one pass on one rank skips one step on all."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from lesam_dist import LESAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.passes import BatchPasses
from tests.parallel.processes import run
from tests.parallel.test_optimizers import make_net, make_problem
from tests.parallel.test_scopes import part_of, whole

SHARDED = {"wrap_classes": ["Linear"]}
WRAPPED: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "ddp": ("ddp", {}, "global"),
    "ddp local": ("ddp", {}, "local"),
    "fsdp": ("fsdp", SHARDED, "global"),
    "hsdp replica": ("hsdp", {**SHARDED, "shard_size": 1, "scope": "replica"}, "replica"),
}


class Overflowing(nn.CrossEntropyLoss):
    """Not finite in one of its calls."""

    def __init__(self, bad: int | None) -> None:
        super().__init__()
        self.calls = itertools.count()
        self.bad = bad

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(logits, labels)
        return loss * torch.inf if next(self.calls) == self.bad else loss


def train(world: Distributed, seed: int) -> dict[tuple[str, str, int], dict[str, Any]]:
    state, x, y = make_problem(seed)
    part = part_of(world)
    results = {}
    for how, backend, bad_pass in itertools.product(WRAPPED, ("reference", "triton"), (0, 1)):
        strategy, options, scope = WRAPPED[how]
        net = make_net()
        net.load_state_dict(state)
        model = wrap(net, world, strategy, **options)
        optimizer: LESAM = LESAM(net.parameters(), torch.optim.SGD, scope=scope, backend=backend, lr=0.1, momentum=0.9)  # type: ignore[arg-type]
        scaler = optimizer.grad_scaler = GradScaler("cpu", init_scale=1024.0)
        weights = []
        for t in range(3):  # the overflow is in the second step
            criterion = Overflowing(bad_pass if t == 1 and world.rank == 1 else None)
            optimizer.step(BatchPasses(model, criterion, x[t][part], y[t][part], torch.float16, scaler))
            scaler.update()
            weights.append(whole(net))
        skipped = optimizer.telemetry["skipped"].item()
        results[how, backend, bad_pass] = {"weights": weights, "scale": scaler.get_scale(), "skipped": skipped}
    return results


def test_an_overflow_on_one_rank(seed: int) -> None:
    ranks = run(train, 2, seed)
    for case, first in ranks[0].items():
        for rank in ranks:
            result = rank[case]
            before, skipped, after = result["weights"]
            assert (result["skipped"], result["scale"]) == (1, 512.0), case
            for n, value in before.items():
                assert np.array_equal(skipped[n], value), case
                assert not np.array_equal(after[n], value), case
                assert np.array_equal(after[n], first["weights"][2][n]), f"{case}: ranks drifted apart"

"""Steps that are not numbers: counted, skipped by all processes, and told of with the last that were good."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lesam_dist import LESAM
from lesam_dist.config.command_line import parse
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.divergence import NonFiniteSteps
from lesam_dist.train.passes import BatchPasses
from tests.parallel.processes import run

CONFIG = parse(["--config", "digits", "--max_nonfinite_steps", "4"])


def told_of(world: Distributed, seed: int) -> list[str]:
    """An error after random good and bad steps, of a counter that is replaced by its state now and then."""
    draw, own = random.Random(seed), random.Random(seed + 1 + world.rank)
    counter, skipped, good = NonFiniteSteps(CONFIG, world), 0, []
    for step in range(1, 40):
        kind = draw.choice(["good", "good", "skipped", "nan"])  # as the trainer's are: alike on all processes
        skipped += kind != "good"
        loss, rho, grad_norm = own.random(), draw.random(), draw.random()
        if kind == "good":
            good.append((step, loss, rho, grad_norm))
        telemetry = {
            "skipped": torch.tensor(float(skipped)),
            "rho": torch.tensor(rho),
            "grad_norm": torch.tensor(grad_norm),
        }
        counter.count(step, torch.tensor(math.nan if kind == "nan" else loss), telemetry)
        if draw.random() < 0.2:
            resumed = NonFiniteSteps(CONFIG, world)
            for name, tensor in resumed.state().items():
                assert tensor.dtype == torch.float64
                tensor.copy_(counter.state()[name])
            counter = resumed
    losses = [sum(column) / len(column) for column in zip(*world.gather([row[1] for row in good[-3:]]), strict=True)]
    expected = "; ".join(
        f"step {step}: loss {loss:.4g}, rho {rho:.4g}, grad_norm {grad_norm:.4g}"
        for (step, _, rho, grad_norm), loss in zip(good[-3:], losses, strict=True)
    )
    assert counter.total == skipped
    return [str(counter.diverged(39, 7, None)), f"The last good steps: {expected}. Lower"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_error_tells_of_the_last_good_steps(seed: int, world_size: int) -> None:
    ranks = run(told_of, world_size, seed)
    assert all(rank == ranks[0] for rank in ranks)
    message, expected = ranks[0]
    assert message.startswith("the run has diverged: the loss or a gradient in the last 7 steps was not finite")
    assert expected in message


def test_where_no_step_was_good_it_says_so() -> None:
    counter = NonFiniteSteps(CONFIG, Distributed(0, 0, 1, torch.device("cpu")))
    assert "No step was good." in str(counter.diverged(3, 3, None))


class Criterion(nn.CrossEntropyLoss):
    """Its gradients are finite whatever ``extra`` is."""

    extra = 0.0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().forward(logits, labels) + self.extra


def bad_losses(world: Distributed, seed: int) -> list[Any]:
    """Steps in which a loss of one rank, in one of the passes, is not finite, and all gradients would be."""
    found = []
    for extra in (math.inf, math.nan):
        for bad_pass in (0, 1):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
            model = wrap(net, world, "ddp")
            optimizer = LESAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
            before = [p.detach().clone() for p in net.parameters()]
            criterion, calls = Criterion(), iter(range(2))
            passes = BatchPasses(model, criterion, torch.randn(5, 6), torch.randint(0, 3, (5,)))

            def closure(
                criterion: Criterion = criterion, passes: BatchPasses = passes, calls: Any = calls, bad: int = bad_pass
            ) -> Tensor:
                criterion.extra = extra if world.rank == 1 and next(calls) == bad else 0.0  # noqa: B023
                return passes()

            optimizer.step(closure)
            same = all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
            found.append((same, optimizer.telemetry["skipped"].item()))
    return found


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(seed: int) -> None:
    assert run(bad_losses, 2, seed) == 2 * [4 * [(True, 1.0)]]

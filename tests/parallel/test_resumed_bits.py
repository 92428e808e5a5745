"""A run that is cut and resumed again and again has the bits of one that never stopped, wherever its tensors lie."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from lesam_dist import GSAM, LESAM
from lesam_dist.optim import SharpnessAware
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.shards import local_shard
from lesam_dist.parallel.wrapping import Strategy, wrap
from lesam_dist.train.passes import BatchPasses
from tests.parallel.processes import run

STEPS, CUTS = 30, 20
METHODS: dict[str, Any] = {"lesam": lambda params, **base: LESAM(params, torch.optim.SGD, sigma=0.05, **base)}
METHODS["gsam"] = lambda params, **base: GSAM(params, torch.optim.SGD, rho=0.05, max_grad_norm=0.5, **base)


def make() -> nn.Sequential:
    """Its largest tensor is of a size that sums in another order with more threads; odd sizes shift the others."""
    head = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*head, nn.Linear(5 * 36, 601), nn.Tanh(), nn.Linear(601, 3))


def shift(params: list[Tensor], offset: int) -> None:
    """Move each gradient to an address ``offset`` elements beyond a multiple of 64 bytes."""
    for p in params:
        grad = p.grad
        if grad is None or not offset:
            continue
        local = local_shard(grad)
        moved = torch.empty(local.numel() + offset)[offset:].view(local.shape).copy_(local)
        if isinstance(grad, DTensor):
            p.grad = DTensor.from_local(
                moved, grad.device_mesh, grad.placements, run_check=False, shape=grad.shape, stride=grad.stride()
            )
        else:
            p.grad = moved


class Leg:
    """What one start of the program builds, from the start or from what another left."""

    def __init__(self, world: Distributed, seed: int, strategy: Strategy, method: str) -> None:
        torch.manual_seed(seed)
        self.world, self.seed, self.net = world, seed, make()
        self.model = wrap(self.net, world, strategy)
        self.params: list[Tensor] = list(self.net.parameters())
        self.optimizer: SharpnessAware = METHODS[method](self.net.parameters(), lr=0.3, momentum=0.9)

    def train(self, steps: range, offset: int) -> None:
        for step in steps:
            torch.manual_seed(self.seed + 1000 * step + self.world.rank)
            passes = BatchPasses(self.model, nn.CrossEntropyLoss(), torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4,)))

            def closure(passes: BatchPasses = passes) -> Tensor:
                loss = passes()
                shift(self.params, offset)
                return loss

            self.optimizer.step(closure)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return _copy(get_state_dict(self.net, self.optimizer))  # type: ignore[no-any-return]

    def load(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        model, optimizer = _copy(state)
        set_state_dict(self.net, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copy(value) for value in tree)
    return tree.detach().clone() if isinstance(tree, Tensor) else tree


def _tensors(state: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """This rank's part of the weights and buffers, and of the optimizer's state of each parameter."""
    model, optimizer = state
    return {
        name: {key: local_shard(value) for key, value in tensors.items()}
        for name, tensors in {"model": model, **optimizer["state"]}.items()
    }


def whole_and_cut(world: Distributed, seed: int) -> dict[str, tuple[Any, Any]]:
    """The last state of each kind of run: without a stop, and with `CUTS`."""
    draw = random.Random(seed)
    results = {}
    cases: tuple[tuple[Strategy, str], ...] = (("ddp", "gsam"), ("fsdp", "lesam"))
    for strategy, method in cases:
        whole = Leg(world, seed, strategy, method)
        whole.train(range(STEPS), 0)
        bounds = [0, *sorted(draw.sample(range(1, STEPS), CUTS)), STEPS]
        state = None
        for start, stop in pairwise(bounds):
            leg = Leg(world, seed, strategy, method)
            if state is not None:
                leg.load(state)
            leg.train(range(start, stop), draw.randrange(16))
            state = leg.state()
        assert state is not None
        results[f"{strategy} {method}"] = _tensors(whole.state()), _tensors(state)
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_run_cut_twenty_times_has_the_same_bits(seed: int, world_size: int) -> None:
    for rank in run(whole_and_cut, world_size, seed):
        for name, (whole, cut) in rank.items():
            torch.testing.assert_close(cut, whole, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")

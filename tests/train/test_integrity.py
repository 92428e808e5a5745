"""Replicas that no longer hold the same bits are found and named, and nothing else is taken for them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lesam_dist import GSAM, LESAM, MSAM, SAM
from lesam_dist.errors import SharedError
from lesam_dist.optim import SharpnessAware
from lesam_dist.optim.plain import Plain
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.shards import local_shard
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.batchnorm import average_batchnorm
from lesam_dist.train.ema import WeightAverage
from lesam_dist.train.integrity import ReplicaCheck
from lesam_dist.train.passes import BatchPasses
from tests.halves import Halved
from tests.parallel.processes import run

SGD: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
ADAMW: dict[str, Any] = {"base_optimizer": torch.optim.AdamW, "lr": 1e-2}
REUSE = {"ascent_interval": 3, "ascent_between": "reuse"}

# strategy and what `wrap` is asked for, processes, scope
PLACES: dict[str, tuple[str, dict[str, Any], int, Any]] = {
    "ddp2": ("ddp", {}, 2, "global"),
    "ddp3": ("ddp", {}, 3, "global"),
    "ddp3-local": ("ddp", {}, 3, "local"),
    "hsdp": ("hsdp", {"shard_size": 2, "wrap_classes": ["Linear"]}, 4, "global"),
    "hsdp-replica": ("hsdp", {"shard_size": 2, "wrap_classes": ["Linear"], "scope": "replica"}, 4, "replica"),
}


class Own(Halved):
    """Its memory is each process's own under a scope that is not global, which it does not mind."""

    def shares_first_gradient(self) -> None:
        return None


def make_net(seed: int, kind: str) -> nn.Sequential:
    """HSDP's has fewer rows than processes in a layer: an empty shard. DDP's has BatchNorm and a scalar in bfloat16."""
    torch.manual_seed(seed)
    if kind == "hsdp":
        return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 1), nn.Linear(1, 3))
    return nn.Sequential(nn.Linear(6, 11), nn.BatchNorm1d(11), nn.PReLU(), nn.Linear(11, 3))


class Run:
    """A model in training, with an average, on one process among several."""

    def __init__(self, world: Distributed, seed: int, place: str, method: Any, **kwargs: Any) -> None:
        strategy, options, _, scope = PLACES[place]
        self.world, self.seed = world, seed
        self.net = make_net(seed, strategy)
        self.model = wrap(self.net, world, strategy, **options)  # type: ignore[arg-type]
        own = {} if scope == "global" else {"scope": scope}
        self.optimizer: SharpnessAware = method(self.net.parameters(), **kwargs, **own)
        self.ema = WeightAverage(self.net, 0.9)
        self.check = ReplicaCheck(self.net, self.optimizer, self.ema, world, scope)

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            torch.manual_seed(self.seed + 1000 * step + self.world.rank)
            images, labels = torch.randn(5, 6), torch.randint(0, 3, (5,))
            if step == 2 and self.world.rank == 1:
                images *= torch.nan  # a step that is skipped
            self.optimizer.step(BatchPasses(self.model, nn.CrossEntropyLoss(), images, labels))
            self.ema.update(self.optimizer.overflow)

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """All that is compared, found without the check, by what an error calls it."""
        names = [name for name, _ in self.net.named_parameters()]
        found = {("weights", name): p for name, p in self.net.named_parameters()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {(part, names[index]): value for part, value in state.items()}
        averages = self.ema.state_dict()
        return found | {("ema", name): averages[name] for name in [*names, "n_averaged"]}


def flip(tensor: Tensor, draw: random.Random) -> None:
    shard = local_shard(tensor.detach())
    data = (shard.view(-1) if shard.ndim else shard[None]).view(torch.uint8)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def no_alarm(world: Distributed, seed: int, place: str, method: Any, kwargs: dict[str, Any]) -> Any:
    this = Run(world, seed, place, method, **kwargs)
    this.check.compare(0)
    for step in range(20):
        this.train(step, step + 1)
        this.check.compare(step + 1)
    average_batchnorm(this.net, world)
    this.ema.average_buffers(world)
    this.check.compare(20, buffers=True)
    return this.check.remark(), this.optimizer.telemetry["skipped"].item()


CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "lesam, ddp2": ("ddp2", LESAM, {**SGD, "sigma": 0.1}),
    "adamw, ddp3": ("ddp3", Plain, ADAMW),
    "own, ddp3-local": ("ddp3-local", Own, {"base": torch.optim.AdamW, "lr": 1e-2}),
    "gsam, hsdp": ("hsdp", GSAM, ADAMW),
    "sam, hsdp-replica": ("hsdp-replica", SAM, SGD),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_replicas_raise_no_alarm(seed: int, case: str) -> None:
    """20 steps, one of them skipped, with a comparison after each."""
    place, method, kwargs = CASES[case]
    assert run(no_alarm, PLACES[place][2], seed, place, method, kwargs) == PLACES[place][2] * [(None, 1.0)]


def one_flip(world: Distributed, seed: int, case: str) -> list[tuple[str, str, int, str]]:
    """A flip in every kind of tensor, one after the other, each on a process of its own; what was said of each."""
    place, method, kwargs = CASES.get(case) or FLIPS[case]
    this = Run(world, seed, place, method, **kwargs)
    this.train(0, 3)
    this.check.compare(3)
    draw = random.Random(seed)
    said = []
    for part in dict.fromkeys(part for part, _ in this.tensors()):
        own = {key: value for key, value in this.tensors().items() if key[0] == part}
        whole = [key for key, value in own.items() if not isinstance(value, DTensor) or value.shape[0] > 3]
        key, rank = draw.choice(whole), draw.randrange(world.world_size)  # it is not empty on any
        tensor = own[key]
        before = local_shard(tensor.detach()).clone()
        if world.rank == rank:
            flip(tensor, draw)
        draw.seed(f"{seed} {part}")  # what a flip drew the others did not
        try:
            this.check.compare(4)
            found = "nothing"
        except SharedError as error:
            found = str(error)
        local_shard(tensor.detach()).copy_(before)
        said.append((part, key[1], rank, found))
        this.check.compare(3)
    return said


FLIPS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "msam, ddp2": ("ddp2", MSAM, {**ADAMW, "rho": 0.1}),
    "sam, ddp3": ("ddp3", SAM, {**SGD, **REUSE}),
    "sam, hsdp": ("hsdp", SAM, {**ADAMW, **REUSE}),
}


@pytest.mark.parametrize("case", [*FLIPS, "own, ddp3-local", "sam, hsdp-replica"])
def test_one_flipped_bit_is_found_and_named(seed: int, case: str) -> None:
    place, _, kwargs = CASES.get(case) or FLIPS[case]
    world_size = PLACES[place][2]
    ranks = run(one_flip, world_size, seed, case)
    assert all(rank == ranks[0] for rank in ranks), "all processes say the same"
    said = ranks[0]
    parts = {part for part, *_ in said}
    assert parts >= {"weights", "ema"} | ({"exp_avg_sq", "step"} if "exp_avg" in parts else {"momentum_buffer"})
    assert ("ascent_grad" in parts) == ("reuse" in str(kwargs))
    for part, name, rank, found in said:
        if part == "last_grad":
            assert found == "nothing", "each process has its own"
            continue
        assert f"{part} of '{name}'." in found
        assert "All were equal at step 3." in found
        # Of two nobody can say which is right; under HSDP two processes hold the same shard.
        sharded = "hsdp" in place and part != "step" and name != "n_averaged"
        holders, first = (2, rank % 2) if sharded else (world_size, rank if world_size > 2 else 0)
        assert f"no longer equal at step 4: rank {first} on " in found
        assert (f"and rank {first + world_size // 2} on " in found) == (holders == 2)
        assert ("none has a majority" in found) == (holders == 2)
        assert holders == 2 or f"differs from the {holders - 1} others" in found

"""Every collective of a step, by number and bytes, is the one that `lesam-dist plan` reckons with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lesam_dist import LESAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.replicas import Sync
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.planning.communication import Call, Layout
from lesam_dist.planning.spread import units_of
from lesam_dist.train.passes import BatchPasses
from tests.parallel.processes import run

Calls = Counter[tuple[str, int]]

_NAMES = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
PASSES: dict[str, list[Sync]] = {"global": [True, True], "local": [False, True], "replica": ["replica", True]}
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp local": {"scope": "local"},
    "fsdp": {},
    "fsdp kept": {"reshard_after_forward": False},
    "fsdp bf16": {"gather_dtype": torch.bfloat16},
    "hsdp": {},
    "hsdp replica": {"scope": "replica"},
}


class Listener(TorchDispatchMode):
    """Counts collectives by operation and bytes of the whole tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Calls = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            whole = max(t.numel() * t.itemsize for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            self.calls[_NAMES[func.overloadpacket.__name__], whole] += 1
        return result


class Unit(nn.Module):
    """A layer of odd width, BatchNorm, and a factor of one row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, width))
        self.layer, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = x + self.factor * self.norm(self.layer(x))
        return moved


def make_net(width: int = 7) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), Unit(width), Unit(width), nn.Linear(width, 3))


def layout(setting: str, processes: int, net: nn.Module, backend: str = "gloo") -> Layout:
    """What planning takes the network of a setting to be on so many processes."""
    options = SETTINGS[setting]
    strategy = setting.split()[0]
    shard = {"ddp": 1, "fsdp": processes, "hsdp": 2}[strategy]
    blocks = [module for module in net.modules() if isinstance(module, Unit)]
    gathered = 2 if "gather_dtype" in options else 4
    units = units_of(net, blocks, gathered, 4, keep=not options.get("reshard_after_forward", True))
    shapes = tuple(tuple(p.shape) for p in net.parameters())
    order = tuple(reversed(range(len(shapes))))
    return Layout(shapes, order, units, strategy, shard, processes // shard, backend=backend)


def step_calls(world: Distributed, setting: str) -> Calls:
    """The collectives of a real step on this process, after two others: DDP arranges its buckets anew."""
    options = dict(SETTINGS[setting])
    scope = options.get("scope", "global")
    strategy: Any = setting.split()[0]
    own = {} if strategy == "ddp" else {"wrap_classes": ["Unit"], "shard_size": 2 if strategy == "hsdp" else None}
    if strategy == "ddp":
        options.pop("scope", None)
    net = make_net()
    model = wrap(net, world, strategy, **own, **options)
    half = options.get("gather_dtype")
    passes = BatchPasses(model, nn.CrossEntropyLoss(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0]), autocast=half)
    optimizer = LESAM(net.parameters(), torch.optim.SGD, sigma=0.3, rho_max=0.2, lr=0.1, scope=scope)
    for _ in range(2):
        optimizer.step(passes)
    with (listener := Listener()):
        optimizer.step(passes)
    return listener.calls


def every_setting(world: Distributed) -> dict[str, Calls]:
    return {setting: step_calls(world, setting) for setting in SETTINGS}


def counted(calls: Iterable[Call]) -> Calls:
    return Counter((call.operation, call.nbytes) for call in calls)


def expected(setting: str, processes: int) -> Layout:
    return layout(setting, processes, make_net())


def scope_of(setting: str) -> list[Sync]:
    return PASSES[SETTINGS[setting].get("scope", "global")]


@pytest.mark.parametrize("processes", [4, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 8, 16))])
def test_a_step_on_gloo(processes: int) -> None:
    """As predicted to the byte, on every rank, with uneven and empty shards."""
    for found in run(every_setting, processes):
        for setting, calls in found.items():
            predicted = expected(setting, processes).of_step(scope_of(setting))
            assert calls == counted(predicted), (setting, processes)


@contextmanager
def pretended(processes: int) -> Iterator[Distributed]:
    """This process as rank 0 of many that are not there: torch's fake backend, whose collectives leave data alone."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield Distributed(0, 0, processes, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def test_calls_are_constant_and_bytes_bounded() -> None:
    """On 2 to 64 processes: the same collectives, and per process no more bytes than twice what all of it weighs.

    What differs is padding alone. DDP is left to gloo: its hook waits for futures that the fake backend has not.
    """
    sharded = [setting for setting in SETTINGS if not setting.startswith("ddp")]
    numbers: dict[str, set[int]] = {setting: set() for setting in sharded}
    for processes in (2, 6, 64):
        with pretended(processes) as world:
            for setting in sharded:
                predicted = expected(setting, processes)
                made = predicted.of_step(scope_of(setting))
                calls = step_calls(world, setting)
                assert calls == counted(made), (setting, processes)
                numbers[setting].add(calls.total())
                weight = sum(call.nbytes if call.operation == "all_gather" else 2 * call.nbytes for call in made)
                assert predicted.sent(made) < weight
    assert all(len(found) == 1 for found in numbers.values()), numbers


def test_buckets_are_those_of_ddp() -> None:
    """Sizes that cross both limits, 1 MiB and 25 MiB; the buckets of one process are those of two, and of many GPUs."""
    widths = [300, 700, 2900, 2600, 900, 40]
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    shapes = tuple(tuple(p.shape) for p in net.parameters())
    order = tuple(reversed(range(len(shapes))))  # of a layer the bias is final first
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
        for _ in range(2):  # buckets are arranged anew before the second forward
            loss = model(torch.randn(2, widths[0])).sum()
            with (listener := Listener()):
                loss.backward()
    finally:
        dist.destroy_process_group()
    predicted = Layout(shapes, order, (), "ddp", 1, 2, backend="gloo")
    assert len(predicted.buckets()) == 3
    assert listener.calls == counted(predicted.of_pass(True))
    # What a GPU would do on any number of processes.
    assert replace(predicted, replicas=64, backend="nccl").buckets() == predicted.buckets()

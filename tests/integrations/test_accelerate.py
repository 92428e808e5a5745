"""What `lesam_dist.accelerate.prepare` returns takes the steps of a plain loop, and knows accelerate's scaler."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from lesam_dist import LESAM, BatchPasses
from lesam_dist.parallel.processes import Distributed
from tests.parallel.processes import free_port, run

pytest.importorskip("accelerate")
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState

from lesam_dist.accelerate import prepare

STEPS, BATCH = 3, 8
SETTINGS: dict[str, Any] = {"sigma": 0.05, "rho_max": 0.5, "lr": 0.05, "momentum": 0.9}
TOLERANCE = {"rtol": 1e-12, "atol": 1e-14}  # float64; two processes were 2e-16 from one


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """accelerate keeps its state globally."""
    forget()
    yield Accelerator(cpu=True)
    forget()


def forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def make_data() -> tuple[Tensor, Tensor]:
    return torch.randn(STEPS, BATCH, 6, dtype=torch.float64), torch.randint(3, (STEPS, BATCH))


def plain(net: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """LE-SAM without accelerate; returns the losses."""
    optimizer = LESAM(net.parameters(), torch.optim.SGD, **SETTINGS)
    return [float(optimizer.step(BatchPasses(net, nn.CrossEntropyLoss(), *batch))) for batch in zip(x, y, strict=True)]


def weights(net: nn.Module) -> dict[str, Tensor]:
    whole = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in net.state_dict().items()
    }
    return {name.removeprefix("module."): value.detach() for name, value in whole.items()}


@pytest.mark.parametrize("closure", ["own", "BatchPasses"])
def test_the_scaler_is_known_and_updated_once_a_step(seed: int, accelerator: Accelerator, closure: str) -> None:
    """accelerate makes one for GPUs alone, so it is put in; a power of two changes no bit in float64."""
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    net, (x, y) = make_net(), make_data()
    twin = copy.deepcopy(net)
    optimizer = LESAM(net.parameters(), torch.optim.SGD, **SETTINGS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100)
    model, lesam, scheduler = prepare(accelerator, net, optimizer, scheduler)
    assert lesam is optimizer
    losses = []
    for batch in zip(x, y, strict=True):

        def own(batch: Any = batch) -> Tensor:
            loss = cross_entropy(model(batch[0]), batch[1])
            accelerator.backward(loss)
            return loss

        passes = BatchPasses(model, nn.CrossEntropyLoss(), *batch, scaler=scaler)
        losses.append(lesam.step(own if closure == "own" else passes).item())
        scheduler.step()
    assert losses == pytest.approx(plain(twin, x, y))
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-9, atol=1e-12)
    lesam.step(None)
    assert scaler.state_dict()["_growth_tracker"] == STEPS
    x[0, 0, 0] = torch.inf
    lesam.step(BatchPasses(model, nn.CrossEntropyLoss(), x[0], y[0], scaler=scaler))
    assert scaler.get_scale() == 2.0**9
    assert lesam.telemetry["skipped"] == 1


def test_what_is_refused(accelerator: Accelerator) -> None:
    net = make_net()
    lesam = LESAM(net.parameters(), torch.optim.SGD, **SETTINGS)
    with pytest.raises(TypeError, match="the optimizer is a SGD, not a sharpness-aware one"):
        prepare(accelerator, net, torch.optim.SGD(net.parameters(), lr=0.1))  # type: ignore[arg-type]
    plugin = SimpleNamespace(fsdp_version=1)
    for kind, found in (("FSDP1", plugin), ("DEEPSPEED", None), ("MEGATRON_LM", None)):
        fake: Any = SimpleNamespace(
            gradient_accumulation_steps=1,
            distributed_type=DistributedType.FSDP if found else DistributedType[kind],
            state=SimpleNamespace(fsdp_plugin=found),
        )
        with pytest.raises(ValueError, match=f"under {kind} shards do not say .* Choose FSDP2"):
            prepare(fake, net, lesam)
    forget()
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2\) makes a step .* micro_batches=2"):
        prepare(Accelerator(cpu=True, gradient_accumulation_steps=2), net, lesam)


KINDS = ("ddp", "ddp, two micro-batches", "fsdp2, two micro-batches")


def test_two_processes_take_the_steps_of_one(seed: int) -> None:
    net, data = make_net(), make_data()
    results = run(in_two_processes, 2, net.state_dict(), data, free_port())
    plain(net, *data)
    for kind in KINDS:
        for rank in results:
            torch.testing.assert_close(rank[kind], weights(net), **TOLERANCE)


def in_two_processes(world: Distributed, state: Any, data: Any, port: int) -> dict[str, Any]:
    os.environ |= {"RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    half = slice(world.rank * BATCH // 2, (world.rank + 1) * BATCH // 2)
    results = {}
    for kind in KINDS:
        forget()
        accelerator = Accelerator(cpu=True)
        if "fsdp2" in kind:
            # accelerate forgets FSDP's settings on a host without GPUs; what prepare() does with them is the same.
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, cpu_ram_efficient_loading=False
            )
        net = make_net()
        net.load_state_dict(state)
        model, optimizer = prepare(accelerator, net, LESAM(net.parameters(), torch.optim.SGD, **SETTINGS))
        assert isinstance(next(model.parameters()), DTensor) == ("fsdp2" in kind)
        for x, y in zip(*data, strict=True):
            optimizer.step(
                BatchPasses(model, nn.CrossEntropyLoss(), x[half], y[half], micro_batches=1 + ("two" in kind))
            )
        results[kind] = weights(model)
    return results

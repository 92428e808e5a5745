"""BatchNorm over all processes: what can be seen without GPUs, on which alone torch computes it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lesam_dist.config.command_line import parse
from lesam_dist.errors import UserError
from lesam_dist.parallel.batchnorm import synchronized
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train import build
from lesam_dist.train.batchnorm import batchnorms, frozen_batchnorm
from lesam_dist.train.passes import BatchPasses

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
ON_GPU = Distributed(0, 0, 2, torch.device("cuda", 0))  # nothing of it is asked for


def make_net(momentum: float | None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=momentum), nn.Flatten(), nn.Linear(64, 5)
    )


@pytest.mark.parametrize("momentum", [0.3, None])
def test_passes_treat_it_as_batchnorm(seed: int, momentum: float | None) -> None:
    """torch computes on one process what BatchNorm does, so the same net must come out: statistics that the first pass
    alone moves, with the layer's own momentum."""
    net = make_net(momentum)
    converted = synchronized(copy.deepcopy(net), ON_GPU)
    assert [type(layer) for layer in batchnorms(converted)] == [nn.SyncBatchNorm]
    assert converted.state_dict().keys() == net.state_dict().keys()
    images, labels = torch.randn(6, 3, 6, 6), torch.randint(0, 5, (6,))
    for model in (net, converted):
        passes = BatchPasses(model, nn.CrossEntropyLoss(), images, labels)
        passes()
        passes()
        with frozen_batchnorm(model):
            model(images)
    torch.testing.assert_close(converted.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert int(converted.state_dict()["1.num_batches_tracked"]) == 1
    gradients = [[p.grad for p in model.parameters()] for model in (net, converted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_bfloat16_weights_leave_it_in_float32() -> None:
    net = synchronized(make_net(0.1), ON_GPU)
    build._to_bfloat16(net)
    assert {p.dtype for layer in batchnorms(net) for p in layer.parameters()} == {torch.float32}
    assert net[0].weight.dtype == torch.bfloat16  # type: ignore[index]


def test_one_process_has_nobody_to_ask() -> None:
    net = make_net(0.1)
    assert synchronized(net, ALONE) is net
    assert type(net[1]) is nn.BatchNorm2d


def test_cpus_are_refused() -> None:
    config = parse(["--config", "digits", "--parallel.sync_batchnorm", "true"])
    with pytest.raises(UserError, match="2 processes train on CPUs, where torch's SyncBatchNorm does not work"):
        build.build_network(config, 10, replace(ALONE, world_size=2))
    build.build_network(config, 10, ALONE)

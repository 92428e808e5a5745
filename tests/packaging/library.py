"""The library as someone uses it who has torch alone; a script, run where the trainer's packages are not installed.

python library.py [none]            torchrun --nproc-per-node 2 library.py ddp|fsdp
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

import lesam_dist
from lesam_dist import LESAM, SAMON, BatchPasses, SharpnessAware, frozen_batchnorm, norm_groups
from lesam_dist.parallel import Distributed, process_group, wrap
from lesam_dist.train.buffers import ModelBuffers


def main(strategy: Any = "none") -> None:
    """Two steps of every method; prints how many there are."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 4, 4), torch.randint(5, (8,))
    exported = [getattr(lesam_dist, name) for name in lesam_dist.__all__]
    methods = {x for x in exported if isinstance(x, type) and issubclass(x, SharpnessAware)} - {SharpnessAware}
    assert LESAM in methods
    two_step_form(images, labels)
    with process_group("cpu") as world:
        assert (strategy == "none") == (world.world_size == 1)
        for method in sorted(methods, key=lambda method: method.__name__):
            step(method, images, labels, strategy, world)
        if world.is_main:
            print(f"{len(methods)} methods")


def step(method: type[SharpnessAware], images: Tensor, labels: Tensor, strategy: Any, world: Distributed) -> None:
    model = wrap(small_net(), world, strategy)
    ModelBuffers(model).save()
    params: Any = norm_groups(model) if method is SAMON else model.parameters()
    optimizer = method(params, torch.optim.SGD, lr=0.1, momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        loss = optimizer.step(BatchPasses(model, nn.CrossEntropyLoss(), images, labels))
        assert torch.isfinite(loss), method
    moved = sum(float((p.detach() - old).square().sum()) for p, old in zip(model.parameters(), before, strict=True))
    assert 0 < moved < 100, method


def two_step_form(images: Tensor, labels: Tensor) -> None:
    model = small_net()
    optimizer = LESAM(model.parameters(), torch.optim.SGD, sigma=0.3, rho_max=0.2, lr=0.1)
    nn.functional.cross_entropy(model(images), labels).backward()
    statistics = [buffer.clone() for buffer in model.buffers()]
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    optimizer.first_step(zero_grad=True)
    with frozen_batchnorm(model):
        nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.second_step(zero_grad=True)
    rho, expected = float(optimizer.telemetry["rho"]), min(0.3 / float(norm), 0.2)
    assert abs(rho - expected) < 1e-5 * expected, (rho, expected)  # a float32 norm of 125 numbers
    assert all(torch.equal(old, new) for old, new in zip(statistics, model.buffers(), strict=True))


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


if __name__ == "__main__":
    main(*sys.argv[1:])

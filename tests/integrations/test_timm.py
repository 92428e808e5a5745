"""`examples/timm_script.py` makes the steps of LE-SAM written out around timm's own pieces, in float64."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_script.py"
EPOCHS, SAMPLES = 2, 64


def by_hand(model: nn.Module, images: Tensor, labels: Tensor, classes: int, batch_size: int) -> list[float]:
    """Both passes on the same mixed images, with the same random numbers; the second leaves BatchNorm's statistics."""
    params = list(model.parameters())
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=2e-4)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=classes)
    criterion, rhos = SoftTargetCrossEntropy(), []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(batch_size):
            mixed, targets = mixup(images[batch], labels[batch])
            drawn = torch.get_rng_state()
            grads = torch.autograd.grad(criterion(model(mixed), targets), params)
            norm = torch.cat([g.flatten() for g in grads]).norm()
            rhos.append(min(0.1 / norm.item(), 0.3))
            exact = [p.detach().clone() for p in params]
            statistics = {name: b.clone() for name, b in model.named_buffers()}
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p += rhos[-1] * g / norm
            torch.set_rng_state(drawn)
            second = torch.autograd.grad(criterion(model(mixed), targets), params)
            with torch.no_grad():
                for p, w, g in zip(params, exact, second, strict=True):
                    p.copy_(w)
                    p.grad = g
                for name, b in model.named_buffers():
                    b.copy_(statistics[name])
            optimizer.step()
        scheduler.step(epoch + 1)
    return rhos


def test_the_script_follows_algorithm_1(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLE))
    names: dict[str, Any] = example["train"].__globals__
    names["EPOCHS"] = EPOCHS
    images, labels = example["make_data"]()
    images, labels = images[:SAMPLES].double(), labels[:SAMPLES]
    model = timm.create_model("test_resnet", num_classes=example["CLASSES"], drop_path_rate=0.3).double()
    twin = copy.deepcopy(model)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # timm's mixup draws from it
    example["train"](model, images, labels)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    rhos = by_hand(twin.train(), images, labels, example["CLASSES"], example["BATCH"])
    # Of AdamW a weight whose gradient is almost zero moves by a rate times its sign: 1e-6 of what it moves in a step.
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-7, atol=2e-9)
    assert f"rho {rhos[-1]:.6f}" in capsys.readouterr().out

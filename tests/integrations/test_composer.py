"""The class of docs/composer.md in Composer's Trainer makes the steps of a plain loop, where Composer is installed."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lesam_dist import LESAM

PAGE = Path(__file__).parents[2] / "docs" / "composer.md"
ARGUMENTS: dict[str, Any] = {"sigma": 0.1, "rho_max": 0.3, "lr": 0.1, "momentum": 0.9}


def test_the_trainer_makes_the_steps_of_a_loop(seed: int) -> None:
    composer = pytest.importorskip("composer", reason="requires an older torch: pip does not install both")
    models = pytest.importorskip("composer.models")
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0], names)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    twin = copy.deepcopy(net)
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    model = models.ComposerClassifier(net, num_classes=3)
    trainer = composer.Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(x, y), 16),
        max_duration="2ep",
        optimizers=names["ComposerLESAM"](model.parameters(), torch.optim.SGD, **ARGUMENTS),
        device="cpu",
        device_train_microbatch_size=8,
    )
    trainer.fit()
    optimizer = LESAM(twin.parameters(), torch.optim.SGD, **ARGUMENTS)
    for _ in range(2):
        for batch in torch.arange(64).split(16):

            def closure(batch: Tensor = batch) -> Tensor:
                loss = nn.functional.cross_entropy(twin(x[batch]), y[batch])
                loss.backward()
                return loss

            optimizer.step(closure)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

"""The loss: torch's own by default, and the formulas in float64 for smoothed, mixed and thresholded targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lesam_dist.config.schema import LossConfig
from lesam_dist.tasks.classification.loss import ClassificationLoss
from lesam_dist.train.passes import unreduced

SAMPLES, CLASSES = 9, 7
TOLERANCE = 1e-12  # float64, sums of some dozen terms of size 1


def soft_targets() -> Tensor:
    return torch.rand(SAMPLES, CLASSES, dtype=torch.float64).softmax(dim=1)


def oracle(config: LossConfig, logits: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """The loss of each sample, from the formulas of the module."""
    z = logits.double().numpy()
    t = np.eye(CLASSES)[targets.numpy()] if targets.ndim == 1 else targets.double().numpy()
    t = (1 - config.label_smoothing) * t + config.label_smoothing / CLASSES
    if config.name == "cross_entropy":
        log_softmax = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        return np.asarray(-(t * log_softmax).sum(axis=1))
    if config.binary_threshold is not None:
        t = (t > config.binary_threshold).astype(float)
    p = 1 / (1 + np.exp(-z))
    losses = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    return np.asarray(losses.mean(axis=1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("seed")
def test_default_is_torchs_to_the_bit(smoothing: float, dtype: torch.dtype) -> None:
    """With its gradient, for classes and for mixed targets, and the loss of each sample."""
    ours, torchs = (
        ClassificationLoss(LossConfig(label_smoothing=smoothing)),
        nn.CrossEntropyLoss(label_smoothing=smoothing),
    )
    for targets in (torch.randint(0, CLASSES, (SAMPLES,)), soft_targets().to(dtype)):
        values = []
        logits = torch.randn(SAMPLES, CLASSES, dtype=dtype)
        for criterion in (ours, torchs):
            leaf = logits.clone().requires_grad_()
            loss = criterion(leaf, targets)
            loss.backward()
            with unreduced(criterion):
                values.append((loss.detach(), leaf.grad, criterion(logits, targets)))
        assert values[0][0].ndim == 0
        for mine, theirs in zip(*values, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("soft", [False, True], ids=["classes", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("name", "threshold"), [("cross_entropy", None), ("binary", None), ("binary", 0.0), ("binary", 0.15)]
)
@pytest.mark.usefixtures("seed")
def test_formulas(name: str, threshold: float | None, smoothing: float, soft: bool) -> None:
    config = LossConfig(name=name, label_smoothing=smoothing, binary_threshold=threshold)  # type: ignore[arg-type]
    criterion = ClassificationLoss(config)
    logits = torch.randn(SAMPLES, CLASSES, dtype=torch.float64)
    targets = soft_targets() if soft else torch.randint(0, CLASSES, (SAMPLES,))
    expected = oracle(config, logits, targets)
    np.testing.assert_allclose(criterion(logits, targets).item(), expected.mean(), rtol=0, atol=TOLERANCE)
    with unreduced(criterion):
        np.testing.assert_allclose(criterion(logits, targets).numpy(), expected, rtol=0, atol=TOLERANCE)
    assert criterion.reduction == "mean"


@pytest.mark.usefixtures("seed")
def test_half_precision_is_computed_in_float32() -> None:
    """A smoothed target, 0.1 / 7, has no exact form in bfloat16: the loss of the same logits stays that of float32."""
    criterion = ClassificationLoss(LossConfig(name="binary", label_smoothing=0.1))
    logits, labels = torch.randn(SAMPLES, CLASSES).bfloat16(), torch.randint(0, CLASSES, (SAMPLES,))
    assert torch.equal(criterion(logits, labels), criterion(logits.float(), labels))

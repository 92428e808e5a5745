"""NLL and the calibration error against torch and torchmetrics, on random predictions and on the edges of bins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lesam_dist.tasks.classification.calibration import (
    BINS,
    Calibration,
    calibration_of,
    calibration_sums,
    right,
)


def oracle(logits: Tensor, labels: Tensor) -> float:
    """In float64 as far as torchmetrics goes: it bins and adds in float32."""
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    probabilities = logits.double().softmax(dim=1)  # given logits between 0 and 1, it would take them for these
    found = metrics.multiclass_calibration_error(probabilities, labels, num_classes=logits.shape[1], n_bins=15)
    return float(found)


def calibration(logits: Tensor, labels: Tensor) -> Calibration:
    return calibration_of(calibration_sums(logits, labels))


def predictions(n: int, classes: int, sharpness: float) -> tuple[Tensor, Tensor]:
    return sharpness * torch.randn(n, classes), torch.randint(classes, (n,))


@pytest.mark.parametrize(("n", "classes", "sharpness"), [(500, 10, 2.0), (200, 3, 0.3), (1, 5, 1.0), (300, 100, 40.0)])
def test_random_predictions(seed: int, n: int, classes: int, sharpness: float) -> None:
    logits, labels = predictions(n, classes, sharpness)
    found = calibration(logits, labels)
    assert found.nll == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-12)
    assert found.ece == pytest.approx(oracle(logits, labels), abs=1e-5)  # up to the oracle's sums in float32
    assert sum(each.images for each in found.bins) == n
    hits = sum(each.images * each.accuracy for each in found.bins)
    assert round(hits) == int((logits.argmax(1) == labels).sum())
    for each in found.bins:
        assert each.low - 1e-6 <= each.confidence <= each.high + 1e-6


def with_confidence(confidence: Tensor) -> Tensor:
    """Logits of two classes in which the first has this probability, at least 1/2, up to rounding in float64."""
    p = confidence.double()
    return torch.stack([p.log(), (1 - p).log()], dim=1)


def test_confidences_on_the_edges_of_bins_and_of_exactly_one(seed: int) -> None:
    edges = torch.linspace(0, 1, BINS + 1)[8:]  # in float32, as torchmetrics has them; from 8/15 to 1
    below, above = (torch.nextafter(edges, torch.full_like(edges, towards)) for towards in (0.0, 2.0))
    confidence = torch.cat([edges, below, above[:-1]])
    logits = with_confidence(confidence).clamp(min=-1e3)  # log 0
    binned = logits.softmax(dim=1)[:, 0].float()
    assert torch.equal(binned, confidence), "the softmax hits what was asked for"
    labels = torch.randint(2, (len(logits),))
    found = calibration(logits, labels)
    assert found.ece == pytest.approx(oracle(logits, labels), abs=1e-6)
    exact = found.bins[-1]
    assert (exact.low, exact.high, exact.confidence, exact.images) == (1.0, 1.0, 1.0, 1)
    by_low = {round(15 * each.low): each.images for each in found.bins}
    assert by_low == {7: 1, **dict.fromkeys(range(8, 15), 3), 15: 1}, "a bin has its lower edge and not its upper one"


def test_a_bin_of_its_own_for_certainty_matters() -> None:
    """Three sure and wrong, one unsure and right: in one bin they would cancel in part."""
    logits = torch.tensor([[1e3, 0.0]] * 3 + [[0.0, 3.5]])  # 0.97
    labels = torch.tensor([1, 1, 1, 1])
    found = calibration(logits, labels)
    sure = float(torch.tensor([0.0, 3.5]).softmax(0)[1])
    assert found.ece == pytest.approx((3 * 1 + (1 - sure)) / 4, rel=1e-6)
    assert found.ece == pytest.approx(oracle(logits, labels), abs=1e-6)


def test_what_is_not_finite_is_never_right() -> None:
    logits = torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0], [1.0, 0.0]])
    labels = torch.zeros(3, dtype=torch.long)
    assert right(logits, labels).tolist() == [False, False, True]
    sums = calibration_sums(logits, labels)
    assert sums[0].sum() == 3
    assert sums[2].sum() == 1
    assert calibration_of(sums).nll != calibration_of(sums).nll, "and the result says so: nan"

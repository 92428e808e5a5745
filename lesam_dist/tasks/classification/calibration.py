"""How far a classifier's confidence can be taken at its word, from sums that add up over batches and processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lesam_dist.parallel.processes import Distributed

BINS = 15


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence is in [low, high), or, in the last bin of all, exactly 1.

    Attributes:
        low, high: its edges.
        images: how many, at least 1.
        confidence: their mean, 0 to 1.
        accuracy: the share of them that are right, 0 to 1.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Of some predictions.

    Attributes:
        nll: mean negative log-likelihood of the labels, the cross entropy.
        ece: expected calibration error, 0 to 1: the mean over images of \\|accuracy - confidence\\| of their bins.
        bins: those that are not empty.
    """

    nll: float
    ece: float
    bins: list[Bin]


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which images are classified as their labels say, (B,); logits that are not finite say nothing, so never."""
    return (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)


def calibration_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """What a batch adds to each bin, (4, BINS + 1), float64: images, confidence, right ones, negative log-likelihood.

    The confidence is the largest probability, of a softmax in float64. As in torchmetrics, whose
    `MulticlassCalibrationError` these bins are of, it is binned in float32, a bin has its lower edge, and confidences
    of exactly 1, which are many where a network is sure, are a bin of their own.

    Args:
        logits: (B, K).
        labels: (B,).
    """
    log_probabilities = logits.double().log_softmax(dim=1)
    confidence = log_probabilities.amax(dim=1).exp().float()
    edges = torch.linspace(0, 1, BINS + 1, device=logits.device)
    index = torch.bucketize(confidence, edges, right=True) - 1  # nan is behind all edges: in the last bin
    nll = F.nll_loss(log_probabilities, labels, reduction="none")
    parts = torch.stack([torch.ones_like(nll), confidence.double(), right(logits, labels).double(), nll])
    return torch.zeros(4, BINS + 1, dtype=torch.float64, device=logits.device).index_add_(1, index, parts)


def over_processes(sums: Tensor, world: Distributed) -> Tensor:
    """The sums of all processes' images, in place; one all-reduce."""
    if world.world_size > 1:
        dist.all_reduce(sums)
    return sums


def calibration_of(sums: Tensor) -> Calibration:
    """Of the sum of `calibration_sums` over all batches, of at least one image.

    Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), Equation 3, with 15 bins of equal width.
    """
    images, confidence, correct, nll = sums.cpu()
    total = float(images.sum())
    edges = torch.linspace(0, 1, BINS + 1).tolist()
    bins = [
        Bin(low, high, int(count), float(sure / count), float(hit / count))
        for low, high, count, sure, hit in zip(edges, [*edges[1:], 1.0], images, confidence, correct, strict=True)
        if count
    ]
    return Calibration(float(nll.sum()) / total, float((correct - confidence).abs().sum()) / total, bins)

"""What training minimises, for classes and for mixed targets alike."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.config.schema import LossConfig


class ClassificationLoss(nn.Module):
    """Cross entropy, or binary cross entropy of each class against all others.

    With logits z, targets t that sum to 1 and C classes, of one sample::

        t' = (1 - s) t + s / C                                                       s: label_smoothing
        cross entropy   - sum_c t'_c log softmax(z)_c
        binary          - 1/C sum_c [t'_c log sigmoid(z_c) + (1 - t'_c) log(1 - sigmoid(z_c))]

    where ``binary_threshold`` makes each t'_c above it 1 and the others 0. The cross entropy is torch's, to the bit.
    The binary one is that of "ResNet strikes back" (Wightman, Touvron and Jégou, 2021), where the mean is taken over
    samples and classes.

    Args:
        config: which, and with what smoothing.
        reduction: "mean" over the samples, or "none", as torch's losses have it.
    """

    def __init__(self, config: LossConfig, reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__()
        self.reduction: str = reduction
        self._binary = config.name == "binary"
        self._smoothing, self._threshold = config.label_smoothing, config.binary_threshold

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, 0-d, or with reduction "none" of each sample, (B,).

        Args:
            logits: (B, C).
            targets: classes, (B,) int64, or a weight for each class, (B, C), of which each sample's sum to 1.
        """
        if self._binary:
            return self._binary_loss(logits, targets)
        return F.cross_entropy(logits, targets, reduction=self.reduction, label_smoothing=self._smoothing)

    def _binary_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, classes)
        # float32 at least: autocast computes the loss in it, and a smoothed target is not exact in fewer bits.
        targets = targets.to(torch.promote_types(logits.dtype, torch.float32))
        targets = targets * (1 - self._smoothing) + self._smoothing / classes
        if self._threshold is not None:
            targets = (targets > self._threshold).to(targets.dtype)
        losses = F.binary_cross_entropy_with_logits(logits.to(targets.dtype), targets, reduction="none").mean(dim=1)
        return losses if self.reduction == "none" else losses.mean()

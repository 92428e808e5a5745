"""Logit adjustment in the loss (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, Equation 10).

    loss = cross entropy of z + tau log(pi),    pi_c = n_c / N

so that z itself, which predicts, is consistent for the balanced error at tau = 1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.config.schema import LongTailConfig
from lesam_dist.parallel.batch import Batch
from lesam_dist.tasks.long_tail.method import Method


class LogitAdjustment(Method):
    """Batches are (images, labels)."""

    def __init__(self, config: LongTailConfig, counts: Tensor, seed: int) -> None:
        super().__init__(config, counts, seed)
        self._added = (config.tau * (counts.double() / counts.sum()).log()).float()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images) + self._added, labels, reduction="none")

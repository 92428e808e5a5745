"""Cross entropy, as if there were no tail: the baseline."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.parallel.batch import Batch
from lesam_dist.tasks.long_tail.method import Method


class CrossEntropy(Method):
    """Batches are (images, labels)."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels, reduction="none")

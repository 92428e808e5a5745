"""Label-distribution-aware margins with deferred reweighting (Cao et al., NeurIPS 2019).

With s times the cosines between features and classes' weights as logits z, each sample of class y has::

    loss = cross entropy of z', where z'_y = z_y - s m_y and z'_c = z_c else
    m_c  = max_margin n_c^(-1/4) / max_k n_k^(-1/4)

and from `reweight_epoch` on a weight w_y, as in Cui et al. (CVPR 2019)::

    w_c ~ (1 - beta) / (1 - beta^(n_c)),  of mean 1 over the classes

A batch's loss is the weighted mean, sum w l / sum w, as torch's cross entropy has it; on any number of processes and
micro-batches it is that of the whole batch, since they are weighed by their sums of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.config.schema import LongTailConfig
from lesam_dist.models.heads import CosineClassifier, replace_last_layer
from lesam_dist.parallel.batch import Batch
from lesam_dist.tasks.long_tail.method import Method
from lesam_dist.tasks.task import At


def margins(counts: Tensor, largest: float) -> Tensor:
    """m of each class, (C,) float32."""
    relative = counts.double() ** -0.25
    return (largest * relative / relative.max()).float()


def effective_weights(counts: Tensor, beta: float) -> Tensor:
    """w of each class, (C,) float32; with beta 0 all are 1."""
    weights = (1 - beta) / (1 - beta ** counts.double())
    return (weights / weights.mean()).float()


class LdamDrw(Method):
    """Batches are (images, labels), and (images, labels, weights (B,)) once drawn."""

    def __init__(self, config: LongTailConfig, counts: Tensor, seed: int) -> None:
        super().__init__(config, counts, seed)
        self._margins = config.scale * margins(counts, config.max_margin)
        self._weights = effective_weights(counts, config.reweight_beta)

    def network(self, model: nn.Module, name: str, num_classes: int) -> nn.Module:
        return replace_last_layer(model, name, lambda size: CosineClassifier(size, num_classes, self.config.scale))

    def draw(self, batch: Batch, at: At) -> Batch:
        images, labels = batch
        start = self.config.reweight_epoch
        deferred = start is None or at.step < start * at.steps_per_epoch
        weights = torch.ones_like(labels, dtype=torch.float32) if deferred else self._weights[labels]
        return images, labels, weights

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels, weights = batch
        logits: Tensor = model(images)
        lower = F.one_hot(labels, logits.shape[1]) * self._margins
        losses = F.cross_entropy(logits - lower, labels, reduction="none")
        weighted: Tensor = losses * weights / weights.mean()
        return weighted

    def count(self, batch: Batch) -> Tensor:
        weights: Tensor = batch[2]
        return weights.sum()

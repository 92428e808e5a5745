"""Global and local mixture consistency, cumulative learning: GLMC (Du et al., CVPR 2023), as its released code has it.

A step has a shuffled batch (x, y) and a rebalanced one (x', y'), two views of each (`lesam_dist.data.pairs`), and draws
one l ~ Beta(alpha, alpha)::

    mix = l x1 + (1 - l) x'1                 t   = l e_y + (1 - l) e_y'              e: one-hot
    cut = x2 with a box of x'2               t_w = l w_y e_y + (1 - l) w_y' e_y'     w_c = C n_c^-k / sum_j n_j^-k

The box has a side of sqrt(1 - l) of the image's and a uniform centre, and is cut off at the edges; l stays what it was.
With classifiers f and g, projections z and predictions p of the two views, and a = 1 - (epoch / epochs)^2::

    loss = a [CE(f(mix), t) + CE(f(cut), t)] + (1 - a) [CE(g(mix), t_w) + CE(g(cut), t_w)]
           - contrast [cos(p_mix, stop(z_cut)) + cos(p_cut, stop(z_mix))]

with CE(z, t) = -sum_c t_c log softmax(z)_c, and g predicts. "stop" passes no gradient; its z is computed anew in each
pass, so that a sharpness-aware method takes the gradient at the perturbed weights with z of those weights. The loss may
be negative.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.config.schema import LongTailConfig
from lesam_dist.data.order import PAIR_MIXING_STREAM, generator_of
from lesam_dist.models.heads import TwoViews, View, without_last_layer
from lesam_dist.parallel.batch import Batch
from lesam_dist.tasks.long_tail.method import Method
from lesam_dist.tasks.task import At


class Mix(NamedTuple):
    """What a step does to its batches.

    Attributes:
        share: l, 0 to 1.
        top, bottom, left, right: rows and columns of the box.
    """

    share: float
    top: int
    bottom: int
    left: int
    right: int


def draw_mix(alpha: float, height: int, width: int, *, seed: int, step: int) -> Mix:
    """How a step mixes images of this size: a function of (seed, step), the same on all processes."""
    generator = generator_of(PAIR_MIXING_STREAM, seed=seed, index=step)
    share = float(generator.beta(alpha, alpha))
    side = math.sqrt(1 - share)
    edges = []
    for length in (height, width):
        centre, half = int(generator.random() * length), math.ceil(length * side) // 2
        edges += [max(centre - half, 0), min(centre + half, length)]
    return Mix(share, *edges)


def label_weights(counts: Tensor, exponent: float) -> Tensor:
    """w of each class, (C,) float32, of mean 1."""
    weights = counts.double() ** -exponent
    return (weights / weights.mean()).float()


class Glmc(Method):
    """Batches are those of `PairLoader`; once drawn, mix, cut, targets, weighted_targets and plain_share (a)."""

    def __init__(self, config: LongTailConfig, counts: Tensor, seed: int) -> None:
        super().__init__(config, counts, seed)
        self._weights = label_weights(counts, config.label_weight)

    def network(self, model: nn.Module, name: str, num_classes: int) -> nn.Module:
        features, size = without_last_layer(model, name)
        return TwoViews(features, size, num_classes)

    def draw(self, batch: Batch, at: At) -> Batch:
        images = batch["images"]
        share, top, bottom, left, right = draw_mix(
            self.config.mix_alpha, images.shape[-2], images.shape[-1], seed=self.seed, step=at.step
        )
        cut = batch["second_view"].clone(memory_format=torch.preserve_format)
        cut[:, :, top:bottom, left:right] = batch["other_second_view"][:, :, top:bottom, left:right]
        labels, others = (F.one_hot(batch[name], len(self.counts)).float() for name in ("labels", "other_labels"))
        return {
            "mix": torch.lerp(batch["other_images"], images, share),
            "cut": cut,
            "targets": torch.lerp(others, labels, share),
            "weighted_targets": torch.lerp(others * self._weights, labels * self._weights, share),
            "plain_share": 1 - (at.epoch / at.epochs) ** 2,
        }

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        views: tuple[View, View] = model(batch["mix"], batch["cut"])
        plain = sum(F.cross_entropy(view.logits, batch["targets"], reduction="none") for view in views)
        weighted = sum(F.cross_entropy(view.balanced, batch["weighted_targets"], reduction="none") for view in views)
        alike = sum(
            F.cosine_similarity(one.predicted, other.projected.detach()) for one, other in (views, reversed(views))
        )
        a = batch["plain_share"]
        losses: Tensor = a * plain + (1 - a) * weighted - self.config.contrast * alike
        return losses

"""What a step of each method costs, counted rather than claimed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lesam_dist.config.adversarial_checks import attack_steps
from lesam_dist.config.methods import complete
from lesam_dist.config.schema import Config, OptimizerConfig
from lesam_dist.optim.engine.products import COST, NotTwiceDifferentiableError
from lesam_dist.train.build import build_optimizer
from lesam_dist.train.passes import BatchPasses

_FORWARD = 1 / 3  # of a forward and backward pass: a backward pass costs about two forward passes
_BATCH = 120


def sgd_steps(config: Config) -> float:
    """Cost of a run's average step, in forward and backward passes over its batch; 1.0 is SGD.

    The optimizer's own arithmetic is not in it, nor is communication. Epochs outside ``start_epoch`` to ``stop_epoch``
    count as SGD's. Attacking the images counts for all: a forward, and a backward of as much, for each of its steps.
    """
    attack = 2 * _FORWARD * attack_steps(config)
    optimizer, epochs = config.optimizer, float(config.epochs)
    stop = epochs if optimizer.stop_epoch is None else min(optimizer.stop_epoch, epochs)
    more = passes_per_step(optimizer, config.parallel.is_sharded) - 1
    return attack + 1 + more * (stop - optimizer.start_epoch) / epochs


def passes_per_step(config: OptimizerConfig, is_sharded: bool = False) -> float:
    """Passes that the method makes in an average step: the calls of its closure, counted on a tiny network.

    A pass over a share of the samples counts as that share, a forward pass alone as a third, and an exact product with
    the Hessian, which sharded weights do not have, as three.
    """
    # Neither who computes nor over whom gradients are reduced changes the number of passes.
    config = replace(config, backend="reference", scope="global")
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        optimizer = build_optimizer(model, config)
        images, labels = torch.randn(_BATCH, 3), torch.randint(3, (_BATCH,))
        period = int(complete(config).get("interval", 1)) * config.ascent_interval
        counted = 0.0
        for step in range(2 * period):
            closure = _Counting(model, nn.CrossEntropyLoss(), images, labels)
            closure.is_sharded = is_sharded
            optimizer.step(closure)
            if step >= period:  # the first period may differ: there is no eigenvector yet
                counted += closure.passes
    return counted / period


class _Counting(BatchPasses):
    passes = 0.0
    is_sharded = False

    def __call__(self, **kwargs: Any) -> Tensor:
        subset = kwargs.get("subset")
        share = kwargs.get("fraction", 1.0) if subset is None else len(subset) / len(self.labels)
        self.passes += share if kwargs.get("backward", True) else share * _FORWARD
        return super().__call__(**kwargs)

    def hessian_product(self, along: Mapping[Tensor, Tensor]) -> None:
        if self.is_sharded:
            raise NotTwiceDifferentiableError("the model is sharded.")
        self.passes += COST
        super().hessian_product(along)

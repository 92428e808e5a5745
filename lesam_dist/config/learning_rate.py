"""The learning rate that a config means: it may be given for another size of batch."""

from __future__ import annotations

import math

from lesam_dist.config.schema import Config


def peak_lr(config: Config) -> float:
    """The peak learning rate that the run uses: ``optimizer.lr``, scaled to the batch by ``optimizer.lr_scaling``.

    "linear" keeps the change of the weights per epoch, lr * g for each of fewer steps (Goyal et al. 2017, section 2.1);
    "sqrt" keeps the variance of a step, lr^2 / batch (Krizhevsky 2014; for LAMB, You et al. 2020).
    """
    optimizer = config.optimizer
    ratio = config.data.batch_size / optimizer.lr_reference_batch
    return optimizer.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optimizer.lr_scaling]

"""Domain generalisation: which domains are trained on, and how long."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DomainsConfig:
    """Train on some domains and test on others (task: domains); data.root holds DOMAIN/CLASS/IMAGE."""

    source: list[str] = field(default_factory=list)
    """domains to train on, by their folders' names; a batch has as many images of each"""
    target: list[str] | None = None
    """domains to test on; null takes all others"""
    holdout: float = 0.2
    """share of each source domain's images that is not trained on: the checkpoint that is best on them is kept. 0
    trains on all, for as many epochs as a run that held some out was best at"""
    steps_per_epoch: int = 300
    """steps of an "epoch": here it is the time between two evaluations, and not a pass over the images"""
    head_steps: int = 0
    """steps at the start in which the last layer alone learns, and is perturbed (500 in ERM++)"""

"""Training on images that are perturbed to raise the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class AdversarialConfig:
    """Adversarial training by projected gradient descent on the pixels (Madry et al., 2018), docs/robust.md."""

    norm: Literal["linf", "l2"] | None = None
    """of the perturbation of an image; null trains on the images as they are"""
    epsilon: float | None = None
    """its largest norm, in pixels from 0 to 1: eight grey levels, 8/255, are 0.031373"""
    step_size: float | None = None
    """of each step of the ascent, in pixels from 0 to 1; null takes epsilon / 4 (linf) or epsilon / 8 (l2)"""
    steps: int = 10
    """of the ascent; each costs a forward, and a backward to the pixels alone"""
    random_start: bool = True
    """begin at a random point of the ball; false begins at the image"""
    evaluate: bool = False
    """attack the validation images too, and log the accuracy that is left as robust_acc1"""
    eval_steps: int = 20
    """of that attack, which begins at the image (evaluate)"""

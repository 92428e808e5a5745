"""Adversarial training: each batch is attacked once, at the weights that a step starts from, before its first pass.

So both passes of a sharpness-aware step see the same images, and the perturbation of the weights is one of the
adversarial loss, as in adversarial weight perturbation (Wu et al., 2020), whose code attacks once, at the clean
weights, too. Attacking anew at the perturbed weights would cost as much again.

The network is in eval mode while it is attacked, as in the code of TRADES and AWP: BatchNorm uses its running
statistics, which the attack does not move, and nothing is dropped. (That of Madry et al. and Rice et al. attacks in
training mode; Pang et al., "Bag of Tricks for Adversarial Training", 2021, compare the two.) So an image's attack does
not depend on the others of its batch, nor on micro-batches and processes, beyond rounding.

Images are attacked in the run's autocast dtype, without a loss scale: the sign, or the direction, of a gradient is all
that counts, and the loss is summed over the images, not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lesam_dist.config.schema import Config
from lesam_dist.data.order import ADVERSARIAL_STREAM, position_uniforms
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.classification.pgd import Norm, Scale, pgd
from lesam_dist.tasks.precision import autocast_dtype


class Attack:
    """Attacks the images of a run as its config's ``adversarial`` says.

    Args:
        config: the run, whose ``adversarial.norm`` is not null.
        world: this process among all.
    """

    def __init__(self, config: Config, world: Distributed) -> None:
        own, data = config.adversarial, config.data
        assert own.norm is not None
        assert own.epsilon is not None
        self._own, self._norm, self._epsilon = own, own.norm, own.epsilon
        self._seed, self._world, self._parts = config.seed, world, data.micro_batches
        self._scale, self._autocast = Scale(data.mean, data.std), autocast_dtype(config.precision)

    def on_training(self, network: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The images of a batch as a training step sees them.

        Random starts are a function of (seed, step, place in the global batch), and none are drawn from torch.

        Args:
            network: not wrapped by DDP, whose reductions it must not set off; sharded, its passes are collective.
            images: (B, 3, S, S), normalised, of this process; they stay as they are.
            labels: (B,) int64.
            step: from 0.
        """
        starts = torch.zeros_like(images)
        if self._own.random_start:
            first = self._world.rank * len(images)
            places, width = range(first, first + len(images)), images[0].numel() + 1
            uniforms = position_uniforms(ADVERSARIAL_STREAM, width, places, seed=self._seed, epoch=step)
            starts.copy_(start_of(self._norm, torch.from_numpy(uniforms)).view_as(images))
        with in_eval_mode(network), self._computing(images):
            parts = (tensor.chunk(self._parts) for tensor in (images, labels, starts))
            attacked = [
                self._attacked(network, x, y, start, self._own.steps) for x, y, start in zip(*parts, strict=True)
            ]
        return torch.cat(attacked)

    def on_evaluation(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The images of a batch, attacked by ``eval_steps`` steps that begin at the images: the same on any processes.

        Args:
            network: in eval mode.
            images, labels: see `on_training`.
        """
        with self._computing(images):
            return self._attacked(network, images, labels, torch.zeros_like(images), self._own.eval_steps)

    def _attacked(self, network: nn.Module, images: Tensor, labels: Tensor, starts: Tensor, steps: int) -> Tensor:
        delta = pgd(
            network,
            images,
            labels,
            starts,
            norm=self._norm,
            eps=self._epsilon,
            steps=steps,
            scale=self._scale,
            step_size=self._own.step_size,
        )
        return images + self._scale.normalised(delta)

    def _computing(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, self._autocast, enabled=self._autocast is not None)


def start_of(norm: Norm, uniforms: Tensor) -> Tensor:
    """A random point of the unit box, uniform, or of the unit ball: any direction, a length uniform from 0 to 1.

    Args:
        norm: of the box or the ball.
        uniforms: float64 (B, N + 1) in [0, 1); the last of each is for the length.

    Returns:
        float64 (B, N).
    """
    if norm == "linf":
        return 2 * uniforms[:, :-1] - 1
    direction: Tensor = torch.special.ndtri(uniforms[:, :-1].clamp_min(1e-12))  # of normal numbers
    length = direction.square().sum(dim=1, keepdim=True).sqrt()
    return direction / length * uniforms[:, -1:]


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm uses its statistics, and nothing is dropped."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)

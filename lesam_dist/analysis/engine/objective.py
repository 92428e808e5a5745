"""The mean loss over many images as a function of the weights: its value, its gradient, products with its Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from lesam_dist.config.schema import PrecisionConfig
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.numerics import numerics

Batch = tuple[Tensor, Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over a batch of the cross entropy, 0-d."""
    return F.cross_entropy(logits, labels, reduction="sum")


class Objective:
    """``L(w) = 1/N sum_i loss(f_w(x_i), y_i)`` of the images of all processes.

    The model is in eval mode while it computes, so that BatchNorm uses its running statistics and nothing is dropped,
    and in full float32 (no TF32). Vectors are flat: all trainable parameters behind each other, in the order of
    ``model.parameters()``. Each process holds a share of the images and the whole model; all call each method alike,
    and each gets the same result from one all-reduce of sums, so that uneven shares count by their images.

    Args:
        model: not wrapped (neither by DDP nor by FSDP), on one device.
        batches: this process's ``(images, labels)``, on that device.
        world: this process among all; None for one alone.
        criterion: gives the sum of a batch's losses; None takes the cross entropy.

    Attributes:
        parameters: those that vary.
        size: number of their elements.
        samples: images over all processes.
        passes: forwards and backwards over all images so far.

    Raises:
        UserError: a process has no images; no parameter is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        world: Distributed | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        self.model, self.batches = model, batches
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise UserError("the model has no parameter that requires a gradient, so its loss does not vary.")
        self.size = sum(p.numel() for p in self.parameters)
        self._sizes = [p.numel() for p in self.parameters]
        self.device, self.dtype = self.parameters[0].device, self.parameters[0].dtype
        self.world = world or Distributed(0, 0, 1, self.device)
        self._criterion = criterion or summed_cross_entropy
        counts = self.world.gather(sum(len(labels) for _, labels in batches))
        if not all(counts):
            raise UserError(
                f"{sum(counts)} images are too few for {len(counts)} processes, each of which needs one: start fewer, "
                "or take more images."
            )
        self.samples: int = sum(counts)
        self.passes = {"forward": 0, "backward": 0}

    def weights(self) -> Tensor:
        """A copy of the parameters, flat, (size,)."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def on(self, batches: Sequence[Batch]) -> Objective:
        """The loss of some images alone, of the same model, on this process alone: its methods make no collective."""
        return Objective(self.model, batches, criterion=self._criterion)

    @contextmanager
    def at(self, weights: Tensor) -> Iterator[None]:
        """Other weights, (size,), for a while; then the former ones, bit for bit."""
        before = self.weights()
        self._write(weights)
        try:
            yield
        finally:
            self._write(before)

    @torch.no_grad()
    def loss(self) -> float:
        """L(w); one forward."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.computing():
            for images, labels in self.batches:
                total += self._criterion(self.model(images), labels).double()
        self._count(forward=1)
        return float(self._summed(total)) / self.samples

    @torch.no_grad()
    def loss_and_error(self) -> tuple[float, float]:
        """L(w), and the share of images whose largest output is not their label's, in per cent; one forward."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with self.computing():
            for images, labels in self.batches:
                out = self.model(images)
                sums[0] += self._criterion(out, labels).double()
                sums[1] += (out.argmax(dim=1) != labels).sum()
        self._count(forward=1)
        loss, wrong = self._summed(sums).tolist()
        return loss / self.samples, 100 * wrong / self.samples

    @torch.no_grad()
    def estimate_batchnorm(self) -> None:
        """Give each BatchNorm layer the statistics that its inputs have under these weights; one forward.

        Running statistics become the mean of those of the batches, each weighted by its images, as torch averages
        them with ``momentum=None`` where all batches are equally large: they depend on how the images are divided into
        batches, and in nothing else on the number of processes. Batches of a single image, which may have no variance,
        are left out. Dropout is off, and so is all else that differs in training. A model without any is not computed.

        Raises:
            UserError: all batches are of a single image.
        """
        layers = self.batchnorms()
        if not layers:
            return
        momenta = [layer.momentum for layer in layers]
        seen = 0
        try:
            with self.computing():
                for layer in layers:
                    layer.reset_running_stats()  # a number that is not finite would stay with any momentum
                    layer.train()
                for images, _ in self.batches:
                    if len(images) > 1:
                        seen += len(images)
                        for layer in layers:
                            layer.momentum = len(images) / seen
                        self.model(images)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
        total = sum(self.world.gather(seen))
        if not total:
            raise UserError(
                "BatchNorm's statistics cannot be estimated from batches of one image: raise data.eval_batch_size."
            )
        for buffer in (b for layer in layers for b in (layer.running_mean, layer.running_var) if b is not None):
            buffer.copy_(self._summed(buffer.double() * seen) / total)
        self._count(forward=1)

    def batchnorms(self) -> list[_BatchNorm]:
        """The model's BatchNorm layers that have running statistics."""
        return [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]

    def gradient(self) -> tuple[float, Tensor]:
        """L(w), and its gradient (size,); one forward and one backward."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        with self.computing():
            for images, labels in self.batches:
                loss = self._criterion(self.model(images), labels)
                total += loss.detach().double()
                sums += _flat(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
        self._count(forward=1, backward=1)
        return float(self._summed(total)) / self.samples, self._summed(sums) / self.samples

    def hessian_product(self, vector: Tensor) -> Tensor:
        """``H v``, exact up to rounding: the gradient of ``g . v``, (size,).

        One forward and two backwards, of which the second goes back through the first.
        """
        parts = self.unflatten(vector)
        sums = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        with self.computing():
            for images, labels in self.batches:
                loss = self._criterion(self.model(images), labels)
                gradient = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
                along = torch.stack([(g * v).sum() for g, v in zip(gradient, parts, strict=True)]).sum()
                if along.requires_grad:  # else the loss is linear in the weights
                    sums += _flat(torch.autograd.grad(along, self.parameters, materialize_grads=True))
        self._count(forward=1, backward=2)
        return self._summed(sums) / self.samples

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """A flat vector as parts in the shapes of the parameters, which share its memory."""
        parts = vector.split(self._sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The model as all methods compute it, in eval mode and float32, for what one computes with it oneself."""
        self.world.move("computing on its images")
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            # Attention's fused kernels cannot be differentiated twice.
            with numerics(PrecisionConfig(tf32=False), self.device), sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for module, training in modes.items():
                module.training = training

    @torch.no_grad()
    def _write(self, weights: Tensor) -> None:
        for p, part in zip(self.parameters, self.unflatten(weights), strict=True):
            p.copy_(part)

    def _summed(self, value: Tensor) -> Tensor:
        if self.world.world_size > 1:
            dist.all_reduce(value)
        return value

    def _count(self, forward: int = 0, backward: int = 0) -> None:
        self.passes["forward"] += forward
        self.passes["backward"] += backward


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])

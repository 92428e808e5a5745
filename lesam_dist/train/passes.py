"""One forward and backward pass of one batch: the closure that a sharpness-aware optimizer calls.

The optimizer decides when and how often; everything that must be equal between the passes of a step lives here:
the batch, the random numbers (dropout, stochastic depth), and BatchNorm's running statistics, which only the
first pass may move: later passes see perturbed weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from lesam_dist.optim.engine.products import NotTwiceDifferentiableError, hessian_backward
from lesam_dist.parallel.batch import Batch, parts, rows, samples_in, tensors
from lesam_dist.parallel.bucket_rounding import rounding_of
from lesam_dist.parallel.replicas import Sync, replica_average
from lesam_dist.train.alike import Alike
from lesam_dist.train.batchnorm import average_over
from lesam_dist.train.phases import AVERAGING, UPDATING

LossOf = Callable[[nn.Module, Any], Tensor]


class Passes:
    """The passes over one batch of any kind; call it once per pass.

    In a CUDA graph the device's random numbers cannot be put back, so the passes of a step then draw different ones.

    Args:
        model: in training mode, wrapped (DDP, FSDP2) or not.
        loss: ``loss(model, batch)`` gives a 0-d mean of the batch's losses, from one forward of the model.
        batch: see `lesam_dist.parallel.batch`; it must stay unchanged until the step is over.
        autocast: dtype of the forward under `torch.autocast`; None computes in the weights' dtype.
        scaler: scales the loss before ``backward`` (float16); whoever steps unscales.
        micro_batches: each pass goes through the batch in so many parts of equal size, to save memory. Gradients are
            reduced over the processes once, in the last one. The same as one part, but for BatchNorm.
        on_pass: called with what begins: "pass 1" and so on, and after each `UPDATING`; under DDP `AVERAGING` too, in a
            backward that reduces, when this process has all gradients of its own.
        may_round: asked when a pass begins: whether its gradient may be reduced in a smaller dtype, where the model was
            wrapped so. None answers no.
        losses: ``losses(model, batch)`` gives the loss of each sample, (B,), for methods that ask for them.
        count: ``count(batch)`` is what ``loss`` is the mean over, a number or a 0-d tensor: the weight of a micro-batch
            among others. None takes the samples.
        share: what the loss of a pass that is reduced over all processes is multiplied by here, 0-d, or a number. It
            makes of a mean over processes, as DDP and FSDP2 take it, one over all that is counted.
        resting: parameters that the step leaves as they are: after each pass they have no gradient.

    Attributes:
        forwards, backwards: samples that have gone through the model so far; a product with the Hessian counts as the
            four backwards that its multiplications are.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossOf,
        batch: Batch,
        autocast: torch.dtype | None = None,
        scaler: GradScaler | None = None,
        micro_batches: int = 1,
        on_pass: Callable[[str], object] | None = None,
        may_round: Callable[[], bool] | None = None,
        *,
        losses: LossOf | None = None,
        count: Callable[[Batch], int | Tensor] | None = None,
        share: Tensor | float = 1.0,
        resting: Sequence[Tensor] = (),
    ) -> None:
        self.model, self.batch = model, batch
        self.autocast, self.scaler, self.micro_batches = autocast, scaler, micro_batches
        self._loss_of, self._losses_of, self._count, self._share = loss, losses, count or samples_in, share
        self._resting = resting
        self._samples = samples_in(batch)
        self._device = tensors(batch)[0].device
        self._alike = Alike(model, self._device)
        self._on_pass, self._passes = on_pass, 0
        self._may_round = may_round
        self.forwards = self.backwards = 0

    def __call__(
        self,
        *,
        sync: Sync = True,
        fraction: float = 1.0,
        subset: Tensor | None = None,
        per_sample: bool = False,
        backward: bool = True,
    ) -> Tensor:
        """One pass over the batch.

        Args:
            sync: False leaves the gradients of this pass unreduced on each rank (DDP); "replica" reduces them within
                each replica (HSDP wrapped for that scope).
            fraction: share of this rank's samples to use, in (0, 1]: the first ones, which a shuffled batch makes
                random ones; rounded up.
            subset: indices of the samples to use, (K,) int64; None uses all.
            per_sample: return the loss of each sample; the criterion must have torch's attribute ``reduction``.
            backward: False only evaluates the loss.

        Returns:
            The mean loss of this rank's samples times ``share``, 0-d, detached, not scaled; with ``per_sample`` all of
            them, (B,).
        """
        self._tell_of_a_pass()
        batch = self.batch
        if subset is not None:
            batch = rows(batch, subset)
        elif fraction < 1:
            batch = rows(batch, slice(math.ceil(fraction * self._samples)))
        samples = samples_in(batch)
        self.forwards += samples
        self.backwards += backward * samples
        pieces = self._weighted(batch, self._share if sync is True else 1.0)
        rounded = self._may_round is not None and self._may_round()
        with self._alike(), nullcontext() if backward else torch.no_grad():
            losses = []
            for index, (piece, weight) in enumerate(pieces):
                reduces = sync if index == len(pieces) - 1 else False
                with gradient_sync(self.model, reduces, rounded):
                    losses.append(self._part(piece, weight, per_sample, backward, tells=bool(reduces)))
        self._let_rest()
        if self._on_pass is not None:
            self._on_pass(UPDATING)
        if per_sample:
            return torch.cat(losses)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def hessian_product(self, along: Mapping[Tensor, Tensor]) -> None:
        """Add ``H v`` of the batch's loss to ``.grad``, averaged over the processes: exact, by differentiating twice.

        Of the loss that the passes have: with the batch's statistics in BatchNorm, the same random numbers, autocast
        and the scaler's factor. It costs about three passes, and the memory of two: the first backward's graph is kept.
        It is computed without compiled code, DDP's hooks and fused attention, which differentiate once; one all-reduce
        follows.

        Args:
            along: v, see `TwiceDifferentiable`.

        Raises:
            NotTwiceDifferentiableError: the model is sharded (FSDP2, HSDP), or has torch's SyncBatchNorm.
        """
        self._require_twice()
        self._tell_of_a_pass()
        self.forwards += self._samples
        self.backwards += 4 * self._samples
        model: nn.Module = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        with self._alike(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), uncompiled(model):
            for piece, weight in self._weighted(self.batch, self._share):
                loss = self._loss(self._loss_of, model, piece) * weight
                hessian_backward(loss if self.scaler is None else self.scaler.scale(loss), along)
        if isinstance(self.model, DistributedDataParallel):
            if self._on_pass is not None:
                self._on_pass(AVERAGING)
            average_over([p.grad for p in along if p.grad is not None], self.model.process_group)
        self._let_rest()
        if self._on_pass is not None:
            self._on_pass(UPDATING)

    def _let_rest(self) -> None:
        for p in self._resting:
            p.grad = None

    def _weighted(self, batch: Batch, share: Tensor | float) -> list[tuple[Batch, Tensor | float]]:
        """The micro-batches, each with its weight in this process's mean times ``share``."""
        pieces = parts(batch, self.micro_batches)
        counts = [self._count(piece) for piece in pieces]
        total = self._count(batch)
        return [(piece, count / total * share) for piece, count in zip(pieces, counts, strict=True)]

    def _require_twice(self) -> None:
        if isinstance(self.model, FSDPModule):
            raise NotTwiceDifferentiableError(
                "the model is sharded, and FSDP2 gathers its weights outside of the graph."
            )
        if any(isinstance(layer, nn.SyncBatchNorm) for layer in self.model.modules()):
            raise NotTwiceDifferentiableError("the model has torch's SyncBatchNorm, which differentiates once.")

    def _tell_of_a_pass(self) -> None:
        if self._on_pass is not None:
            self._passes += 1
            self._on_pass(f"pass {self._passes}")

    def _loss(self, loss_of: LossOf, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(self._device.type, self.autocast, enabled=self.autocast is not None):
            return loss_of(model, batch)

    def _part(self, batch: Batch, weight: Tensor | float, per_sample: bool, backward: bool, tells: bool) -> Tensor:
        """Forward and backward of a part of the batch; ``tells`` when backward reduces.

        Returns:
            The part's mean loss times its weight, or with ``per_sample`` the loss of each of its samples.
        """
        if per_sample and self._losses_of is None:
            raise TypeError(
                "the loss of each sample was asked for, and there is only their mean: give losses=, or choose a method "
                "that does not select samples."
            )
        loss_of = self._losses_of if per_sample and self._losses_of else self._loss_of
        losses = self._loss(loss_of, self.model, batch)
        loss = (losses.mean() if per_sample else losses) * weight
        if backward:
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            if tells and self._on_pass is not None and isinstance(self.model, DistributedDataParallel):
                scaled.register_hook(self._tell_of_own_gradients)
            # 1, or nan: the gradients of a loss that is not finite may be, and every process must skip the step.
            scaled.backward(scaled.detach() - scaled.detach() + 1)
        return losses.detach() if per_sample else loss.detach()

    def _tell_of_own_gradients(self, _: Tensor) -> None:
        """When a backward begins: DDP queues what waits for the reduction behind this, at its last bucket."""
        Variable._execution_engine.queue_callback(self._tell_of_the_reduction)

    def _tell_of_the_reduction(self) -> None:
        if self._on_pass is not None:
            self._on_pass(AVERAGING)


class BatchPasses(Passes):
    """The passes over one batch of images and labels; call it once per pass.

    Args:
        model: in training mode, wrapped (DDP, FSDP2) or not.
        criterion: ``criterion(logits, labels)`` gives a 0-d loss, the mean over the samples.
        images: (B, C, H, W), labels: (B,) int64, or what else of B rows the criterion takes, as (B, K) mixed targets.
            They must stay unchanged until the step is over.
        autocast, scaler, micro_batches, on_pass, may_round: see `Passes`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        images: Tensor,
        labels: Tensor,
        autocast: torch.dtype | None = None,
        scaler: GradScaler | None = None,
        micro_batches: int = 1,
        on_pass: Callable[[str], object] | None = None,
        may_round: Callable[[], bool] | None = None,
    ) -> None:
        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            value: Tensor = criterion(model(batch[0]), batch[1])
            return value

        def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            with unreduced(criterion):
                return loss(model, batch)

        self.criterion, self.images, self.labels = criterion, images, labels
        super().__init__(
            model, loss, (images, labels), autocast, scaler, micro_batches, on_pass, may_round, losses=losses
        )


@contextmanager
def gradient_sync(model: nn.Module, sync: Sync, rounded: bool = False) -> Iterator[None]:
    """Choose over which processes the backward inside reduces gradients: all (True), none (False) or "replica".

    The forward must be inside too: DDP decides there. ``rounded``: reduce in the ``reduce_dtype`` that `wrap` was
    given, if any, and not in float32.

    Raises:
        RuntimeError: where the model's wrapper cannot do that.
    """
    average = replica_average(model)
    if sync == "replica" and average is None:
        raise RuntimeError(
            "sync='replica' needs a model that lesam_dist.parallel.wrap(..., 'hsdp', scope='replica') made; "
            f"this one is a {type(model).__name__}."
        )
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(bool(sync))
        model.set_is_last_backward(bool(sync))
        with average.switched(sync != "replica") if average is not None else nullcontext():
            yield
    elif isinstance(model, DistributedDataParallel) and not sync:
        if model.static_graph:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) cannot leave out a reduction, which scope='local' and "
                "micro-batches need: torch then fails or silently stops reducing. Wrap with static_graph=False."
            )
        with model.no_sync():
            yield
    elif rounding := rounding_of(model):
        with rounding.switched(rounded):
            yield
    else:
        yield


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, what `torch.compile` has compiled runs as it is written: compiled code is for one shape and format, and
    cannot be differentiated twice."""
    if all(module._compiled_call_impl is None for module in model.modules()):
        yield  # asking torch imports its compiler, which takes a second
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def unreduced(criterion: nn.Module) -> Iterator[None]:
    """Inside, a criterion of torch gives the loss of each sample instead of their mean."""
    if not hasattr(criterion, "reduction"):
        raise TypeError(
            f"the loss of each sample was asked for, but {type(criterion).__name__} has no attribute 'reduction' as "
            "torch's losses have. Give it one, or choose a method that does not select samples."
        )
    before = criterion.reduction
    criterion.reduction = "none"  # type: ignore[assignment]
    try:
        yield
    finally:
        criterion.reduction = before

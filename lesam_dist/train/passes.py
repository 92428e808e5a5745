"""One forward and backward pass of one batch: the closure that a sharpness-aware optimizer calls.

The optimizer decides when and how often; everything that must be equal between the passes of a step lives here:
the batch, the random numbers (dropout, stochastic depth), and BatchNorm's running statistics, which only the
first pass may move: later passes see perturbed weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd import Variable
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lesam_dist.optim.engine import capturing
from lesam_dist.optim.engine.products import NotTwiceDifferentiableError, hessian_backward
from lesam_dist.parallel.bucket_rounding import rounding_of
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.replicas import Sync, replica_average
from lesam_dist.train.phases import AVERAGING, UPDATING


class BatchPasses:
    """The passes over one batch; call it once per pass.

    In a CUDA graph the device's random numbers cannot be put back, so the passes of a step then draw different ones.

    Args:
        model: in training mode, wrapped (DDP, FSDP2) or not.
        criterion: ``criterion(logits, labels)`` gives a 0-d loss, the mean over the samples.
        images: (B, C, H, W), labels: (B,) int64, or what else of B rows the criterion takes, as (B, K) mixed targets.
            They must stay unchanged until the step is over.
        autocast: dtype of the forward under `torch.autocast`; None computes in the weights' dtype.
        scaler: scales the loss before ``backward`` (float16); whoever steps unscales.
        micro_batches: each pass goes through the batch in so many parts of equal size, to save memory. Gradients are
            reduced over the processes once, in the last one. The same as one part, but for BatchNorm.
        on_pass: called with what begins: "pass 1" and so on, and after each `UPDATING`; under DDP `AVERAGING` too, in a
            backward that reduces, when this process has all gradients of its own.
        may_round: asked when a pass begins: whether its gradient may be reduced in a smaller dtype, where the model was
            wrapped so. None answers no.

    Attributes:
        forwards, backwards: images that have gone through the model so far; a product with the Hessian counts as the
            four backwards that its multiplications are.
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
        self.model, self.criterion = model, criterion
        self.images, self.labels = images, labels
        self.autocast, self.scaler, self.micro_batches = autocast, scaler, micro_batches
        self._rng: list[Tensor] | None = None
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
            The mean loss of this rank's samples, 0-d, detached, not scaled; with ``per_sample`` all of them, (B,).
        """
        self._tell_of_a_pass()
        count = math.ceil(fraction * len(self.labels))
        images, labels = (t[:count] if subset is None else t[subset] for t in (self.images, self.labels))
        self.forwards += len(labels)
        self.backwards += backward * len(labels)
        parts = list(zip(images.chunk(self.micro_batches), labels.chunk(self.micro_batches), strict=True))
        rounded = self._may_round is not None and self._may_round()
        with self._alike(images.device), nullcontext() if backward else torch.no_grad():
            losses = []
            for index, part in enumerate(parts):
                reduces = sync if index == len(parts) - 1 else False
                with gradient_sync(self.model, reduces, rounded):
                    share = len(part[1]) / len(labels)
                    losses.append(self._part(*part, share, per_sample, backward, tells=bool(reduces)))
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
        self.forwards += len(self.labels)
        self.backwards += 4 * len(self.labels)
        model: nn.Module = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        with self._alike(self.images.device), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), uncompiled(model):
            parts = zip(self.images.chunk(self.micro_batches), self.labels.chunk(self.micro_batches), strict=True)
            for images, labels in parts:
                loss = self._loss(model, images, labels) * (len(labels) / len(self.labels))
                hessian_backward(loss if self.scaler is None else self.scaler.scale(loss), along)
        if isinstance(self.model, DistributedDataParallel):
            if self._on_pass is not None:
                self._on_pass(AVERAGING)
            _average([p.grad for p in along if p.grad is not None], self.model.process_group)
        if self._on_pass is not None:
            self._on_pass(UPDATING)

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

    @contextmanager
    def _alike(self, device: torch.device) -> Iterator[None]:
        """Inside, the same random numbers in every pass, and BatchNorm's statistics moved by the first alone."""
        if self._rng is None:
            self._rng = _rng_state(device)
            yield
            return
        _set_rng_state(self._rng, device)
        with frozen_batchnorm(self.model):
            yield

    def _loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            loss: Tensor = self.criterion(model(images), labels)
        return loss

    def _part(
        self, images: Tensor, labels: Tensor, share: float, per_sample: bool, backward: bool, tells: bool
    ) -> Tensor:
        """Forward and backward of a part of the batch, ``share`` of its samples; ``tells`` when backward reduces.

        Returns:
            The part's mean loss times ``share``, or with ``per_sample`` the loss of each of its samples.
        """
        with unreduced(self.criterion) if per_sample else nullcontext():
            losses = self._loss(self.model, images, labels)
        loss = (losses.mean() if per_sample else losses) * share
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


@contextmanager
def frozen_batchnorm(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises with the batch as in training, but its running statistics stand still. Re-entrant.

    `num_batches_tracked` stands still too, unlike with the usual ``momentum = 0``, so that a cumulative average
    (``momentum=None``) is not disturbed either.
    """
    layers = list(batchnorms(model))
    tracked = [layer.track_running_stats for layer in layers]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, value in zip(layers, tracked, strict=True):
            layer.track_running_stats = value


def batchnorms(model: nn.Module) -> Iterable[_BatchNorm]:
    """Every BatchNorm layer (1d, 2d, 3d, Sync) of a model."""
    return (module for module in model.modules() if isinstance(module, _BatchNorm))


@torch.no_grad()
def average_batchnorm(model: nn.Module, world: Distributed) -> None:
    """Give every rank the mean of all ranks' running means and variances, in one collective."""
    buffers = [b for layer in batchnorms(model) for b in (layer.running_mean, layer.running_var) if b is not None]
    average_over_ranks(buffers, world)


def average_over_ranks(tensors: list[Tensor], world: Distributed) -> None:
    """Give every rank the mean of all ranks' tensors, in place and in one collective."""
    if world.world_size > 1:
        _average(tensors, None)


@torch.no_grad()
def _average(tensors: list[Tensor], group: ProcessGroup | None) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for tensor, value in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(value.view(tensor.shape))


def _rng_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda" and not capturing.is_capturing(device):
        states.append(torch.cuda.get_rng_state(device))  # kept on the host: no sync
    return states


def _set_rng_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)

"""How flat the loss is around a run's weights, from time to time: the low-pass filtered loss (Bisla et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.shards import local_shard, shard_of
from lesam_dist.parallel.wrapping import reshard
from lesam_dist.tasks.images.data import Images, build_evaluation_loader
from lesam_dist.train.numerics import numerics
from lesam_dist.train.passes import uncompiled
from lesam_dist.train.randomness import LPF_NOISE, normal, some_of

SEED = 0
"""Of images and noise, whatever the run's own is: the same for all runs, and those that `lesam-dist analyze` takes."""

LabelledBatch = tuple[Tensor, Tensor]


def read_images(config: Config, images: Images, world: Distributed) -> list[LabelledBatch]:
    """This process's part of each batch, on the host; some parts may be empty, not all.

    The images are those of `lesam-dist analyze --samples N`: without augmentation, chosen by `SEED`. A batch is
    ``data.eval_batch_size`` of them over all processes: no number of processes changes which. They are shuffled: the
    gradient of a batch of one class is long, and a noise along it would hide what the curvature adds.

    Args:
        config: the run.
        images: the training images.
        world: this process among all.

    Raises:
        UserError: fewer images than processes, or one that cannot be read.
    """
    samples = config.analysis.samples
    chosen = some_of(len(images), samples, SEED, train=True)
    if len(chosen) < world.world_size:
        raise UserError(
            f"analysis.samples is {samples}, of {len(images)} training images: each of {world.world_size} processes "
            "needs one."
        )
    size = config.data.eval_batch_size
    cuts = range(size, len(chosen), size)
    shuffled = np.random.default_rng([SEED, 1]).permutation(chosen)
    mine = [_share(batch, world) for batch in np.split(shuffled, cuts)]
    if not any(map(len, mine)):
        raise UserError(
            f"data.eval_batch_size is {size}, which is less than one image for each of {world.world_size} processes: "
            "raise it, or leave analysis.every_epochs null."
        )
    world.move("reading the images to measure flatness on")
    own = np.concatenate(mine)
    ascending = np.argsort(own)  # as they lie on the disk
    with torch.random.fork_rng(devices=[]):  # a loader may draw a seed
        loader = build_evaluation_loader(config, images.take(own[ascending]), world.alone())
        try:
            read = [(x.cpu(), y.cpu()) for x, y in loader.epoch(0)]
        finally:
            loader.close()
    places = torch.from_numpy(np.argsort(ascending))
    lengths = [len(batch) for batch in mine]
    pixels, labels = (torch.cat(parts)[places].split(lengths) for parts in zip(*read, strict=True))
    return list(zip(pixels, labels, strict=True))


class Flatness:
    """``(L * K)(w) = E L(w + n)``, ``n ~ N(0, sigma^2 I)`` over all trainable weights, beside L(w) on the same images.

    An unbiased estimate from one forward over the images, with fresh noise for each batch, which is the same at all
    epochs: two forwards in all. It is what `lesam_dist.analysis.lpf_one_pass` finds of the same batches.
    L is the cross entropy in eval mode and float32, without autocast and TF32, whatever the run trains in.

    Weights are perturbed in place, where sharded each shard by its part of one noise, and come back bit for bit.
    Nothing else is touched: BatchNorm's statistics, torch's generators, the model's mode.

    Args:
        model: on the device, in float32; sharded by FSDP2 or not, not wrapped by DDP. The same weights on all ranks.
        batches: from `read_images`.
        world: this process among all; all make one, and call it alike.
        config: of the run.
    """

    def __init__(self, model: nn.Module, batches: Sequence[LabelledBatch], world: Distributed, config: Config) -> None:
        self._model, self._batches, self._world = model, batches, world
        # Found before any forward, after which FSDP2 may leave gathered ones in their place.
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._sigma = config.analysis.lpf_sigma
        self._every, self._epochs = config.analysis.every_epochs, config.epochs
        self._precision = replace(config.precision, tf32=False, cudnn_benchmark=False)

    def is_due(self, epoch: int) -> bool:
        """Whether it is measured after so many epochs."""
        return self._every is not None and (epoch % self._every == 0 or epoch == self._epochs)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """``lpf`` and ``lpf_loss``, which is L(w): equal on all processes; the host waits for the device."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._world.device)  # under noise, without; images
        with self._computing():
            for batch in self._batches:
                sums[1] += self._loss(batch)
                sums[2] += len(batch[1])
            kept = [shard.clone() for shard in self._shards()]
            try:
                for index, batch in enumerate(self._batches):
                    self._perturb(kept, index)
                    sums[0] += self._loss(batch)
            finally:
                self._restore(kept)
        if self._world.world_size > 1:
            dist.all_reduce(sums)
        noisy, loss, samples = sums.tolist()
        return {"lpf": noisy / samples, "lpf_loss": loss / samples}

    def _loss(self, batch: LabelledBatch) -> Tensor:
        """The sum over a part of a batch, which may be empty: a sharded forward is one of all processes."""
        self._world.move("measuring how flat the loss is")
        images, labels = (part.to(self._world.device) for part in batch)
        return F.cross_entropy(self._model(images), labels, reduction="sum").double()

    def _perturb(self, kept: Sequence[Tensor], index: int) -> None:
        """Batch ``index``'s noise on the kept weights. All of it is drawn, so that a shard's does not depend on who
        has which: one float32 vector as long as the weights, on the host."""
        sizes = [p.numel() for p in self._parameters]
        noise = normal(sum(sizes), torch.empty(0), SEED, LPF_NOISE, index).split(sizes)
        for p, part, shard, weights in zip(self._parameters, noise, self._shards(), kept, strict=True):
            shard.copy_(weights).add_(shard_of(part.view(p.shape), p).to(weights), alpha=self._sigma)
        reshard(self._model)

    def _restore(self, kept: Sequence[Tensor]) -> None:
        for shard, weights in zip(self._shards(), kept, strict=True):
            shard.copy_(weights)  # in place: FSDP2 gathers from this memory
        reshard(self._model)

    def _shards(self) -> list[Tensor]:
        return [local_shard(p.detach()) for p in self._parameters]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        modes = {module: module.training for module in self._model.modules()}
        self._model.eval()
        try:
            # Compiled code is for the shapes and formats of training.
            with numerics(self._precision, self._world.device), uncompiled(self._model):
                yield
        finally:
            for module, training in modes.items():
                module.training = training


def _share(batch: NDArray[np.int64], world: Distributed) -> NDArray[np.int64]:
    first, last = (rank * len(batch) // world.world_size for rank in (world.rank, world.rank + 1))
    return batch[first:last]

"""From a config and a machine to what a step, an epoch and a run take on any number of processes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lesam_dist.config.schema import Config
from lesam_dist.data.cifar import DATASETS
from lesam_dist.errors import UserError
from lesam_dist.parallel.blocks import find_blocks
from lesam_dist.parallel.replicas import Sync
from lesam_dist.planning import memory
from lesam_dist.planning.batch import check_batch
from lesam_dist.planning.communication import Call, Layout
from lesam_dist.planning.machine import Machine
from lesam_dist.planning.method import Method, Pass
from lesam_dist.planning.passes import pass_seconds
from lesam_dist.planning.profile import Profile
from lesam_dist.planning.spread import layout_of

_PLAIN = 7  # reads and writes of all parameters in a step of SGD with momentum, as `observe` finds it


@dataclass(frozen=True)
class Prediction:
    """A run on ``processes`` devices; times in seconds, memory in bytes of one device.

    ``compute``, ``exposed`` (what of ``communication`` nothing hides), ``scalars``, ``optimizer`` and ``waiting`` (for
    input) add up to ``step``, an average step of the method. ``epoch`` has the evaluation in it.
    """

    processes: int
    batch: int
    compute: float
    communication: float
    exposed: float
    scalars: float
    optimizer: float
    waiting: float
    memory: dict[str, float]
    calls: float
    sent: float
    decoded: float | None
    epoch: float
    run: float
    price: float | None

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.scalars + self.optimizer + self.waiting

    @property
    def images_per_second(self) -> float:
        """Of each device, in training."""
        return self.batch / self.processes / self.step

    @property
    def needed(self) -> float:
        """Images per second that each device would take if it never waited for them."""
        return self.batch / self.processes / (self.step - self.waiting)

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Case:
    """One network, method and machine, with a config that says how they are put together."""

    config: Config
    profile: Profile
    method: Method
    machine: Machine
    images: tuple[int, int]

    def predict(self, processes: int) -> Prediction:
        """What the run takes on so many devices.

        Raises:
            UserError: for a batch that they do not divide, or that the data is too small for; a mesh that they do not
                fill.
        """
        config, data = self.config, self.config.data
        check_batch(config, processes)
        if data.batch_size > self.images[0]:
            raise UserError(
                f"data.batch_size {data.batch_size} is more than the {self.images[0]} training images: lower it, or "
                "give their number with --images."
            )
        layout = layout_of(config, self.profile, self.machine, processes)
        share = data.batch_size // processes
        kinds = Counter(map(tuple, self.method.steps))  # of hundreds of steps most are the same
        steps = [[n * part for part in self._step(layout, share, made)] for made, n in kinds.items()]
        total = kinds.total()
        compute, communication, exposed, scalars = (sum(column) / total for column in zip(*steps, strict=True))
        optimizer = self.method.traffic * layout.own_bytes / self.machine.bandwidth
        busy = compute + exposed + scalars + optimizer
        decoded = self._decoded()
        waiting = 0.0 if decoded is None else max(share / decoded - busy, 0.0)
        calls = [(self._calls(layout, made), n) for made, n in kinds.items()]
        epoch, run = self._times(layout, share, busy + waiting, decoded)
        hourly = self.machine.hourly
        return Prediction(
            processes,
            data.batch_size,
            compute,
            communication,
            exposed,
            scalars,
            optimizer,
            waiting,
            self._memory(layout, share),
            sum(n * len(own) for own, n in calls) / total,
            sum(n * layout.sent(own) for own, n in calls) / total,
            decoded,
            epoch,
            run,
            None if hourly is None else hourly * processes * run / 3600,
        )

    def _step(self, layout: Layout, share: int, made: Sequence[Pass]) -> tuple[float, float, float, float]:
        """Seconds of arithmetic, of communication, of what of it is exposed, and of the scalars."""
        spans = []
        for p in made:
            kernels = self.profile.at(max(math.ceil(p.share * share) / self.config.data.micro_batches, 1))
            precision = self.config.precision
            seconds_of = partial(pass_seconds, layout, kernels, self.machine, precision, backward=p.backward)
            spans += [seconds_of(sync=sync) for sync in self._syncs(p)]
        scalars = sum(self.machine.seconds(c, layout) for c in layout.of_scalars([p.sync for p in made if p.backward]))
        compute, communication, exposed = (sum(column) for column in zip(*spans, strict=True))
        return compute, communication, exposed, scalars

    def _syncs(self, made: Pass) -> list[Sync]:
        """Over whom the gradients of each micro-batch of a pass are reduced."""
        data = self.config.data
        others = made.sync if data.accumulation_mode == "micro" else False
        return [*[others] * (data.micro_batches - 1), made.sync]

    def _calls(self, layout: Layout, made: Sequence[Pass]) -> list[Call]:
        """The collectives of a step."""
        backward = [p for p in made if p.backward]
        passes = [call for p in backward for sync in self._syncs(p) for call in layout.of_pass(sync)]
        return [*passes, *layout.of_scalars([p.sync for p in backward])]

    def _memory(self, layout: Layout, share: int) -> dict[str, float]:
        config, model = self.config, self.profile.model
        network = memory.network_of(model, find_blocks(model, config.parallel.wrap_classes))
        kind: memory.Strategy = "fsdp" if layout.shard > 1 else "ddp" if layout.processes > 1 else "none"
        found = memory.predict(network, kind, "sgd", layout.shard, 0, layout.itemsize)
        own = found.parameters
        images = share / config.data.micro_batches
        # To differentiate a gradient, its backward's graph is kept beside the forward's: 0.9 to 1.0 times as much in
        # ResNet-18 and a transformer.
        kept = self.profile.at(images).kept * (2 if self.method.twice else 1)
        parts = {
            "parameters": float(found.parameters),
            "gradients": float(found.gradients),
            "copies": float(found.copies) if self.method.copies else 0.0,
            "state": self.method.state * own,
            "transient": float(found.transient),
            "activations": max(kept, 0.0) + 12.0 * images * config.data.image_size**2,
        }
        if config.ema.is_on:
            parts["average"] = float(own) * (2 + config.ema.swad_converge if config.ema.swad else 1)
        if self.machine.device.backend == "nccl":
            parts["reserved"] = self.machine.shares.reserved
        return parts

    def _decoded(self) -> float | None:
        """Images per second that the CPU gives each device."""
        if self.machine.decode_rate is None or self.config.data.builtin in DATASETS:
            return None
        return self.machine.decode_rate * min(self.machine.cores, self.config.data.workers)

    def _times(self, layout: Layout, share: int, step: float, decoded: float | None) -> tuple[float, float]:
        """Seconds of an epoch with its evaluation, while the method is at work, and of the run."""
        config, (train, val) = self.config, self.images
        plain = self._step(layout, share, [Pass(1.0, True, True)])
        alone = plain[0] + plain[2] + plain[3] + _PLAIN * layout.own_bytes / self.machine.bandwidth
        alone = alone if decoded is None else max(alone, share / decoded)
        steps = train // config.data.batch_size
        images = math.ceil(val / layout.processes)
        kernels = self.profile.at(min(images, config.data.eval_batch_size))
        forward = float(self.machine.clock(kernels, config.precision)[kernels.forward])
        evaluation = math.ceil(images / config.data.eval_batch_size) * forward
        evaluation = evaluation if decoded is None else max(evaluation, images / decoded)
        optimizer, epochs = config.optimizer, float(config.epochs)
        stop = epochs if optimizer.stop_epoch is None else min(optimizer.stop_epoch, epochs)
        active = max(stop - min(optimizer.start_epoch, stop), 0.0)
        run = steps * (active * step + (epochs - active) * alone) + epochs * evaluation
        return steps * step + evaluation, run

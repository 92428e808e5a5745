"""What a method does in a step, whichever it is: its passes, and its own traffic and memory. Observed, not listed.

The optimizer of the config makes a few steps on a small network in this process, on the reference backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lesam_dist.config.methods import PLAIN, complete
from lesam_dist.config.schema import Config, OptimizerConfig
from lesam_dist.optim.engine.products import COST, NotTwiceDifferentiableError
from lesam_dist.parallel.replicas import Sync
from lesam_dist.planning.profile import Recorder
from lesam_dist.train.build import build_optimizer
from lesam_dist.train.passes import BatchPasses

_T = TypeVar("_T")
_BATCH = 120
_SHORT = 10  # a longer interval is observed as this, and stretched: its other steps are all alike
_LONGEST = 1000  # steps of a period: beyond, what is done once in it is a thousandth
_LARGE = 256  # elements: what touches fewer is a scalar's arithmetic


class Pass(NamedTuple):
    """A call of the closure: its share of the batch, whether it goes backward, over whom gradients are reduced."""

    share: float
    backward: bool
    sync: Sync


class Method(NamedTuple):
    """A method's average step.

    Attributes:
        steps: the passes of each step of a period.
        traffic: reads and writes of all parameters, outside of the passes.
        state: tensors of a parameter's size in the optimizer's state, the base optimizer's included.
        copies: whether there is a copy of the weights.
        twice: whether it differentiates twice, for products with the Hessian.
    """

    steps: list[list[Pass]]
    traffic: float
    state: float
    copies: bool
    twice: bool = False

    @property
    def passes(self) -> float:
        """Forward and backward passes over the whole batch in an average step; a forward pass alone is a third.

        A product with the Hessian is made of as many as it costs.
        """
        made = [p.share * (1 if p.backward else 1 / 3) for step in self.steps for p in step]
        return sum(made) / len(self.steps)


def observe_run(config: Config) -> Method:
    """`observe` the method of a run."""
    return observe(config.optimizer, config.parallel.is_sharded)


def observe(config: OptimizerConfig, is_sharded: bool = False) -> Method:
    """The method that a config names, as it works between ``start_epoch`` and ``stop_epoch``.

    Args:
        config: of the method.
        is_sharded: whether the weights are, so that no gradient can be differentiated.

    Raises:
        UserError: for hyper-parameters that the method refuses.
    """
    config, period, block, whole = _shortened(replace(config, backend="reference"))
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(24, 64), nn.LayerNorm(64), nn.Linear(64, 24))
        optimizer = build_optimizer(model, config)
        images, labels = torch.randn(_BATCH, 24), torch.randint(24, (_BATCH,))
        steps, traffic, twice = [], [], False
        recorder = Recorder(least=_LARGE)
        for _ in range(2 * period):  # the first period may differ: there is no memory yet
            closure = _Observed(model, nn.CrossEntropyLoss(), images, labels)
            closure.recorder, closure.is_sharded = recorder, is_sharded
            recorder.nbytes.clear()
            with recorder:
                optimizer.step(closure)
            steps.append(closure.made)
            twice |= closure.twice
            traffic.append(sum(recorder.nbytes))
        kept = [t for own in optimizer.state_dict()["state"].values() for t in own.values() if isinstance(t, Tensor)]
        state = sum(t.numel() for t in kept if t.numel() > 1)
        total = sum(p.numel() for p in model.parameters())
        made, nbytes = (_stretched(each[period:], block, whole) for each in (steps, traffic))
        moved = sum(nbytes) / (4 * total * whole)
        return Method(made, round(moved, 1), round(state / total, 1), config.name not in PLAIN, twice)


def _shortened(config: OptimizerConfig) -> tuple[OptimizerConfig, int, int, int]:
    """A config with short intervals; its period, the steps at its beginning that differ, and the period meant."""
    interval, ascent = int(complete(config).get("interval", 1)), min(config.ascent_interval, _LONGEST)
    whole = max(min(interval * ascent, _LONGEST), ascent)
    if interval == 1:
        short = min(ascent, _SHORT)
        return replace(config, ascent_interval=short), short, 1, whole
    short = min(interval, _SHORT, max(2, _LONGEST // ascent))
    config = replace(config, args={**config.args, "interval": short}, ascent_interval=ascent)
    return config, short * ascent, ascent, max(whole, short * ascent)


def _stretched(steps: list[_T], block: int, length: int) -> list[_T]:
    """A period of that many steps: the first ones as they are, then the others again and again."""
    others = steps[block:]
    return steps[:block] + [others[i % len(others)] for i in range(length - block)]


class _Observed(BatchPasses):
    recorder: Recorder
    is_sharded = twice = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.made: list[Pass] = []

    def __call__(self, **kwargs: Any) -> Tensor:
        subset = kwargs.get("subset")
        share = kwargs.get("fraction", 1.0) if subset is None else len(subset) / len(self.labels)
        self.made.append(Pass(share, kwargs.get("backward", True), kwargs.pop("sync", True)))
        self.recorder.paused = True
        try:
            return super().__call__(**kwargs)
        finally:
            self.recorder.paused = False

    def hessian_product(self, along: Mapping[Tensor, Tensor]) -> None:
        if self.is_sharded:
            raise NotTwiceDifferentiableError("the model is sharded.")
        self.twice = True
        self.made += [Pass(1.0, True, False)] * (COST - 1) + [Pass(1.0, True, True)]  # it is reduced once
        self.recorder.paused = True
        try:
            super().hessian_product(along)
        finally:
            self.recorder.paused = False

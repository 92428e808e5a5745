"""From a config to the parts of a run: the network as it is computed, the optimizer, the schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lesam_dist.config.methods import OF_BASE, PLAIN, method_of
from lesam_dist.config.schema import Config, EmaConfig, OptimizerConfig
from lesam_dist.errors import UserError
from lesam_dist.optim import LAMB, LARS, CosineBudget, SharpnessAware
from lesam_dist.optim.engine.backend import require_interpreter
from lesam_dist.optim.plain import Plain
from lesam_dist.parallel.batchnorm import synchronized
from lesam_dist.parallel.blocks import compile_in_place, find_blocks, recompute_in_backward
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.network import new_network
from lesam_dist.tasks.task import Task
from lesam_dist.train.ema import WeightAverage
from lesam_dist.train.methods import method_arguments, param_groups
from lesam_dist.train.swad import ValleyAverage

_BASES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lars": LARS, "lamb": LAMB}


def build_network(config: Config, num_classes: int, world: Distributed) -> nn.Module:
    """The config's network for images of so many classes, as `build_model` gives it."""
    torch.manual_seed(config.seed)
    return _placed(new_network(config, num_classes, world), config, world)


def build_model(task: Task) -> nn.Module:
    """The task's network, equal on every rank (seeded), on this process's device, and as it is computed; not wrapped
    yet."""
    torch.manual_seed(task.config.seed)
    return _placed(task.build_model(), task.config, task.world)


def _placed(model: nn.Module, config: Config, world: Distributed) -> nn.Module:
    sharded = world.world_size > 1 and config.parallel.is_sharded  # which takes no other weights
    last = config.precision.channels_last and not sharded
    memory_format = torch.channels_last if last else torch.preserve_format
    model.to(world.device, memory_format=memory_format)  # type: ignore[call-overload]
    if config.parallel.sync_batchnorm:
        model = synchronized(model, world)
    if config.precision.weights == "bf16":
        _to_bfloat16(model)
    find_blocks(model, config.parallel.wrap_classes)  # an unknown class is refused on one process as on many
    if config.model.activation_checkpointing:
        recompute_in_backward(model, config.parallel.wrap_classes)
    if config.model.compile:
        whole = world.world_size == 1 or config.parallel.strategy == "ddp"
        compile_in_place(model, whole, config.parallel.wrap_classes)
    return model


def _to_bfloat16(model: nn.Module) -> None:
    """All parameters but BatchNorm's, whose running statistics would hardly move in bfloat16."""
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            for p in module.parameters(recurse=False):
                p.data = p.data.bfloat16()


def check_optimizer(config: OptimizerConfig, device: torch.device) -> None:
    """Refuse hyper-parameters that the method does, on two layers, before anything is read or written.

    Raises:
        UserError: for a value out of range, or a backend that does not run on this device.
    """
    build_optimizer(nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1)), config)
    if config.backend == "triton" and device.type != "cuda":
        try:
            require_interpreter(device)
        except RuntimeError as error:
            raise UserError(f"optimizer.backend is triton: {error}") from error


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> SharpnessAware:
    """The optimizer that the config names, over the model's parameters."""
    base = config.name if config.name in PLAIN else config.base
    cls = _BASES[base]
    own = {name: getattr(config, name) for name in OF_BASE[base]}
    kwargs: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, **own}
    groups = param_groups(model, config)
    try:
        if method := method_of(config.name):
            build: Any = method.load()
            optimizer: SharpnessAware = build(groups, cls, **method_arguments(config), **kwargs)
            return optimizer
        return Plain(groups, cls, backend=config.backend, max_grad_norm=config.max_grad_norm, **kwargs)
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from error


def build_average(model: nn.Module, config: EmaConfig) -> WeightAverage | None:
    """The average that the config names, if any; of a model that is wrapped already."""
    if config.swad:
        return ValleyAverage(model, config.swad_converge, config.swad_tolerance, config.swad_tolerance_ratio)
    return WeightAverage(model, config.decay, uniform_from=config.uniform_from) if config.is_on else None


def build_schedules(config: Config, optimizer: Optimizer, steps_per_epoch: int) -> tuple[LambdaLR, CosineBudget | None]:
    """The learning rate's schedule and, for LE-SAM, the loss budget's; both are stepped after every update."""
    schedule = config.schedule
    total = config.epochs * steps_per_epoch
    warmup = round(schedule.lr_warmup_epochs * steps_per_epoch)
    rate = LambdaLR(optimizer, warmup_cosine(total, warmup, constant=schedule.lr_decay == "none"))
    method = method_of(config.optimizer.name)
    if method is None or not method.registration.budget:
        return rate, None
    start = config.epochs if schedule.anneal_start_epoch is None else schedule.anneal_start_epoch
    anneal = total - round(start * steps_per_epoch)
    return rate, CosineBudget(optimizer, total, anneal, round(schedule.sigma_warmup_epochs * steps_per_epoch))


def warmup_cosine(total: int, warmup: int, *, constant: bool = False) -> Callable[[int], float]:
    """Factor of the peak learning rate: linear over ``warmup`` steps to 1, then a cosine to 0 at step ``total``, or, if
    ``constant``, 1."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if constant:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor

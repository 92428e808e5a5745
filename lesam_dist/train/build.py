"""From a config to the parts of a run: data, model, loss, optimizer, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lesam_dist.data import ImageFolder, Loader, SyntheticLoader, Transform, build_loader, scan_split
from lesam_dist.errors import UserError
from lesam_dist.models import build_model
from lesam_dist.optim import LESAM, SAM, CosineBudget
from lesam_dist.optim.shared import fused_if_possible
from lesam_dist.parallel import Distributed
from lesam_dist.train.config import Config, OptimizerConfig

_DRY_BATCHES = 2


def build_folders(config: Config, here: Distributed) -> tuple[ImageFolder, ImageFolder]:
    """The training and validation images; writes a built-in data set first where it is missing.

    Raises:
        UserError: for a data root that is missing, or not a class-folder data set.
    """
    if config.data.root is None:
        raise UserError(
            "data.root is not set: give the folder that holds train/ and val/ with --data.root DIR, or try the recipe "
            "on random images with --dry_run."
        )
    root = Path(config.data.root)
    if config.data.builtin == "digits":
        from lesam_dist.data.digits import prepare_digits

        if here.is_main:
            prepare_digits(root)
        here.barrier()
    train = scan_split(root, "train")
    return train, scan_split(root, "val", train.classes)


def build_loaders(config: Config, folders: tuple[ImageFolder, ImageFolder], here: Distributed) -> tuple[Loader, Loader]:
    """Loaders of the training and the validation images for this process."""
    data = config.data
    common: dict[str, Any] = {
        "backend": data.backend,
        "transform": Transform(
            image_size=data.image_size,
            val_resize=data.val_resize,
            random_area=data.random_area,
            random_aspect_ratio=data.random_aspect_ratio,
            horizontal_flip=data.horizontal_flip,
            mean=data.mean,
            std=data.std,
        ),
        "seed": config.seed,
        "rank": here.rank,
        "world_size": here.world_size,
        "device": here.device,
        "workers": data.workers,
    }
    train = build_loader(folders[0], train=True, batch_size=data.batch_size, **common)
    share = data.batch_size // here.world_size
    if share % data.micro_batches:
        raise UserError(
            f"data.micro_batches {data.micro_batches} does not divide the {share} images that each process takes of a "
            f"batch of {data.batch_size}: choose a divisor."
        )
    return train, build_loader(folders[1], train=False, batch_size=data.eval_batch_size, **common)


def build_synthetic_loaders(config: Config, num_classes: int, here: Distributed) -> tuple[Loader, Loader]:
    """Two batches of random images in the shapes of the config, for a dry run."""

    def loader(batch_size: int, seed: int) -> Loader:
        return SyntheticLoader(
            num_classes=num_classes,
            image_size=config.data.image_size,
            batch_size=batch_size,
            batches=_DRY_BATCHES,
            seed=seed,
            rank=here.rank,
            device=here.device,
        )

    per_rank = max(1, config.data.batch_size // here.world_size)
    return loader(per_rank, config.seed), loader(per_rank, config.seed + 1)


def resolve_num_classes(config: Config, classes: tuple[str, ...] | None) -> int:
    """The size of the model's last layer.

    Raises:
        UserError: for more classes in the data than the model has.
    """
    wanted = config.model.num_classes
    if classes is None:
        return wanted or 1000
    if wanted is None:
        return len(classes)
    if len(classes) > wanted:
        raise UserError(
            f"the data in {config.data.root} has {len(classes)} classes but model.num_classes is {wanted}: raise it, "
            "or leave it null to take the number from the data."
        )
    return wanted


def build_network(config: Config, num_classes: int, here: Distributed) -> nn.Module:
    """The model on this process's device, equal on every rank (seeded)."""
    torch.manual_seed(config.seed)
    model = build_model(
        config.model.name,
        num_classes,
        image_size=config.data.image_size,
        zero_init_residual=config.model.zero_init_residual,
    )
    memory_format = torch.channels_last if config.precision.channels_last else torch.preserve_format
    return model.to(here.device, memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that the config names, over the model's parameters."""
    base = config.name if config.name in ("sgd", "adamw") else config.base
    kwargs: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if base == "sgd":
        kwargs |= {"momentum": config.momentum, "nesterov": config.nesterov}
    else:
        kwargs |= {"betas": config.betas}
    cls = torch.optim.SGD if base == "sgd" else torch.optim.AdamW
    groups = _param_groups(model, config)
    if config.name == "lesam":
        return LESAM(
            groups,
            cls,
            sigma=config.sigma,
            rho_max=config.rho_max,
            eps=config.eps,
            alpha=config.alpha,
            plus_form=config.plus_form,
            backend=config.backend,
            scope=config.scope,
            **kwargs,
        )
    if config.name == "sam":
        return SAM(groups, cls, rho=config.rho, backend=config.backend, scope=config.scope, **kwargs)
    return cls(groups, **(kwargs | fused_if_possible(cls, groups)))


def build_schedules(config: Config, optimizer: Optimizer, steps_per_epoch: int) -> tuple[LambdaLR, CosineBudget | None]:
    """The learning rate's schedule and, for LE-SAM, the loss budget's; both are stepped after every update."""
    schedule = config.schedule
    total = config.epochs * steps_per_epoch
    warmup = round(schedule.lr_warmup_epochs * steps_per_epoch)
    rate = LambdaLR(optimizer, warmup_cosine(total, warmup))
    if config.optimizer.name != "lesam":
        return rate, None
    start = config.epochs if schedule.anneal_start_epoch is None else schedule.anneal_start_epoch
    anneal = total - round(start * steps_per_epoch)
    return rate, CosineBudget(optimizer, total, anneal, round(schedule.sigma_warmup_epochs * steps_per_epoch))


def warmup_cosine(total: int, warmup: int) -> Callable[[int], float]:
    """Factor of the peak learning rate: linear over ``warmup`` steps to 1, then a cosine to 0 at step ``total``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def _param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    params = [p for p in model.parameters() if p.requires_grad]
    if config.decay_norm_and_bias:
        return [{"params": params}]
    # The field's rule: vectors are biases and normalisation weights.
    return [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]

"""From a config to the parts of a run: data, model, loss, optimizer, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lesam_dist.config.methods import OF_BASE, PLAIN, complete, method_of
from lesam_dist.config.schema import CIFAR_ONLY, DALI_ONLY, FOLDERS_ONLY, Config, DataConfig, OptimizerConfig
from lesam_dist.data import ImageFolder, Loader, SyntheticLoader, Transform, build_loader
from lesam_dist.data.bad_files import BadFiles
from lesam_dist.data.cifar import DATASETS, CifarLoader, CifarSplit, load_cifar, prepare_cifar
from lesam_dist.data.cifar_transform import CifarTransform
from lesam_dist.data.dali_options import DaliOptions
from lesam_dist.data.folder import remarks
from lesam_dist.data.label_noise import with_label_noise
from lesam_dist.data.opening import data_root, open_splits
from lesam_dist.data.replay import ReplayLoader
from lesam_dist.data.scans import Scans, holds, prepare
from lesam_dist.data.skip_list import read_skip_list
from lesam_dist.data.urls import Url
from lesam_dist.errors import UserError
from lesam_dist.models import build_model, fetch_weights, require_input
from lesam_dist.optim import LAMB, LARS, CosineBudget, SharpnessAware
from lesam_dist.optim.engine.backend import require_interpreter
from lesam_dist.optim.plain import Plain
from lesam_dist.parallel.batchnorm import synchronized
from lesam_dist.parallel.blocks import compile_in_place, find_blocks, recompute_in_backward
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.methods import method_arguments, param_groups
from lesam_dist.train.mixing import require_pairs

_DRY_BATCHES = 2
_DRY_CLASSES = {"cifar100": 100, None: 1000}  # as the data has them; the others have 10
_BASES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lars": LARS, "lamb": LAMB}
Images = ImageFolder | CifarSplit


def build_folders(config: Config, world: Distributed) -> tuple[Images, Images]:
    """The training images, with the labels that the run trains on, and the validation images.

    A built-in data set is written first where it is missing.

    Raises:
        UserError: for a data root that is missing, or holds something else than the data set; for a single class; for
            labels that cannot be read.
    """
    train, val = _open_data(config, world)
    noise = config.data.label_noise
    if noise.kind is None:
        return train, val
    noisy = with_label_noise(train, seed=config.seed, **asdict(noise))
    if world.is_main:
        changed = int((noisy.labels != train.labels).sum())
        which = noise.labels if noise.kind == "human" else f"rate {noise.rate:g}"
        print(
            f"data.label_noise: {changed:,} of {len(train):,} training labels are changed ({noise.kind}, {which})",
            flush=True,
        )
    return noisy, val


def _open_data(config: Config, world: Distributed) -> tuple[Images, Images]:
    _loader(config)  # whose transform is checked, before anything is downloaded
    builtin = config.data.builtin
    if config.data.root is None:
        content = "train/ and val/" if builtin is None else f"{builtin}, or should"
        raise UserError(
            f"data.root is not set: give the folder that holds {content} with --data.root DIR, or try the recipe on "
            "random images with --dry_run."
        )
    source = data_root(config.data.root)
    if builtin is not None and isinstance(source, Url):
        raise UserError(f"data.root is '{source}' but data.builtin is {builtin}, which is kept in a folder: give one.")
    root = Path(config.data.root)
    if builtin in DATASETS:
        if all((root / split).is_dir() for split in ("train", "val")):
            raise UserError(
                f"data.root '{root}' holds train/ and val/, but data.builtin is {builtin}, which does not read them: "
                "choose another folder for it, or train on these images with a recipe of class folders."
            )
        if world.is_main:
            prepare_cifar(builtin, root)
        world.barrier()
        return load_cifar(builtin, root)
    if builtin is not None:
        scans, noisy = _scans(builtin), builtin.endswith("_noisy")
        if world.is_main and not holds(scans, root, noisy=noisy):
            prepare(scans, root, noisy=noisy)
            print(f"data.builtin {builtin}: wrote {scans.source} to data.root '{root}'", flush=True)
        world.barrier()
    return _open_images(config, source, world)


def _scans(builtin: str) -> Scans:
    if builtin.startswith("mnist5k"):
        from lesam_dist.data.mnist5k import MNIST5K

        return MNIST5K
    from lesam_dist.data.digits import DIGITS

    return DIGITS


def _open_images(config: Config, source: Path | Url, world: Distributed) -> tuple[ImageFolder, ImageFolder]:
    """Class folders or packed shards; the first process of each node checks them before the others look."""
    if world.local_rank == 0:
        train, val = open_splits(source, first=True)
    world.barrier()
    if world.local_rank != 0:
        train, val = open_splits(source, first=False)
    if train.shards is None and config.data.order == "sequential":
        raise UserError(
            f"data.order is sequential but data.root '{source}' holds files, which have no order to be read in: pack "
            "them with `lesam-dist pack`, or choose random."
        )
    if len(train.classes) == 1:
        raise UserError(
            f"'{source / 'train'}' has a single class folder, '{train.classes[0]}': there is nothing to tell apart. "
            "Put the images of each class into a folder of their own."
        )
    file = config.data.skip_list
    skip = read_skip_list(Path(file)) if file else frozenset[str]()
    train, val = train.without(skip, "train"), val.without(skip, "val")
    if world.is_main:
        if file:
            print(f"data.skip_list leaves out {train.skipped} training and {val.skipped} validation images", flush=True)
        for remark in remarks(train, val):
            print(f"warning: {remark}", flush=True)
    return train, val


def build_bad_files(config: Config, folders: tuple[Images, Images], world: Distributed) -> BadFiles | None:
    """Where this process keeps the training images that cannot be decoded; None for CIFAR, which has no files."""
    if not isinstance(folders[0], ImageFolder):
        return None
    return BadFiles(
        Path(config.run_dir) / "bad_files",
        folders[0].root,
        rank=world.rank,
        world_size=world.world_size,
        limit=config.data.max_bad_files,
    )


def build_loaders(
    config: Config, folders: tuple[Images, Images], world: Distributed, bad_files: BadFiles | None = None
) -> tuple[Loader, Loader]:
    """Loaders of the training and the validation images for this process.

    Args:
        bad_files: of `build_bad_files`; without it a training image that cannot be decoded is an error.
    """
    data = config.data
    own: dict[str, Any] = {} if bad_files is None else {"bad_files": bad_files}
    train = _loader_here(config, world)(folders[0], train=True, batch_size=data.batch_size, **own)
    share = data.batch_size // world.world_size
    if share % data.micro_batches:
        raise UserError(
            f"data.micro_batches {data.micro_batches} does not divide the {share} images that each process takes of a "
            f"batch of {data.batch_size}: choose a divisor."
        )
    require_pairs(config, world)
    return _replayed(train, data), build_evaluation_loader(config, folders[1], world)


def build_evaluation_loader(config: Config, images: Images, world: Distributed) -> Loader:
    """A loader of this process's share of any images, each once and as evaluation sees it, without augmentation."""
    return _loader_here(config, world)(images, train=False, batch_size=config.data.eval_batch_size)


def _loader_here(config: Config, world: Distributed) -> Callable[..., Loader]:
    place: dict[str, Any] = {"seed": config.seed, "rank": world.rank, "world_size": world.world_size}
    return partial(_loader(config), **place, repeats=config.data.repeats, device=world.device)


def _replayed(train: Loader, data: DataConfig) -> Loader:
    return ReplayLoader(train) if data.replay else train


def _loader(config: Config) -> Callable[..., Loader]:
    """`CifarLoader` or `build_loader` with its own part of the config."""
    data, sizes = config.data, config.schedule.image_size

    def named(*names: str) -> dict[str, Any]:
        return {name: getattr(data, name) for name in names}

    common = named("image_size", "horizontal_flip", "mean", "std")
    if data.builtin in DATASETS:
        own = named(*CIFAR_ONLY)
        return partial(CifarLoader, transform=CifarTransform(**common, **own))
    own = named("val_resize", *FOLDERS_ONLY) | {"sizes": None if sizes is None else tuple(map(tuple, sizes))}
    transform = Transform(**common, **own)
    dali = {name.removeprefix("dali_"): value for name, value in named(*DALI_ONLY).items()}
    own = {
        **named("backend", "workers"),
        "window": data.shuffle_window if data.order == "sequential" else None,
        "dali": DaliOptions(**dali, channels_last=config.precision.channels_last),
    }
    return partial(build_loader, transform=transform, **own)


def build_synthetic_loaders(config: Config, num_classes: int, world: Distributed) -> tuple[Loader, Loader]:
    """Two batches of random images in the shapes of the config, for a dry run."""

    def loader(batch_size: int, seed: int) -> Loader:
        return SyntheticLoader(
            num_classes=num_classes,
            image_size=config.data.image_size,
            batch_size=batch_size,
            batches=_DRY_BATCHES,
            seed=seed,
            rank=world.rank,
            device=world.device,
        )

    require_pairs(config, world)
    per_rank = max(1, config.data.batch_size // world.world_size)
    return _replayed(loader(per_rank, config.seed), config.data), loader(per_rank, config.seed + 1)


def resolve_num_classes(config: Config, classes: tuple[str, ...] | None) -> int:
    """The size of the model's last layer; ``classes`` is None in a dry run, which reads no data.

    Raises:
        UserError: for more classes in the data than the model has.
    """
    wanted = config.model.num_classes
    if classes is None:
        return wanted or _DRY_CLASSES.get(config.data.builtin, 10)
    if wanted is None:
        return len(classes)
    if len(classes) > wanted:
        raise UserError(
            f"the data in {config.data.root} has {len(classes)} classes but model.num_classes is {wanted}: raise it, "
            "or leave it null to take the number from the data."
        )
    return wanted


def build_network(config: Config, num_classes: int, world: Distributed) -> nn.Module:
    """The model on this process's device, equal on every rank (seeded), and as it is computed; not wrapped yet."""
    pretrained = config.model.pretrained and not config.dry_run
    if pretrained:
        if world.local_rank == 0:
            fetch_weights(config.model.name)
        world.barrier()
    torch.manual_seed(config.seed)
    model = build_model(
        config.model.name,
        num_classes,
        image_size=config.data.image_size,
        zero_init_residual=config.model.zero_init_residual,
        pretrained=pretrained,
        drop_path=config.model.drop_path,
    )
    for field, side in _sides(config):
        require_input(model, config.model.name, _smallest_part(config, world), side, field)
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


def _sides(config: Config) -> Iterator[tuple[str, int]]:
    """The sides of images that the model meets, in pixels, each with the field that says so."""
    by_epoch = config.schedule.image_size
    if by_epoch is None or config.data.val_crop is None:
        yield "data.image_size", config.data.image_size
    if config.data.val_crop is not None:
        yield "data.val_crop", config.data.val_crop
    for _, side in by_epoch or ():
        yield "schedule.image_size", side


def _smallest_part(config: Config, world: Distributed) -> int:
    """Images of the smallest forward in training on a process."""
    optimizer = config.optimizer
    method = method_of(optimizer.name)
    fraction = optimizer.ascent_fraction
    if method is not None and method.name == "esam":
        fraction = complete(optimizer).get("gamma", 1.0)
    share = config.data.batch_size // world.world_size
    return max(1, int(fraction * share) // config.data.micro_batches)


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


def build_schedules(config: Config, optimizer: Optimizer, steps_per_epoch: int) -> tuple[LambdaLR, CosineBudget | None]:
    """The learning rate's schedule and, for LE-SAM, the loss budget's; both are stepped after every update."""
    schedule = config.schedule
    total = config.epochs * steps_per_epoch
    warmup = round(schedule.lr_warmup_epochs * steps_per_epoch)
    rate = LambdaLR(optimizer, warmup_cosine(total, warmup))
    method = method_of(config.optimizer.name)
    if method is None or not method.registration.budget:
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

"""The images of a run: found, checked, and read in batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lesam_dist.config.schema import CIFAR_ONLY, DALI_ONLY, FOLDERS_ONLY, Config
from lesam_dist.data import ImageFolder, Loader, SyntheticLoader, Transform, build_loader
from lesam_dist.data.bad_files import BadFiles
from lesam_dist.data.cifar import DATASETS, CifarLoader, CifarSplit, load_cifar, prepare_cifar
from lesam_dist.data.cifar_transform import CifarTransform
from lesam_dist.data.cycles import Cycles
from lesam_dist.data.dali_options import DaliOptions
from lesam_dist.data.folder import remarks
from lesam_dist.data.label_noise import with_label_noise
from lesam_dist.data.opening import data_root, open_splits
from lesam_dist.data.scans import Scans, holds, prepare
from lesam_dist.data.skip_list import read_skip_list
from lesam_dist.data.urls import Url
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.mixing import require_pairs

_COMMON = ("image_size", "horizontal_flip", "mean", "std")  # of all transforms
_DRY_BATCHES = 2
_DRY_CLASSES = {"cifar100": 100, None: 1000}  # as the data has them; the others have 10
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
    config: Config,
    folders: tuple[Images, Images],
    world: Distributed,
    bad_files: BadFiles | None = None,
    cycles: Cycles | None = None,
) -> tuple[Loader, Loader]:
    """Loaders of the training and the validation images for this process.

    Args:
        bad_files: of `build_bad_files`; without it a training image that cannot be decoded is an error.
        cycles: how domains are sampled in training; None: all images once in an epoch.
    """
    data = config.data
    own: dict[str, Any] = {} if bad_files is None else {"bad_files": bad_files}
    if cycles is not None:
        own["cycles"] = cycles
    train = _loader_here(config, world)(folders[0], train=True, batch_size=data.batch_size, **own)
    require_pairs(config, world)
    return train, build_evaluation_loader(config, folders[1], world)


def build_evaluation_loader(config: Config, images: Images, world: Distributed) -> Loader:
    """A loader of this process's share of any images, each once and as evaluation sees it, without augmentation."""
    return _loader_here(config, world)(images, train=False, batch_size=config.data.eval_batch_size)


def _loader_here(config: Config, world: Distributed) -> Callable[..., Loader]:
    place: dict[str, Any] = {"seed": config.seed, "rank": world.rank, "world_size": world.world_size}
    return partial(_loader(config), **place, repeats=config.data.repeats, device=world.device)


def _loader(config: Config) -> Callable[..., Loader]:
    """`CifarLoader` or `build_loader` with its own part of the config."""
    if config.on_device:
        return partial(CifarLoader, transform=device_transform(config))
    data = config.data
    transform = folder_transform(config)
    dali = {name.removeprefix("dali_"): getattr(data, name) for name in DALI_ONLY}
    own: dict[str, Any] = {
        "backend": data.backend,
        "workers": data.workers,
        "window": data.shuffle_window if data.order == "sequential" else None,
        "dali": DaliOptions(**dali, channels_last=config.precision.channels_last),
    }
    return partial(build_loader, transform=transform, **own)


def folder_transform(config: Config) -> Transform:
    """What is done to images of class folders, in training and in evaluation."""
    data, sizes = config.data, config.schedule.image_size
    own = {name: getattr(data, name) for name in (*_COMMON, "val_resize", *FOLDERS_ONLY)}
    return Transform(**own, sizes=None if sizes is None else tuple((epoch, side) for epoch, side in sizes))


def device_transform(config: Config) -> CifarTransform:
    """What is done to batches of images that stay on the device."""
    return CifarTransform(**{name: getattr(config.data, name) for name in (*_COMMON, *CIFAR_ONLY)})


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
    return loader(per_rank, config.seed), loader(per_rank, config.seed + 1)


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

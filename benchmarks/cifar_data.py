"""How fast CIFAR's training batches come: this library's loader against torchvision's dataset in a DataLoader.

    python benchmarks/cifar_data.py [--workers 0,2] [--images 10000]

Random images in memory; both crop from 4 pixels of padding, flip and normalise, and deliver float32 batches on the
device. This library takes one thread of this process, so one core; torchvision one core without workers, and as many
cores as it has worker processes. All are timed over whole epochs, in turns, the first epoch of each left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lib.arguments import Parser
from lib.report import Report, Result, number, percentiles, table
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10, VisionDataset

from lesam_dist.data.cifar import CifarLoader, CifarSplit
from lesam_dist.data.cifar_transform import CifarTransform

TARGET = 10.0
"""Images per second and core, as a multiple of torchvision's."""

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Epoch = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


class InMemory(CIFAR10):
    """torchvision's dataset, with images that no file has."""

    def __init__(self, split: CifarSplit, transform: Callable[[Any], Tensor]) -> None:
        VisionDataset.__init__(self, "", transform=transform)
        self.data, self.targets = split.images.transpose(0, 2, 3, 1).copy(), split.labels.tolist()


def torchvision_epochs(split: CifarSplit, batch: int, workers: int, device: torch.device) -> Epoch:
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    dataset = InMemory(split, transforms.Compose([*steps, transforms.Normalize(_MEAN, _STD)]))
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    return lambda _: ((x.to(device, non_blocking=True), y.to(device, non_blocking=True)) for x, y in loader)


def our_epochs(split: CifarSplit, batch: int, device: torch.device) -> Epoch:
    transform = CifarTransform(mean=_MEAN, std=_STD)
    loader = CifarLoader(
        split, transform=transform, train=True, batch_size=batch, seed=0, rank=0, world_size=1, device=device
    )
    return loader.epoch


def seconds(epoch: Epoch, index: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in epoch(index):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(args: argparse.Namespace) -> list[Result]:
    """Ours first; ``ours_is`` is its rate per core as a multiple of each other's."""
    device, rng = torch.device(args.device), np.random.default_rng(args.seed)
    images = rng.integers(0, 256, (args.images, 3, 32, 32), dtype=np.uint8)
    split = CifarSplit(Path("random"), tuple("0123456789"), images, rng.integers(0, 10, args.images))
    results: list[Result] = [{"provider": "lesam_dist", "cores": 1}]
    results += [{"provider": "torchvision", "workers": n, "cores": max(n, 1)} for n in args.workers]
    epochs = [our_epochs(split, args.batch, device)]
    epochs += [torchvision_epochs(split, args.batch, n, device) for n in args.workers]
    samples: list[list[float]] = [[] for _ in epochs]
    for index in range(1 + args.repeats):
        for epoch, own in zip(epochs, samples, strict=True):
            own.append(seconds(epoch, index, device))
    read = args.images // args.batch * args.batch
    for result, (_, *timed) in zip(results, samples, strict=True):
        result["seconds"] = percentiles(timed)
        result["images_per_second_per_core"] = read / statistics.median(timed) / result["cores"]
        result["ours_is"] = results[0]["images_per_second_per_core"] / result["images_per_second_per_core"]
    return results


def report(results: list[Result], on_cuda: bool) -> str:
    """Markdown. A CPU's images per second go into the JSON alone: other people's jobs are in them."""
    ours, *others = results
    header = ["against", "cores", "ours, per core", "target", "met"]
    header += ["images/s per core", "ours"] if on_cuda else []
    rows = []
    for r in others:
        row = [f"torchvision, {r['workers']} workers", str(r["cores"]), number(r["ours_is"], 1, unit="x")]
        row += [f">= {TARGET:.0f}x", "yes" if r["ours_is"] >= TARGET else "**no**"]
        rates = [number(each["images_per_second_per_core"], 0) for each in (r, ours)]
        rows.append(row + (rates if on_cuda else []))
    return table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in ("images", "batch", "repeats", "seed")}
    title = f"CIFAR's training batches of {args.batch} images"
    output = Report(args, "cifar_data.py", torch.device(args.device), title, settings=settings, target=TARGET)
    try:
        results = compare(args)
    finally:
        torch.set_num_threads(threads)
    output.add(report(results, on_cuda=args.device == "cuda"), results)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Parser(__doc__)
    options.add_device()
    cores = len(os.sched_getaffinity(0))
    options.add_integers("--workers", [0, cores], f"torchvision's worker processes; default here: 0,{cores}")
    options.add_argument("--images", type=int, default=10_000, metavar="N", help="in the data set; default: 10000")
    options.add_argument("--batch", type=int, default=128, metavar="N", help="images per batch; default: 128")
    options.add_argument("--repeats", type=int, default=5, metavar="N", help="timed epochs of each; default: 5")
    options.add_seed("the images")
    options.add_files()
    args = options.parse(argv)
    if not 1 <= args.batch <= args.images or min(args.workers) < 0 or args.repeats < 1:
        options.error("--batch and --repeats must be at least 1, --images at least --batch, --workers at least 0")
    return args


if __name__ == "__main__":
    main()

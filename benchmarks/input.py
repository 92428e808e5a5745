"""Training images per second and core: this library's loaders against torchvision's and timm's.

    python benchmarks/input.py [--images 1024] [--batch 64] [--repeats 5]

All read the same JPEGs, crop them at random to 224 pixels, flip, normalise and deliver float32 batches on the CPU, with
as many worker processes or threads as there are cores. They take turns, over whole epochs, the first of each left out;
files are in the page cache. FFCV has no wheels, and its last release is of 2023: it is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lib.arguments import Parser
from lib.input_peers import PEERS, Epoch
from lib.photos import write_photos
from lib.report import Report, Result, number, percentiles, table

from lesam_dist.config.checks import checked
from lesam_dist.config.schema import Config
from lesam_dist.data import BACKENDS, Transform, build_loader
from lesam_dist.data.opening import open_splits
from lesam_dist.data.packed.command import pack

RESIZED = 256
"""Short side of the small images, as ImageNet is often kept."""

TARGETS = {"default": 1.0, "packed and resized": 2.0}
"""Images per second as a multiple of the fastest peer's."""


def our_epochs(root: Path, backend: str, batch: int, workers: int) -> Epoch:
    train, _ = open_splits(root, first=True)
    loader = build_loader(
        train,
        backend=backend,
        train=True,
        transform=Transform(),
        batch_size=batch,
        seed=0,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        workers=workers,
    )
    return loader.epoch


def default_backend() -> str:
    """What data.backend "auto" is here."""
    return checked(Config()).data.backend


def providers(folder: Path, batch: int, workers: int) -> dict[str, Callable[[], Epoch]]:
    """By name: whose, and of which files."""
    roots = {"folder": "data", "packed": "packed", "packed and resized": "small"}
    ours = {
        f"lesam_dist {backend}, {kind}": (lambda b=backend, r=root: our_epochs(folder / r, b, batch, workers))
        for kind, root in roots.items()
        for backend in BACKENDS
    }
    peers = {name: (lambda p=peer: p(folder / "data", batch, workers)) for name, peer in PEERS.items()}
    return {**peers, **ours}


def seconds(epoch: Epoch, index: int) -> float:
    start = time.perf_counter()
    for _ in epoch(index):
        pass
    return time.perf_counter() - start


def compare(args: argparse.Namespace, folder: Path) -> list[Result]:
    """The rate of each, per core, and as a multiple of the fastest peer's."""
    write_photos(folder / "data", args.images, args.seed)
    with contextlib.redirect_stdout(io.StringIO()):
        pack([str(folder / "data"), str(folder / "packed")])
        pack([str(folder / "data"), str(folder / "small"), "--resize", str(RESIZED)])
    epochs = {name: build() for name, build in providers(folder, args.batch, args.workers).items()}
    samples: dict[str, list[float]] = {name: [] for name in epochs}
    for index in range(1 + args.repeats):
        for name, epoch in epochs.items():
            samples[name].append(seconds(epoch, index))
    read = args.images // args.batch * args.batch
    rates = {name: read / statistics.median(timed[1:]) / args.workers for name, timed in samples.items()}
    best = max(rates[name] for name in PEERS)
    return [
        {
            "provider": name,
            "seconds": percentiles(samples[name][1:]),
            "images_per_second_per_core": rate,
            "of_best_peer": rate / best,
        }
        for name, rate in rates.items()
    ]


def report(results: list[Result], default: str) -> str:
    """Markdown. A CPU's images per second go into the JSON alone: other people's jobs are in them."""
    rows = []
    for r in results:
        name = r["provider"]
        target = None
        if name == f"lesam_dist {default}, folder":
            name, target = f"{name} (the default here)", TARGETS["default"]
        elif name.startswith("lesam_dist") and name.endswith("packed and resized"):
            target = TARGETS["packed and resized"]
        met = "" if target is None else "yes" if r["of_best_peer"] >= target else "**no**"
        rows.append([name, number(r["of_best_peer"], 2, unit="x"), "" if target is None else f">= {target:.0f}x", met])
    return table(["loader", "images/s, of the best peer's", "target", "met"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torchvision")
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in ("images", "batch", "workers", "repeats", "seed")}
    title = (
        f"Training images of {args.batch} a batch, with {args.workers} workers on {len(os.sched_getaffinity(0))} cores"
    )
    output = Report(args, "input.py", torch.device("cpu"), title, settings=settings, targets=TARGETS)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = compare(args, Path(folder))
    output.add(report(results, default_backend()), results)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Parser(__doc__)
    cores = len(os.sched_getaffinity(0))
    options.add_argument("--images", type=int, default=1024, metavar="N", help="in the data set; default: 1024")
    options.add_argument("--batch", type=int, default=64, metavar="N", help="images per batch; default: 64")
    options.add_argument("--workers", type=int, default=cores, metavar="N", help=f"of each; default here: {cores}")
    options.add_argument("--repeats", type=int, default=5, metavar="N", help="timed epochs of each; default: 5")
    options.add_argument("--folder", type=Path, metavar="DIR", help="where the files are made; default: the system's")
    options.add_seed("the images")
    options.add_files()
    args = options.parse(argv)
    if not 1 <= args.batch <= args.images or args.workers < 1 or args.repeats < 1:
        options.error("--batch, --workers and --repeats must be at least 1, --images at least --batch")
    return args


if __name__ == "__main__":
    main()

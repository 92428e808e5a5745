"""What a start costs on a data set of ImageNet's size: listing it, its index, and what each process keeps in memory.

    python benchmarks/start_up.py [--images 1281167] [--processes 8]

Empty files in 1000 class folders, named as ImageNet's. First they are listed, as without an index; then indexed; then
so many processes open the index at one time, as on a node, and each draws the order of an epoch. Memory is what the
opening adds to a process: its own (Private), and its share of what all have together (Pss), both of Linux.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lib.arguments import Parser
from lib.process_memory import memory
from lib.report import Report, Result, number, table

from lesam_dist.data.index import scan_both, write_index
from lesam_dist.data.opening import open_splits
from lesam_dist.data.order import epoch_order

SECONDS, MEBIBYTES = 10.0, 50.0
"""What a start with an index may take, and what each process may keep."""

_CLASSES = 1000
_VAL = 50


def make_files(root: Path, images: int) -> None:
    """Empty files with names as long as ImageNet's."""
    for split, count in (("train", images // _CLASSES), ("val", _VAL)):
        for k in range(_CLASSES):
            folder = root / split / f"n{10_000_000 + k}"
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"n{10_000_000 + k}_{i}.JPEG").touch()


def opened(root: Path, first: bool, pipe: Connection) -> None:
    """A process of a node: open, draw an order, read some paths; and stay until all have measured."""
    before = memory()
    pipe.recv()
    start = time.perf_counter()
    train, _ = open_splits(root, first=first)
    order = epoch_order(len(train), seed=0, epoch=0, shuffle=True)
    seconds = time.perf_counter() - start
    for i in order[:: len(order) // 10_000].tolist():
        assert train.paths[i]
    pipe.send(seconds)
    pipe.recv()
    pipe.send({name: value - before[name] for name, value in memory().items()})
    pipe.recv()


def measure(root: Path, processes: int) -> list[Result]:
    start = time.perf_counter()
    splits = scan_both(root)
    listed = time.perf_counter()
    write_index(root, *splits)
    written = time.perf_counter()
    images = sum(map(len, splits))
    del splits
    context = multiprocessing.get_context("spawn")
    pipes, team = [], []
    for rank in range(processes):
        ours, theirs = context.Pipe()
        team.append(context.Process(target=opened, args=(root, rank == 0, theirs)))
        pipes.append(ours)
        team[-1].start()
    answers: list[Any] = []
    for _ in range(2):
        for pipe in pipes:
            pipe.send(None)
        answers.append([pipe.recv() for pipe in pipes])
    for pipe, process in zip(pipes, team, strict=True):
        pipe.send(None)
        process.join()
    seconds, kept = answers
    return [
        {
            "images": images,  # with those for validation
            "processes": processes,
            "list_seconds": listed - start,
            "index_seconds": written - listed,
            "open_seconds": max(seconds),
            "private_mib": max(each["private"] for each in kept),
            "pss_mib": max(each["pss"] for each in kept),
        }
    ]


def report(results: list[Result]) -> str:
    (r,) = results
    fits = r["open_seconds"] <= SECONDS and r["pss_mib"] <= MEBIBYTES
    header = ["images", "list", "write the index", "open it", "own memory", "with its share", "target", "met"]
    row = [f"{r['images']:,}", *(number(r[f"{name}_seconds"], 2, unit=" s") for name in ("list", "index", "open"))]
    row += [number(r["private_mib"], 0, unit=" MiB"), number(r["pss_mib"], 0, unit=" MiB")]
    return table(header, [[*row, f"{SECONDS:.0f} s, {MEBIBYTES:.0f} MiB", "yes" if fits else "**no**"]])


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    import torch

    title = f"Starting {args.processes} processes of a node on {args.images:,} images"
    settings = {name: getattr(args, name) for name in ("images", "processes")}
    output = Report(args, "start_up.py", torch.device("cpu"), title, settings=settings, target=SECONDS)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_files(Path(folder), args.images)
        results = measure(Path(folder), args.processes)
    output.add(report(results), results)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Parser(__doc__)
    options.add_argument("--images", type=int, default=1_281_167, metavar="N", help="default: 1281167, as ImageNet")
    options.add_argument("--processes", type=int, default=8, metavar="N", help="of the node; default: 8")
    options.add_argument("--folder", type=Path, metavar="DIR", help="where the files are made; default: the system's")
    options.add_files()
    args = options.parse(argv)
    if args.images < _CLASSES or args.processes < 1:
        options.error(f"--images must be at least {_CLASSES}, --processes at least 1")
    return args


if __name__ == "__main__":
    main()

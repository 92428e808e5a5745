"""Memory of each process of a run on the CPU, by the number of processes: it should not grow with that.

    python benchmarks/rank_memory.py [--ranks 1,2,4,8,16] [--images 1000000]

Processes are forked from one that has imported everything. What is counted is what each then adds of its own: gloo's
connections, wrapping and three LE-SAM steps of a small network, and its order of an epoch of --images images. DDP keeps
all of the weights on each process; FSDP2 a share, so that it needs less with more processes; HSDP a half.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lib.arguments import Parser
from lib.process_memory import memory
from lib.report import Report, Result, number, table
from torch import nn

from lesam_dist import LESAM
from lesam_dist.data.order import epoch_order
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import Strategy, wrap
from lesam_dist.train.passes import BatchPasses

LAYERS, WIDTH = 16, 512  # 1 MiB each
STEPS = 3


def worker(rank: int, ranks: int, strategy: Strategy, images: int, folder: Path) -> None:
    """One process; what it keeps goes into a file."""
    torch.set_num_threads(1)
    before = memory()["private"]
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    world = Distributed(rank, rank, ranks, torch.device("cpu"), local_world_size=max(1, ranks // 2))
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    sharding: dict[str, Any] = {} if strategy == "ddp" else {"wrap_classes": ["Linear"]}
    if strategy == "hsdp":
        sharding |= {"shard_size": 2, "replicate_size": ranks // 2}
    model = wrap(net, world, strategy, **sharding)
    optimizer = LESAM(net.parameters(), torch.optim.SGD, sigma=0.3, rho_max=0.2, lr=0.01, momentum=0.9)
    passes = BatchPasses(model, nn.CrossEntropyLoss(), torch.randn(2, WIDTH), torch.tensor([0, 1]))
    order = epoch_order(images, seed=0, epoch=0, shuffle=True)
    for _ in range(STEPS):
        optimizer.step(passes)
    dist.barrier()
    torch.save(memory()["private"] - before, folder / str(rank))
    dist.barrier()
    assert len(order) == images  # which is kept until here, as in a run
    time.sleep(0.2)  # gloo's threads: see lesam_dist.parallel.processes
    os._exit(0)


def measure(ranks: int, strategy: Strategy, images: int) -> Result:
    with tempfile.TemporaryDirectory() as name:
        arguments = (ranks, strategy, images, Path(name))
        mp.start_processes(worker, arguments, nprocs=ranks, start_method="fork")  # type: ignore[no-untyped-call]
        kept = [torch.load(Path(name) / str(rank)) for rank in range(ranks)]
    return {"strategy": strategy, "ranks": ranks, "private_mib": max(kept), "private_mib_least": min(kept)}


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    options.add_integers("--ranks", [1, 2, 4, 8, 16], "processes; default: 1,2,4,8,16")
    options.add_argument("--images", type=int, default=1_000_000, metavar="N", help="default: 1000000")
    options.add_files()
    args = options.parse(argv)
    if args.images < 1:
        options.error("--images must be at least 1")
    settings = {"ranks": args.ranks, "images": args.images, "layers": LAYERS, "width": WIDTH}
    title = f"Own memory of a process, {LAYERS} MiB of weights, {args.images:,} images"
    output = Report(args, "rank_memory.py", torch.device("cpu"), title, settings=settings)
    strategies: tuple[Strategy, ...] = ("ddp", "fsdp", "hsdp")
    results = [
        measure(ranks, strategy, args.images)
        for strategy in strategies
        for ranks in args.ranks
        if strategy != "hsdp" or ranks >= 4
    ]
    output.add(report(results), results)
    return 0


def report(results: Sequence[Result]) -> str:
    ranks = sorted({r["ranks"] for r in results})
    found = {(r["strategy"], r["ranks"]): r["private_mib"] for r in results}
    rows = [
        [strategy, *(number(found.get((strategy, n)), 0, unit=" MiB") for n in ranks)]
        for strategy in dict.fromkeys(r["strategy"] for r in results)
    ]
    return table(["largest of all processes", *map(str, ranks)], rows)


if __name__ == "__main__":
    sys.exit(main())

"""What analyses cost beside the passes that they are made of, and what a second process saves.

    python benchmarks/analysis.py [--model cifar_resnet20] [--images 1000] [--top 5] [--points 32] [--ranks 1,2]

The Hessian's eigenvalues beside products with it, and a landscape on a line beside losses. Random images and weights as
the model is initialised. Every process has one thread. Passes alone and whole analyses take turns on each number of
processes, so that other jobs meet all of them.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lib.arguments import Parser
from lib.report import Report, Result, number, table
from torch import Tensor

from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.measures.hessian import hessian
from lesam_dist.analysis.measures.landscape import filter_normalised, grid, landscape
from lesam_dist.models import build_model
from lesam_dist.parallel.processes import Distributed

OVERHEAD = 1.3
"""Seconds of an analysis, as a multiple of those of as many passes alone."""
SPEED_UP = 1.7
"""Of two processes, over one."""
_BATCH, _ALONE = 250, 3


def worker(rank: int, ranks: int, model: str, images: int, top: int, points: int, repeats: int, folder: Path) -> None:
    """One process; rank 0 leaves seconds for each repeat."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    world = Distributed(rank, rank, ranks, torch.device("cpu"))
    torch.manual_seed(0)
    net = build_model(model, 10)
    x, y = torch.randn(images, 3, 32, 32), torch.randint(10, (images,))
    own = slice(rank * images // ranks, (rank + 1) * images // ranks)
    shared = Objective(net, _batches(x[own], y[own]), world)
    alone = Objective(net, _batches(x, y))  # a process makes its points on all images
    v = torch.randn(shared.size)
    direction = filter_normalised(alone, 0, 0)
    found, made = [], list[int]()
    for _ in range(repeats):
        before = _seconds(lambda: shared.hessian_product(v), _ALONE)
        whole = _seconds(lambda: made.append(hessian(shared, top=top, trace_vectors=0, density_vectors=0).products))
        found.append({"analysis": "hessian", "ranks": ranks, "pass_s": before, "analysis_s": whole, "passes": made[-1]})
        before = _seconds(alone.loss, _ALONE)
        whole = _seconds(lambda: landscape(alone, [direction], grid(points, 1.0), world=world))
        # Of the process that has most points.
        each = -(-points // ranks)
        found.append({"analysis": "landscape", "ranks": ranks, "pass_s": before, "analysis_s": whole, "passes": each})
    if rank == 0:
        torch.save(found, folder / "found")
    dist.barrier()
    time.sleep(0.2)  # gloo's threads: see lesam_dist.parallel.processes
    os._exit(0)


def _batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(_BATCH), y.split(_BATCH), strict=True))


def _seconds(function: Callable[[], object], times: int = 1) -> float:
    """Of each of so many calls, between meetings of all processes; memory and kernels are found before."""
    if times > 1:
        function()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(times):
        function()
    dist.barrier()
    return (time.perf_counter() - begin) / times


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    options.add_argument("--model", default="cifar_resnet20", help="default: cifar_resnet20")
    options.add_argument("--images", type=int, default=1000, help="default: 1000")
    options.add_argument("--top", type=int, default=5, help="eigenvalues; default: 5")
    options.add_argument("--points", type=int, default=32, help="of the landscape; default: 32")
    options.add_argument("--repeats", type=int, default=1, help="default: 1")
    options.add_integers("--ranks", [1, 2], "processes; default: 1,2")
    options.add_files()
    args = options.parse(argv)
    if min(args.images // max(args.ranks), args.top, args.repeats, args.points - 1) < 1:
        options.error("--images must be one for each process, --points at least 2, --top and --repeats at least 1")
    settings = {"model": args.model, "images": args.images, "top": args.top, "points": args.points}
    title = f"{args.model} on {args.images} images: {args.top} eigenvalues, {args.points} points of a landscape"
    output = Report(args, "analysis.py", torch.device("cpu"), title, settings=settings)
    results: list[Result] = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as name:
            arguments = (ranks, args.model, args.images, args.top, args.points, args.repeats, Path(name))
            mp.start_processes(worker, arguments, nprocs=ranks, start_method="fork")  # type: ignore[no-untyped-call]
            results += torch.load(Path(name) / "found")
    output.add(report(results), results)
    return 0


def report(results: Sequence[Result]) -> str:
    ranks = list(dict.fromkeys(r["ranks"] for r in results))
    rows = []
    for name in dict.fromkeys(r["analysis"] for r in results):
        of = {n: [r for r in results if (r["analysis"], r["ranks"]) == (name, n)] for n in ranks}
        median = {n: statistics.median(r["analysis_s"] for r in own) for n, own in of.items()}
        for n, own in of.items():
            over = statistics.median(r["analysis_s"] / (r["passes"] * r["pass_s"]) for r in own)
            rows.append([name, str(n), str(own[0]["passes"]), number(over, 2), number(median[ranks[0]] / median[n], 2)])
    header = ["analysis", "processes", "passes", "time over that of the passes", f"faster than with {ranks[0]}"]
    targets = f"at most {OVERHEAD} times the passes; two processes {SPEED_UP} times as fast"
    return f"{table(header, rows)}\nTargets: {targets}."


if __name__ == "__main__":
    sys.exit(main())

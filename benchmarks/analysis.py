"""What the Hessian's eigenvalues cost beside the products that they are made of, and what a second process saves.

    python benchmarks/analysis.py [--model cifar_resnet20] [--images 1000] [--top 5] [--ranks 1,2]

Random images and weights as the model is initialised. Every process has one thread. Products alone and whole analyses
take turns on each number of processes, so that other jobs meet all of them.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lib.arguments import Parser
from lib.report import Report, Result, number, table

from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.measures.hessian import hessian
from lesam_dist.models import build_model
from lesam_dist.parallel.processes import Distributed

OVERHEAD = 1.3
"""Seconds of the eigenvalues, as a multiple of those of as many products alone."""
SPEED_UP = 1.7
"""Of two processes, over one."""
_BATCH, _PRODUCTS = 250, 3


def worker(rank: int, ranks: int, model: str, images: int, top: int, repeats: int, folder: Path) -> None:
    """One process; rank 0 leaves seconds for each repeat."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    world = Distributed(rank, rank, ranks, torch.device("cpu"))
    torch.manual_seed(0)
    net = build_model(model, 10)
    x, y = torch.randn(images, 3, 32, 32), torch.randint(10, (images,))
    own = slice(rank * images // ranks, (rank + 1) * images // ranks)
    batches = list(zip(x[own].split(_BATCH), y[own].split(_BATCH), strict=True))
    objective = Objective(net, batches, world)
    v = torch.randn(objective.size)
    objective.hessian_product(v)  # memory and kernels are found
    found = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(_PRODUCTS):
            objective.hessian_product(v)
        product = (time.perf_counter() - begin) / _PRODUCTS
        begin = time.perf_counter()
        made = hessian(objective, top=top, trace_vectors=0, density_vectors=0).products
        whole = time.perf_counter() - begin
        found.append({"ranks": ranks, "product_s": product, "analysis_s": whole, "products": made})
    if rank == 0:
        torch.save(found, folder / "found")
    dist.barrier()
    time.sleep(0.2)  # gloo's threads: see lesam_dist.parallel.processes
    os._exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    options.add_argument("--model", default="cifar_resnet20", help="default: cifar_resnet20")
    options.add_argument("--images", type=int, default=1000, help="default: 1000")
    options.add_argument("--top", type=int, default=5, help="eigenvalues; default: 5")
    options.add_argument("--repeats", type=int, default=1, help="default: 1")
    options.add_integers("--ranks", [1, 2], "processes; default: 1,2")
    options.add_files()
    args = options.parse(argv)
    if min(args.images // max(args.ranks), args.top, args.repeats) < 1:
        options.error("--images must be one for each process, --top and --repeats at least 1")
    settings = {"model": args.model, "images": args.images, "top": args.top}
    title = f"The {args.top} largest eigenvalues of {args.model}'s Hessian on {args.images} images"
    output = Report(args, "analysis.py", torch.device("cpu"), title, settings=settings)
    results: list[Result] = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as name:
            arguments = (ranks, args.model, args.images, args.top, args.repeats, Path(name))
            mp.start_processes(worker, arguments, nprocs=ranks, start_method="fork")  # type: ignore[no-untyped-call]
            results += torch.load(Path(name) / "found")
    output.add(report(results), results)
    return 0


def report(results: Sequence[Result]) -> str:
    ranks = list(dict.fromkeys(r["ranks"] for r in results))
    median = {n: statistics.median(r["analysis_s"] for r in results if r["ranks"] == n) for n in ranks}
    rows = []
    for n in ranks:
        own = [r for r in results if r["ranks"] == n]
        over = statistics.median(r["analysis_s"] / (r["products"] * r["product_s"]) for r in own)
        faster = median[ranks[0]] / median[n]
        rows.append([str(n), str(own[0]["products"]), number(over, 2), number(faster, 2)])
    header = ["processes", "products", "time over that of the products alone", f"faster than with {ranks[0]}"]
    targets = f"at most {OVERHEAD} times the products; two processes {SPEED_UP} times as fast"
    return f"{table(header, rows)}\nTargets: {targets}."


if __name__ == "__main__":
    sys.exit(main())

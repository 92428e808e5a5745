"""What a process needs of the host's memory as their number grows: it should stay, or fall where shards get smaller.

    python benchmarks/rank_memory.py [--ranks 2,4,8,16]

A ViT of 12 blocks, 22 M parameters, on gloo: bytes that belong to one process alone (private pages in
/proc/self/smaps_rollup, Linux), after three steps of LE-SAM beyond what they were before the network was built, of the
first rank and of the largest. All are forked from one process, so that what they share of torch is in no number.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lib.arguments import Parser
from lib.models import ViT
from lib.report import Report, Result, number, table
from torch import nn

from lesam_dist import LESAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap

STRATEGIES = ("ddp", "fsdp")


def private_bytes() -> int:
    """Of this process, and of no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def worker(rank: int, ranks: int, strategy: Any, folder: str) -> None:
    """Train for three steps, and write down what it took."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    before = private_bytes()
    torch.manual_seed(0)
    net = ViT(12, 384, 6, image=32, classes=10)
    world = Distributed(rank, rank, ranks, torch.device("cpu"))
    model = wrap(net, world, strategy, wrap_classes=["Block"] if strategy == "fsdp" else [])
    optimizer = LESAM(model.parameters(), torch.optim.SGD, sigma=0.3, rho_max=0.2, lr=0.01, momentum=0.9)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])

    def closure() -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    for _ in range(3):
        optimizer.step(closure)
    dist.barrier()
    torch.save((before, private_bytes()), f"{folder}/{rank}")
    dist.barrier()
    os._exit(0)


def measure(ranks: int, strategy: str) -> Result:
    """Bytes that the steps added on the first rank, and on the one where they added most."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (ranks, strategy, folder), nprocs=ranks, start_method="fork")  # type: ignore[no-untyped-call]
        found = [torch.load(f"{folder}/{rank}") for rank in range(ranks)]
    grown = [after - before for before, after in found]
    return {"ranks": ranks, "strategy": strategy, "first": grown[0], "most": max(grown), "by_rank": grown}


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    options.add_integers("--ranks", [2, 4, 8, 16], "processes; default: 2,4,8,16")
    options.add_files()
    args = options.parse(argv)
    output = Report(args, "rank_memory.py", torch.device("cpu"), "Host memory of a process, MB")
    results = [measure(ranks, strategy) for strategy in STRATEGIES for ranks in args.ranks]
    rows = [[r["strategy"], str(r["ranks"]), *(number(r[key], 1, 1e-6) for key in ("first", "most"))] for r in results]
    output.add(table(["strategy", "processes", "first rank", "largest"], rows), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

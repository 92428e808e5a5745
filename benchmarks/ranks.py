"""LE-SAM on several GPUs against one: the same weights under DDP and FSDP2, with uneven and empty shards.

    python benchmarks/ranks.py [--ranks 2]

The head has 3 rows, so that its shards differ, and a factor has one, so that all ranks but the first hold nothing of
it. Each rank gets its part of the batch; one process gets all of it. Weights are compared after four steps, to the
roundings of a gradient that is summed in another order, and the ranks' own with each other, bit for bit. On a CPU it
uses gloo. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lib.arguments import Parser
from lib.report import Report, Result, first_line, number, table
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

from lesam_dist import LESAM
from lesam_dist.parallel.processes import Distributed, process_group
from lesam_dist.parallel.wrapping import wrap

STEPS, BATCH = 4, 12
_ALLOWED = 2e-5  # of the largest weight: tens of roundings of float32 a step
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "eps": 1e-4}),  # a larger eps: v near 0 would make roundings large
}


class Unit(nn.Module):
    """A layer of odd width and a factor of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.layer = nn.Parameter(torch.ones(1, 7)), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = x + self.factor * self.layer(x).tanh()
        return moved


def train(world: Distributed | None, strategy: str, base: str, device: torch.device, seed: int) -> list[Tensor]:
    """The whole weights after `STEPS` steps, on the CPU; ``world`` None: in this process alone."""
    torch.manual_seed(seed)
    net: nn.Module = nn.Sequential(nn.Linear(5, 7), Unit(), nn.Linear(7, 3)).to(device)
    x, y = torch.randn(STEPS, BATCH, 5).to(device), torch.randint(0, 3, (STEPS, BATCH)).to(device)
    if world is not None:
        net = wrap(net, world, strategy, wrap_classes=["Unit"])  # type: ignore[arg-type]
        x, y = x[:, world.rank :: world.world_size], y[:, world.rank :: world.world_size]
    cls, kwargs = BASES[base]
    optimizer = LESAM(net.parameters(), cls, sigma=0.3, rho_max=0.5, **kwargs)
    for t in range(STEPS):

        def closure(t: int = t) -> Tensor:
            loss = nn.functional.cross_entropy(net(x[t]), y[t])
            loss.backward()
            return loss

        optimizer.step(closure)
    return [_whole(p.detach()).cpu() for p in net.parameters()]


def _whole(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p


def run(args: argparse.Namespace) -> list[list[Any]]:
    """On each rank, for each strategy and base: the weights, or what was raised."""
    results: list[list[Any]] = []
    with process_group(args.device) as world:
        for strategy, base in itertools.product(("ddp", "fsdp"), BASES):
            results.append(_train_or_say(world, strategy, base, args.seed))
            if isinstance(results[-1][0], str):
                break  # the other ranks may wait in a collective for this one
    return results


def _train_or_say(world: Distributed, strategy: str, base: str, seed: int) -> list[Any]:
    try:
        return train(world, strategy, base, world.device, seed)
    except Exception as error:
        return [first_line(error)]


def compare(by_rank: list[list[list[Any]]], args: argparse.Namespace) -> list[Result]:
    """One result for each strategy and base."""
    results: list[Result] = []
    for index, (strategy, base) in enumerate(itertools.product(("ddp", "fsdp"), BASES)):
        result: Result = {"strategy": strategy, "base": base, "ranks": args.ranks, "status": "not run"}
        found = [rank[index] for rank in by_rank if len(rank) > index]
        errors = [weights[0] for weights in found if isinstance(weights[0], str)]
        if errors:
            result["status"] = f"failed: {errors[0]}"
        elif len(found) == len(by_rank):
            alone = train(None, strategy, base, torch.device(args.device), args.seed)
            pairs = list(zip(found[0], alone, strict=True))
            result["error"] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
            replicas = all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))
            right = result["error"] <= _ALLOWED
            result["status"] = "ok" if right and replicas else "ranks differ" if right else "wrong weights"
        results.append(result)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    options.add_device()
    options.add_argument("--ranks", type=int, metavar="N", help="default: all GPUs, at most 4; on a CPU 2")
    options.add_seed("weights and batches")
    options.add_files()
    args = options.parse(argv)
    args.ranks = args.ranks or (min(torch.cuda.device_count(), 4) if args.device == "cuda" else 2)
    output = Report(args, "ranks.py", torch.device(args.device), "Several ranks against one process", seed=args.seed)
    if args.device == "cuda" and torch.cuda.device_count() < max(args.ranks, 2):
        output.add(f"Not run: {torch.cuda.device_count()} GPU, and it takes {max(args.ranks, 2)}.\n")
        return 0
    config = LaunchConfig(1, 1, args.ranks, run_id="ranks", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    config.max_restarts = 0
    by_rank: dict[int, list[list[Any]]] = elastic_launch(config, run)(args)
    results = compare([by_rank[rank] for rank in sorted(by_rank)], args)
    rows = [[r["strategy"], r["base"], str(r["ranks"]), r["status"], number(r.get("error"), 2, 1e6)] for r in results]
    output.add(table(["strategy", "base", "ranks", "outcome", "largest difference, 1e-6"], rows), results)
    return int(any(r["status"] != "ok" for r in results))


if __name__ == "__main__":
    sys.exit(main())

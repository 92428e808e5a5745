"""What one LE-SAM step needs in memory on each process: predicted by a formula, and measured.

    python benchmarks/memory.py [--models resnet50,vit_b_16] [--world-sizes 1,2] [--strategies none,ddp,fsdp]

Parameters, gradients, saved weights and optimizer state are measured as the storages that exist when the second
backward is done; "transient" is the peak of the whole step beyond these. The formula is in
`lesam_dist/planning/memory.py`.
Activations are in no formula: a batch of two small images keeps them out of the way, and what they take is the
difference between predicted and measured transient bytes. One process ("none") runs alone; DDP and FSDP2 start as many
processes as --world-sizes says, on the CPU with gloo, on CUDA one GPU each.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from lib.arguments import Parser
from lib.live_bytes import meter, storage_bytes
from lib.models import NETWORKS
from lib.problem import Hyper
from lib.providers import our_optimizer
from lib.report import Report, Result, number, table
from lib.traffic import Base
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lesam_dist import LESAM, SAM
from lesam_dist.parallel.processes import Distributed, process_group
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.planning.memory import STRATEGIES, Memory, Network, Strategy, predict
from lesam_dist.planning.memory import network_of as planned_network

_HYPER = Hyper(sigma=0.3, rho_max=0.2)
_UNITS = ("Bottleneck", "Block")  # of `models`: what FSDP2 gathers at once
_BATCH = 2


def measure(
    world: Distributed,
    strategy: Strategy,
    build: Callable[[], nn.Module],
    optimize: Callable[[nn.Module], LESAM | SAM],
    image: Sequence[int],
    units: Sequence[str],
) -> Memory:
    """Bytes on this process in the second step of a network, by the categories of `lesam_dist.planning.memory`.

    Args:
        world: the processes, of which this is one.
        strategy: how the network is wrapped.
        build: makes the network.
        optimize: makes its optimizer.
        image: shape of one input. The network gives at least two logits.
        units: class names of the modules that FSDP2 gathers at once.
    """
    with meter(world.device) as counter:
        module = wrap(build().to(world.device), world, strategy, wrap_classes=units)
        optimizer = optimize(module)
        images, labels = torch.randn(_BATCH, *image, device=world.device), torch.arange(_BATCH, device=world.device)

        def backward() -> None:
            nn.functional.cross_entropy(module(images), labels).backward()

        def step() -> tuple[int, int, int, int]:
            backward()
            optimizer.first_step(zero_grad=True)
            backward()
            found = categories(list(module.parameters()), optimizer)
            optimizer.second_step(zero_grad=True)
            return found

        step()  # the first one makes the optimizer's state, and DDP's buckets anew in their final order
        counter.record()
        persistent = step()
        return Memory(*persistent, transient=counter.peak() - sum(persistent))


def categories(params: Sequence[Tensor], optimizer: LESAM | SAM) -> tuple[int, int, int, int]:
    """Bytes of parameters, gradients, saved weights and optimizer state that exist now."""
    copies = [copy for rows in optimizer.weights.rows for copy in rows.copies]
    state = [value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
    return storage_bytes(params), storage_bytes(p.grad for p in params), storage_bytes(copies), storage_bytes(state)


def network_of(module: nn.Module, units: Sequence[str]) -> Network:
    """The weights of a model, of which the modules of these classes are gathered as units."""
    return planned_network(module, [m for m in module.modules() if type(m).__name__ in units])


def run(args: argparse.Namespace) -> list[Result]:
    """All models, bases and strategies on the processes that were started, of which this is one."""
    results = []
    torch.manual_seed(args.seed)
    with process_group(args.device) as world:
        if world.world_size > 1:
            torch.set_num_threads(1)  # as torchrun does
        strategies = [s for s in args.strategies if (s == "none") == (world.world_size == 1)]
        for model, base, strategy in itertools.product(args.models, args.base, strategies):
            results.append(_compare(world, model, base, strategy, args.image_size))
            gc.collect()  # FSDP2's modules are in cycles
    return results


def _compare(world: Distributed, model: str, base: Base, strategy: Strategy, side: int) -> Result:
    """Predicted and measured bytes of one run on this process."""

    def build() -> nn.Module:
        return NETWORKS[model](side)

    def optimize(module: nn.Module) -> LESAM | SAM:
        return our_optimizer(list(module.parameters()), base, _HYPER)

    with torch.device("meta"):
        skeleton = build()
    units = [name for name in _UNITS if name in {type(m).__name__ for m in skeleton.modules()}]
    predicted = predict(network_of(skeleton, units), strategy, base, world.world_size, world.rank)
    measured = measure(world, strategy, build, optimize, (3, side, side), units)
    result = {"model": model, "strategy": strategy, "base": base, "ranks": world.world_size, "rank": world.rank}
    return {**result, "predicted": predicted._asdict(), "measured": measured._asdict()}


def launch(args: argparse.Namespace, ranks: int) -> list[Result]:
    """`run` on as many processes; the results of all."""
    if ranks == 1:
        return run(args)
    config = LaunchConfig(1, 1, ranks, run_id="memory", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    config.max_restarts = 0
    by_rank: dict[int, list[Result]] = elastic_launch(config, run)(args)
    return [result for rank in sorted(by_rank) for result in by_rank[rank]]


def report(results: Sequence[Result]) -> str:
    """Markdown of the first rank, which has the most: under FSDP2 the last ones may own fewer rows."""
    header = ["model", "strategy", "ranks", "base", *Memory._fields, "peak"]
    rows = []
    for r in results:
        if r["rank"] == 0:
            predicted, measured = (Memory(**r[kind]) for kind in ("predicted", "measured"))
            pairs = zip((*predicted, predicted.peak), (*measured, measured.peak), strict=True)
            cells = [_cell(*pair) for pair in pairs]
            rows.append([r["model"], r["strategy"], str(r["ranks"]), r["base"], *cells])
    return table(header, rows)


def _cell(predicted: int, measured: int) -> str:
    ratio = number(measured / predicted if predicted else None, 3)
    return f"{number(predicted, 1, 2**-20)} / {number(measured, 1, 2**-20)} / {ratio}"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    settings = {"image_size": args.image_size, "batch": _BATCH, "seed": args.seed}
    title = "Memory of a LE-SAM step, per process"
    output = Report(args, "memory.py", torch.device(args.device), title, settings=settings)
    results = [result for ranks in args.world_sizes for result in launch(args, ranks)]
    output.add(f"MiB, predicted / measured / measured over predicted\n\n{report(results)}", results)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Parser(__doc__)
    options.add_device()
    options.add_names("--models", NETWORKS, ["resnet50", "vit_b_16"], "default: resnet50,vit_b_16")
    options.add_names("--strategies", STRATEGIES, STRATEGIES, "default: all")
    options.add_integers("--world-sizes", None, "processes; default: 1,2, or 1 with one GPU")
    options.add_bases()
    options.add_argument(
        "--image-size", type=int, default=32, metavar="N", help="a multiple of 16, at least 32; default: 32"
    )
    options.add_seed("weights and images")
    options.add_files()
    args = options.parse(argv)
    limit = torch.cuda.device_count() if args.device == "cuda" else math.inf
    args.world_sizes = args.world_sizes or [ranks for ranks in (1, 2) if ranks <= limit]
    if max(args.world_sizes) > limit:
        options.error(f"{max(args.world_sizes)} processes need as many GPUs, and there are {limit}")
    return args


if __name__ == "__main__":
    main()

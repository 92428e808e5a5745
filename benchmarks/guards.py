"""What it costs a run that it cannot be lost: the trainer's steps with each of its guards, against the same without.

    python benchmarks/guards.py [--ranks 2] [--model resnet18] [--batch 64]

Processes (gloo on a CPU, NCCL on GPUs) build one trainer for each variant on random images, and let them take turns: a
number of steps each, there and back, so that whatever else the machine does meets all alike. All write to a temporary
folder. The table has the median over all rounds of a variant's time over that of `off`, and of the CPU time of all
processes, with standard errors; `off again` says what the machine makes of two equal ones. Small things are also timed
by themselves, in many calls: the guard of the loss, with its sum over the processes, and the agreement on a step,
which is always on, in `off` too.

Checks and checkpoints cost by how often they are made. Their rows make one in every turn, which shows a cost that would
vanish in the noise; the last column says what share of the time they take at one every 100 steps and every ten minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lib.arguments import Parser
from lib.report import Report, Result, table
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lesam_dist.config.schema import GuardConfig
from lesam_dist.parallel.processes import Distributed, process_group
from lesam_dist.train.guard import LossGuard

Times = dict[str, list[float]]
INTERVAL = 600.0  # seconds between two checkpoints of a run
EVERY = 100  # steps between two checks of a run
CLASSES, SIDE = 10, 32
STEPS = 1_000_000  # of the only epoch, which nobody waits for
CHECKING = "a check in every turn"
VARIANTS: dict[str, dict[str, Any]] = {
    "off": {},
    "off again": {},
    "guard.max_loss_increase": {"guard.max_loss_increase": 1e9},
    CHECKING: {},
    "a checkpoint in every turn, waiting": {"checkpoint.asynchronous": "never"},
    "a checkpoint in every turn, beside": {"checkpoint.asynchronous": "always"},
}
ALONE = ("the guard by itself", "agreement on a step by itself")
CALLS = 2000  # of what is timed by itself
SAVING = [name for name in VARIANTS if name.startswith("a checkpoint")]


def trainer_steps(world: Distributed, folder: Path, name: str, args: argparse.Namespace) -> Iterator[int]:
    """The steps of a run of a variant on random images, one at each turn."""
    from lesam_dist.config.command_line import parse
    from lesam_dist.data import SyntheticLoader
    from lesam_dist.tasks.classification.task import Classification
    from lesam_dist.train.build import build_network
    from lesam_dist.train.run_dir import claim
    from lesam_dist.train.trainer import Trainer

    every = {"checkpoint.every_steps": args.steps} if name in SAVING else {}
    every |= {"checks.every_steps": args.steps} if name == CHECKING else {}
    fields = {"model.name": args.model, "data.batch_size": args.batch, "epochs": 1, "parallel.device": args.device}
    fields |= {"schedule.anneal_start_epoch": "null", "schedule.lr_warmup_epochs": 0, "logging.every_steps": 1_000_000}
    fields |= {"run_dir": folder / name.replace(" ", "_"), **VARIANTS[name], **every}
    config = parse(
        ["--config", "digits", *(part for path, value in fields.items() for part in (f"--{path}", str(value)))]
    )
    share = args.batch // world.world_size
    images = {
        "num_classes": CLASSES,
        "image_size": SIDE,
        "batch_size": share,
        "rank": world.rank,
        "device": world.device,
    }
    loaders = SyntheticLoader(**images, batches=STEPS, seed=0), SyntheticLoader(**images, batches=1, seed=1)
    model = build_network(config, CLASSES, world)
    trainer = Trainer(Classification(config, world), model, loaders, claim(config, world))
    try:
        yield from trainer.steps()
    finally:
        trainer.close()


def run(args: argparse.Namespace) -> tuple[Times, Times]:
    """Seconds of each variant's turn in each round, and of all calls of what is timed by itself; and seconds of CPU."""
    torch.set_num_threads(1)
    with process_group(args.device) as world:
        variants = {name: trainer_steps(world, Path(args.folder), name, args) for name in VARIANTS}
        seconds: Times = {name: [] for name in VARIANTS}
        cpu: Times = {name: [] for name in VARIANTS}
        for steps in variants.values():
            _turn(steps, args.steps, world)  # a warm-up, and the copies that asynchronous saves need
        for number_of_round in range(args.rounds):
            order = list(variants) if number_of_round % 2 == 0 else list(reversed(variants))
            for name in order:
                began = time.process_time()
                seconds[name].append(_turn(variants[name], args.steps, world))
                cpu[name].append(time.process_time() - began)
        for steps in variants.values():
            steps.close()  # type: ignore[attr-defined]
        guard, loss = LossGuard(GuardConfig(max_loss_increase=1e9), world), torch.ones((), device=world.device)

        def agree(step: int) -> None:
            world.agreed.due(step)
            world.move()

        def watch(step: int) -> None:
            guard.observe(step, loss)
            guard.verdict()

        for name, call in zip(ALONE, (watch, agree), strict=True):
            world.barrier()
            begin, began = time.perf_counter(), time.process_time()
            for step in range(CALLS):
                call(step)
            seconds[name], cpu[name] = [time.perf_counter() - begin], [time.process_time() - began]
    return seconds, cpu


def _turn(steps: Iterator[int], count: int, world: Distributed) -> float:
    world.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        next(steps)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.barrier()
    return time.perf_counter() - begin


def compare(seconds: Times, cpu: Times, args: argparse.Namespace) -> list[Result]:
    """A result for each variant: its time and CPU time over those of `off`, and their share at the usual interval."""
    results: list[Result] = []
    off = statistics.median(seconds["off"])
    for name in list(VARIANTS)[1:]:
        turns = 1.0  # of a run, in how many it is done once
        if name == CHECKING:
            turns = EVERY / args.steps
        elif name in SAVING:
            turns = INTERVAL / off
        result: Result = {"variant": name, "turns": turns, "seconds": {"step": off / args.steps}}
        for kind, times in (("wall", seconds), ("cpu", cpu)):
            result[kind] = _ratio([own / without for own, without in zip(times[name], times["off"], strict=True)])
        results.append(result)
    for name in ALONE:
        of_turn = args.steps / CALLS
        shares = (times[name][0] * of_turn / statistics.median(times["off"]) for times in (seconds, cpu))
        results.append({"variant": name, "share": dict(zip(("wall", "cpu"), shares, strict=True))})
    return results


def _ratio(ratios: list[float]) -> dict[str, float]:
    """The median, and its standard error from the median deviation: a turn that met another job moves neither."""
    middle = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(each - middle) for each in ratios)
    return {"ratio": middle, "error": 1.2533 * deviation / len(ratios) ** 0.5}


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The table's."""
    found = []
    for result in results:
        row = [result["variant"]]
        for kind in ("wall", "cpu"):
            if "share" in result:
                row += ["-", f"{result['share'][kind]:.3%}"]
            else:
                of = result[kind]
                share, error = (of["ratio"] - 1) / result["turns"], of["error"] / result["turns"]
                row += [f"{of['ratio']:.3f} ± {of['error']:.3f}", f"{share:.2%} ± {error:.2%}"]
        found.append(row)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    options.add_device()
    options.add_argument("--ranks", type=int, metavar="N", help="processes; default: all GPUs, on a CPU 2")
    options.add_argument("--model", default="resnet18", metavar="NAME", help="of the trainer's; default: resnet18")
    options.add_argument("--batch", type=int, default=64, metavar="N", help="images of a step; default: 64")
    options.add_argument("--steps", type=int, default=10, metavar="N", help="of a turn; default: 10")
    options.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="turns of each variant, at least 2; default: 20"
    )
    options.add_files()
    args = options.parse(argv)
    if args.rounds < 2:
        options.error(f"--rounds is {args.rounds}: an error needs at least 2.")
    args.ranks = args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2)
    output = Report(args, "guards.py", torch.device(args.device), f"Guards of a run, {args.model}, {args.ranks} ranks")
    config = LaunchConfig(1, 1, args.ranks, run_id="guards", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    config.max_restarts = 0
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        by_rank: dict[int, tuple[Times, Times]] = elastic_launch(config, run)(args)
    of_ranks = [cpu for _, cpu in by_rank.values()]
    cpu = {name: [sum(turn) for turn in zip(*(own[name] for own in of_ranks), strict=True)] for name in of_ranks[0]}
    results = compare(by_rank[0][0], cpu, args)
    header = ["variant", "of a turn without", "of a run", "CPU time, of a turn without", "of a run"]
    output.add(table(header, rows(results)), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Real steps of DDP and FSDP2 on 1 to 8 gloo processes behind slow links, beside what `lesam-dist plan` predicts.

    python benchmarks/scaling.py [--ranks 1,2,4,8] [--mbit 50]

Each process is in a network namespace of its own, whose link sends at most --mbit. Linux, root, iproute2. The model's
two numbers, alpha and beta, come from messages between two processes alone, in runs of their own: nothing is fitted to
what is predicted. In place of arithmetic each layer sleeps, forward and backward, so that eight processes on two cores
do not wait for a core: what is checked is the model of communication and of its overlap, not that of arithmetic. A
step without communication is measured as well, on one process, for FSDP2 with torch's fake backend: a sleep is longer
than asked for, and FSDP2's own work on the host is in no model. The processes have real-time priority where they may;
they sleep or wait for most of the time.

Steps are LE-SAM's own, with both passes. DDP reduces during the backward pass; FSDP2 waits for each collective, as on
gloo nothing overlaps, so that its overlap on GPUs is not checked here.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lib.arguments import Parser
from lib.hosts import address, bytes_sent, can_make_hosts, enter, limited_hosts
from lib.report import Report, Result, number, table
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from lesam_dist import LESAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.replicas import Sync
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.planning.collectives import Group, Link, Network, seconds
from lesam_dist.planning.communication import Call, Layout
from lesam_dist.planning.spread import units_of
from lesam_dist.planning.timeline import Block, in_turn, reduce_behind
from lesam_dist.train.passes import BatchPasses

LAYERS, WIDTH = 6, 512  # 1 MiB each
FORWARD, BACKWARD = 0.05, 0.15  # seconds that a layer sleeps
SETTINGS: dict[str, list[Sync]] = {"ddp": [True, True], "ddp local": [False, True], "fsdp": [True, True]}
_SIZES = (64, 2**20)  # bytes of the messages that show alpha and beta
_PORT = 29400


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(FORWARD)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        time.sleep(BACKWARD)
        return gradients[0].clone()


class Layer(nn.Module):
    """A linear layer that takes its time: the gradient of its weight is final after the sleep of its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = x + self.linear(x)
        return _Sleep.apply(moved)  # type: ignore[no-any-return, no-untyped-call]


def worker(rank: int, hosts: Sequence[str], folder: Path, job: Callable[[Distributed], Any]) -> None:
    """One process on its host; what the job returned goes into a file."""
    enter(hosts[rank])
    with suppress(PermissionError):  # others' jobs on the same cores then count little
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # hosts have no names
    torch.set_num_threads(1)
    store = dist.TCPStore(address(0), _PORT, len(hosts), is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(hosts))
    result = job(Distributed(rank, rank, len(hosts), torch.device("cpu")))
    torch.save(result, folder / str(rank))
    if dist.get_backend() == "gloo":
        dist.barrier()
    time.sleep(0.2)  # gloo's threads: see lesam_dist.parallel.processes
    os._exit(0)


def on_hosts(count: int, mbit: float, job: Callable[[Distributed], Any]) -> list[Any]:
    """The job on as many hosts; its results by rank."""
    with limited_hosts(count, mbit) as hosts, tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (hosts, Path(folder), job), nprocs=count, start_method="fork")  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / str(rank)) for rank in range(count)]


def alone(ranks: int, repeats: int) -> dict[str, dict[str, float]]:
    """Steps of one process that sends nothing: for FSDP2 one of so many whose collectives do nothing."""
    found = on_hosts(1, 1000, partial(steps, repeats=repeats, settings=["ddp", "ddp local"]))[0]
    return {**found, **on_hosts(1, 1000, partial(pretended, ranks=ranks, repeats=repeats))[0]}


def pretended(_: Distributed, ranks: int, repeats: int) -> dict[str, dict[str, float]]:
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return steps(Distributed(0, 0, ranks, torch.device("cpu")), repeats, ["fsdp"])


def messages(world: Distributed) -> dict[int, float]:
    """Median seconds of one message between two processes, by its bytes: half of there and back."""
    found = {}
    for size in _SIZES:
        tensor = torch.zeros(size // 4)
        times = []
        for _ in range(12):
            start = time.perf_counter()
            for sender in (0, 1):
                (dist.send if world.rank == sender else dist.recv)(tensor, 1 - world.rank)
            times.append((time.perf_counter() - start) / 2)
        found[size] = statistics.median(times[2:])
    return found


def link_of(found: dict[int, float]) -> Link:
    """Alpha and beta of the line through both sizes."""
    (small, low), (large, high) = found.items()
    bandwidth = (large - small) / (high - low)
    return Link(low - small / bandwidth, bandwidth)


def steps(world: Distributed, repeats: int, settings: Sequence[str] = tuple(SETTINGS)) -> dict[str, dict[str, float]]:
    """Median seconds of a step, and bytes sent in one, by setting."""
    found = {}
    for setting in settings:
        strategy: Any = setting.split()[0]
        torch.manual_seed(0)
        net = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        model = wrap(net, world, strategy, wrap_classes=["Layer"] if strategy == "fsdp" else [])
        scope: Any = "local" if "local" in setting else "global"
        optimizer = LESAM(net.parameters(), torch.optim.SGD, sigma=0.3, rho_max=0.2, lr=0.01, scope=scope)
        passes = BatchPasses(model, nn.CrossEntropyLoss(), torch.randn(2, WIDTH), torch.tensor([0, 1]))
        times, sent = [], []
        for _ in range(repeats + 1):
            if world.world_size > 1:
                dist.barrier()
            before, start = bytes_sent(), time.perf_counter()
            optimizer.step(passes)
            times.append(time.perf_counter() - start)
            sent.append(bytes_sent() - before)
        found[setting] = {"seconds": statistics.median(times[1:]), "sent": statistics.median(sent[1:])}
    return found


def layout(strategy: str, processes: int) -> Layout:
    net = nn.Sequential(*(Layer() for _ in range(LAYERS)))
    shapes = tuple(tuple(p.shape) for p in net.parameters())
    units = units_of(net, list(net), 4, 4, keep=False)
    shard = processes if strategy == "fsdp" else 1
    order = tuple(reversed(range(LAYERS)))
    return Layout(shapes, order, units, strategy, shard, processes // shard, backend="gloo")


def predict(setting: str, processes: int, link: Link, quiet: float) -> dict[str, float]:
    """Seconds of a step and bytes sent in it.

    Args:
        link: alpha and beta of messages.
        quiet: seconds of a step without communication: its sleeps, as long as they are, and all else.
    """
    spread = layout(setting.split()[0], processes)
    network = Network(link, link, "gloo")

    def each(call: Call) -> float:
        return seconds(call.operation, call.nbytes, Group(processes, 1), network)

    made = SETTINGS[setting]
    asleep = len(made) * LAYERS * (FORWARD + BACKWARD)
    late = quiet / asleep  # how much longer a sleep is than it was asked to be
    total = 0.0
    for sync in made:
        compute = LAYERS * (FORWARD + BACKWARD) * late
        if processes == 1 or (spread.strategy == "ddp" and not sync):
            total += compute
        elif spread.strategy == "ddp":
            ready = [(LAYERS * FORWARD + (i + 1) * BACKWARD) * late for i in range(LAYERS)]
            full = [ready[spread.order.index(bucket[-1])] for bucket in spread.buckets()]
            reductions = [sum(map(each, spread.reductions(bucket))) for bucket in spread.buckets()]
            total += reduce_behind(full, reductions, compute).total
        else:
            parts = [(each(spread.gather(unit)), sum(map(each, spread.reduce(unit, sync)))) for unit in spread.units]
            blocks = [Block(FORWARD * late, BACKWARD * late, gather, True, reduce) for gather, reduce in parts]
            total += in_turn(Block(0, 0, 0, False, 0), blocks).total
    total += sum(map(each, spread.of_scalars(made)))
    return {"seconds": total, "sent": spread.sent(spread.of_step(made))}


def main(argv: Sequence[str] | None = None) -> int:
    options = Parser(__doc__)
    options.add_integers("--ranks", [1, 2, 4, 8], "processes; default: 1,2,4,8")
    options.add_argument("--mbit", type=float, default=50.0, metavar="N", help="of each link; default: 50")
    options.add_argument("--repeats", type=int, default=3, metavar="N", help="steps of each setting; default: 3")
    options.add_files()
    args = options.parse(argv)
    if not can_make_hosts():
        options.error("network namespaces need Linux, root, and iproute2 (ip, tc)")
    settings = {"mbit": args.mbit, "layers": LAYERS, "width": WIDTH, "forward": FORWARD, "backward": BACKWARD}
    output = Report(args, "scaling.py", torch.device("cpu"), "Steps behind slow links, predicted", settings=settings)
    link = link_of(on_hosts(2, args.mbit, messages)[0])
    output.add(f"alpha {number(link.latency, 3, 1e3)} ms, beta {number(link.bandwidth, 2, 1e-6)} MB/s\n")
    for ranks in args.ranks:
        results: list[Result] = []
        quiet = alone(ranks, args.repeats)
        measured = on_hosts(ranks, args.mbit, partial(steps, repeats=args.repeats))[0]
        for setting in SETTINGS:
            predicted = predict(setting, ranks, link, quiet[setting]["seconds"])
            results.append({"setting": setting, "ranks": ranks, "measured": measured[setting], "predicted": predicted})
        output.add(report(results), results)
    return 0


def report(results: Sequence[Result]) -> str:
    rows = []
    for r in results:
        measured, predicted = r["measured"], r["predicted"]
        ratio = predicted["seconds"] / measured["seconds"]
        sent = (number(predicted["sent"], 2, 1e-6), number(measured["sent"], 2, 1e-6))
        times = (number(predicted["seconds"], 1, 1e3), number(measured["seconds"], 1, 1e3))
        rows.append([r["setting"], str(r["ranks"]), *times, number(ratio if math.isfinite(ratio) else None, 2), *sent])
    header = ["setting", "processes", "predicted ms", "measured ms", "ratio", "MB sent, predicted", "MB sent, measured"]
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())

"""What saving and loading a checkpoint takes, against plain torch.distributed.checkpoint, on the disk of --folder.

    python benchmarks/checkpoint.py [--model resnet50] [--folder /scratch]

One process; the model's weights and SGD's momentum. All take turns, on one disk. torch writes its own files and syncs
them, without checksums; a format of pickles. Ours has the checksum of every file, syncs the folders too, renames, and
verifies all before it loads. "blocked" is how long the training waits: for a save beside it, the copy to the host.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lib.arguments import Parser
from lib.models import ResNet
from lib.report import Report, Result, number, percentiles, table
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import Checkpointer

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: ResNet((3, 4, 6, 3)),
    "tiny": lambda: ResNet((1,), classes=10, width=4),
}
OPERATIONS = ("save", "blocked", "load")


def make(model: str, device: torch.device) -> tuple[nn.Module, Optimizer]:
    net = MODELS[model]().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


class Torch:
    """torch.distributed.checkpoint's own files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, step: int, net: nn.Module, optimizer: Optimizer) -> tuple[float, float]:
        start = time.perf_counter()
        model, state = get_state_dict(net, optimizer)
        save({"model": model, "optimizer": state}, checkpoint_id=self.at(step))
        return (time.perf_counter() - start,) * 2

    def load(self, step: int, net: nn.Module, optimizer: Optimizer) -> float:
        start = time.perf_counter()
        model, state = get_state_dict(net, optimizer)
        whole: dict[str, Any] = {"model": model, "optimizer": state}
        load(whole, checkpoint_id=self.at(step))
        set_state_dict(net, optimizer, model_state_dict=whole["model"], optim_state_dict=whole["optimizer"])
        return time.perf_counter() - start

    def at(self, step: int) -> Path:
        return self._folder / str(step)


class Ours:
    """lesam_dist's checkpoints, written while the training waits, or beside it."""

    def __init__(self, folder: Path, device: torch.device, *, beside: bool) -> None:
        config = CheckpointConfig(keep=1, asynchronous="always" if beside else "never")
        self._folder = folder
        self._checkpointer = Checkpointer(folder, Distributed(0, 0, 1, device), config)

    def save(self, step: int, net: nn.Module, optimizer: Optimizer) -> tuple[float, float]:
        start = time.perf_counter()
        self._checkpointer.save(step, net, optimizer, {})
        blocked = time.perf_counter() - start
        if not self._checkpointer.wait():
            raise OSError(f"the checkpoint could not be written to {self._folder}")
        return time.perf_counter() - start, blocked

    def load(self, step: int, net: nn.Module, optimizer: Optimizer) -> float:
        start = time.perf_counter()
        self._checkpointer.load_latest(net, optimizer)
        return time.perf_counter() - start

    def at(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}"


def compare(args: argparse.Namespace, folder: Path) -> list[Result]:
    """torch first; ``of_torch``: each one's medians over torch's."""
    device = torch.device(args.device)
    providers = {
        "torch": Torch(folder / "torch"),
        "lesam_dist": Ours(folder / "ours", device, beside=False),
        "lesam_dist, beside the training": Ours(folder / "beside", device, beside=True),
    }
    results: list[Result] = [{"model": args.model, "provider": name} for name in providers]
    samples: list[dict[str, list[float]]] = [{name: [] for name in OPERATIONS} for _ in providers]
    net, optimizer = make(args.model, device)
    for step in range(1 + args.repeats):  # the first to warm up
        for provider, result, own in zip(providers.values(), results, samples, strict=True):
            seconds, blocked = provider.save(step, net, optimizer)
            own["save"].append(seconds)
            own["blocked"].append(blocked)
            own["load"].append(provider.load(step, net, optimizer))
            result["bytes"] = sum(path.stat().st_size for path in provider.at(step).iterdir())
        shutil.rmtree(providers["torch"].at(step))
    for result, own in zip(results, samples, strict=True):
        result["seconds"] = {name: percentiles(own[name][1:]) for name in OPERATIONS}
        result["of_torch"] = {
            name: statistics.median(own[name][1:]) / statistics.median(samples[0][name][1:]) for name in OPERATIONS
        }
    return results


def report(results: list[Result], on_cuda: bool) -> str:
    """Markdown. Seconds on a CPU go into the JSON alone: other people's jobs are in them."""
    header = ["provider", "MB", *(f"{name}, of torch's" for name in OPERATIONS)]
    header += [f"{name}, s" for name in OPERATIONS] if on_cuda else []
    rows = []
    for r in results:
        row = [r["provider"], number(r["bytes"], 2, 1e-6), *(number(r["of_torch"][name], 2) for name in OPERATIONS)]
        rows.append(row + ([number(r["seconds"][name]["p50"], 3) for name in OPERATIONS] if on_cuda else []))
    return table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    settings = {name: getattr(args, name) for name in ("model", "repeats")}
    title = f"Checkpoints of {args.model} with SGD's momentum"
    output = Report(args, "checkpoint.py", torch.device(args.device), title, settings=settings)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=args.folder) as folder:
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
        results = compare(args, Path(folder))
    output.add(report(results, on_cuda=args.device == "cuda"), results)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Parser(__doc__)
    options.add_device()
    options.add_argument("--model", choices=tuple(MODELS), default="resnet50", help="default: resnet50, 206 MB")
    options.add_argument("--folder", type=Path, metavar="PATH", help="on the disk to measure; default: the system's")
    options.add_argument("--repeats", type=int, default=5, metavar="N", help="timed turns of each; default: 5")
    options.add_files()
    args = options.parse(argv)
    if args.repeats < 1 or not (args.folder is None or args.folder.is_dir()):
        options.error("--repeats must be at least 1, --folder a folder that exists")
    return args


if __name__ == "__main__":
    main()

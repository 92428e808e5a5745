"""The seam allows text: dicts, padding, means over characters, no BatchNorm; with all processes as with one."""

from __future__ import annotations

from collections import Counter
from math import log2
from pathlib import Path
from typing import Any

import pytest
import torch

from lesam_dist.config.command_line import parse
from lesam_dist.optim import SAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.run import train_here
from lesam_dist.train.updates import Updates
from tests.parallel.processes import run
from tests.tasks.characters import PAD, Characters, Transformer, lines
from tests.told import told

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
FLAGS = (
    *("--task", "tests.tasks.characters.Characters", "--parallel.device", "cpu", "--logging.tensorboard", "false"),
    *("--data.batch_size", "16", "--optimizer.name", "lesam", "--optimizer.base", "adamw", "--optimizer.lr", "0.01"),
)


def test_it_learns_more_than_how_often_characters_are(tmp_path: Path) -> None:
    counts = Counter("".join(lines()))
    entropy = -sum(count / counts.total() * log2(count / counts.total()) for count in counts.values())
    result = train_here(parse([*FLAGS, "--epochs", "3", "--run_dir", str(tmp_path)]), ALONE)
    assert result["bits"] < entropy - 0.3


def step_of(world: Distributed, seed: int, strategy: str, micro_batches: int) -> tuple[list[Any], float]:
    """The weights after a SAM step on four lines, and its loss; each process has its own of them."""
    config = parse([*FLAGS, "--data.micro_batches", str(micro_batches), "--data.batch_size", "4"])
    task = Characters(config, world)
    torch.manual_seed(seed)
    net = Transformer().eval()  # without dropout, which differs between processes
    lengths = torch.randperm(40)[:4] + 4
    text = torch.randint(1, 128, (4, 49))
    text[torch.arange(49) >= lengths[:, None]] = PAD
    share = 4 // world.world_size
    model = wrap(net, world, strategy)  # type: ignore[arg-type]
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.05, lr=0.5)
    updates = Updates(task, *told(world), model, optimizer, None, None, 1)
    own = {"text": text[world.rank * share : (world.rank + 1) * share]}
    loss = updates.make(0, own, logged=False)
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]  # type: ignore[operator]
    return [p.detach().numpy().copy() for p in whole], float(loss)


def all_steps(world: Distributed, seed: int) -> list[tuple[list[Any], float]]:
    strategies = ("ddp", "fsdp") if world.world_size > 1 else ("none",)
    return [step_of(world, seed, name, parts) for name in strategies for parts in (1, 2)]


def test_each_character_counts_the_same(seed: int) -> None:
    """However lines are dealt to micro-batches and processes: the mean is over all characters of the batch."""
    (weights, loss), *others = all_steps(ALONE, seed)
    results = run(all_steps, 2, seed)
    for rank in range(2):
        for weights_here, _ in results[rank]:
            for value, expected in zip(weights_here, weights, strict=True):
                torch.testing.assert_close(torch.tensor(value), torch.tensor(expected), rtol=0, atol=2e-6)
    for here in others:
        assert here[1] == pytest.approx(loss, rel=1e-5)
    for first, second in zip(*results, strict=True):
        assert (first[1] + second[1]) / 2 == pytest.approx(loss, rel=1e-5)

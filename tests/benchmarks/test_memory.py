"""The memory formula against the storages that exist, and what a sharpness-aware step needs beyond a plain one."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.live_bytes import meter, storage_bytes
from lib.traffic import BASES, Base
from memory import measure, network_of
from torch import Tensor, nn

from lesam_dist import LESAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.planning.memory import Memory, Network, Strategy, predict
from tests.parallel.processes import run

ROOT = Path(__file__).parents[2]
ALONE = Distributed(0, 0, 1, torch.device("cpu"))
CLASSES: dict[Base, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
BASE_OPTIONS: dict[Base, dict[str, Any]] = {"sgd": {"lr": 0.01, "momentum": 0.9}, "adamw": {"lr": 0.01}}

# What the formula leaves out of the wide net: activations and a few scalars, beside megabytes of weights.
TRANSIENT = 1.03
SCALARS = 1024  # bytes: telemetry and the radius


class Unit(nn.Module):
    """A residual layer and a factor of one row, of which all ranks but the first have nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, width))
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.factor * self.layer(x)
        return x + moved


def net(width: int) -> nn.Module:
    """Odd numbers of rows everywhere; the head has two, which is less than three ranks."""
    return nn.Sequential(nn.Linear(5, width), Unit(width), Unit(width), Unit(width), nn.Linear(width, 2))


def groups(module: nn.Module, biases_perturbed: bool) -> list[dict[str, Any]]:
    """Biases in a group of their own."""
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    others = [p for name, p in module.named_parameters() if not name.endswith("bias")]
    return [{"params": others}, {"params": biases, "perturb": biases_perturbed}]


def network(width: int, biases_perturbed: bool) -> Network:
    """What the formula is told of `net`. Only biases have one dimension."""

    def mark(weights: Any) -> Any:
        return [w._replace(perturbed=biases_perturbed or len(w.shape) > 1) for w in weights]

    stem, units, head = network_of(net(width), ["Unit"])
    return Network(mark(stem), [mark(unit) for unit in units], mark(head))


def lesam_bytes(
    world: Distributed, strategy: Strategy, base: Base, width: int, biases_perturbed: bool = True
) -> Memory:
    def optimize(module: nn.Module) -> LESAM:
        params = groups(module, biases_perturbed)
        return LESAM(params, CLASSES[base], sigma=0.3, rho_max=0.2, **BASE_OPTIONS[base])

    return measure(world, strategy, lambda: net(width), optimize, (5,), ["Unit"])


def plain_bytes(world: Distributed, strategy: Strategy, base: Base, width: int) -> Memory:
    """The base optimizer alone: the same network, the same batch, no copies."""
    with meter(world.device) as counter:
        module = wrap(net(width), world, strategy, wrap_classes=["Unit"])
        optimizer = CLASSES[base](module.parameters(), **BASE_OPTIONS[base])
        images, labels = torch.randn(2, 5), torch.arange(2)
        for _ in range(2):
            optimizer.zero_grad()
            counter.record()
            nn.functional.cross_entropy(module(images), labels).backward()
            params = list(module.parameters())
            state = [v for own in optimizer.state.values() for v in own.values()]
            persistent = storage_bytes(params), storage_bytes(p.grad for p in params), 0, storage_bytes(state)
            peak = counter.peak()
            optimizer.step()
    return Memory(*persistent, transient=peak - sum(persistent))


def every_case(world: Distributed, width: int) -> dict[tuple[Strategy, Base, bool], Memory]:
    """LE-SAM's bytes on this process, by strategy, base optimizer and whether biases are perturbed."""
    strategies: tuple[Strategy, ...] = ("none",) if world.world_size == 1 else ("ddp", "fsdp")
    cases = itertools.product(strategies, BASES, (True, False))
    return {case: lesam_bytes(world, *case[:2], width, case[2]) for case in cases}


def against_plain(world: Distributed, width: int) -> dict[tuple[Strategy, Base], tuple[Memory, Memory]]:
    """LE-SAM's bytes and the base optimizer's."""
    strategies: tuple[Strategy, ...] = ("none",) if world.world_size == 1 else ("ddp", "fsdp")
    cases = itertools.product(strategies, BASES)
    return {case: (lesam_bytes(world, *case, width), plain_bytes(world, *case, width)) for case in cases}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_stays_is_as_predicted_to_the_byte(ranks: int) -> None:
    """Parameters, gradients, copies and state on every rank; under FSDP2 with uneven and empty shards."""
    width = 7
    by_rank = [every_case(ALONE, width)] if ranks == 1 else run(every_case, ranks, width)
    for rank, measured in enumerate(by_rank):
        for (strategy, base, biases), found in measured.items():
            expected = predict(network(width, biases), strategy, base, ranks, rank)
            assert found[:4] == expected[:4], (rank, strategy, base, biases)
    sizes = [(p.numel(), p.ndim > 1) for p in net(width).parameters()]
    for biases in (True, False):
        perturbed = 4 * sum(numel for numel, is_matrix in sizes if is_matrix or biases)
        for strategy in {strategy for strategy, *_ in by_rank[0]}:
            copies = [measured[strategy, "sgd", biases].copies for measured in by_rank]
            assert (sum(copies) if strategy == "fsdp" else copies[0]) == perturbed
            if strategy == "fsdp":
                assert copies[-1] < copies[0], "no rank has an empty shard"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_needs_one_copy_more_than_a_plain_one(ranks: int) -> None:
    """Nothing else that stays, and nothing else at the peak; and the peak is the formula's."""
    width = 301
    [results, *_] = [against_plain(ALONE, width)] if ranks == 1 else run(against_plain, ranks, width)
    for (strategy, base), (lesam, plain) in results.items():
        expected = predict(network(width, True), strategy, base, ranks)
        assert lesam[:2] == plain[:2]
        assert lesam.state == plain.state
        assert plain.copies == 0
        assert lesam.copies == expected.copies
        assert abs(lesam.peak - plain.peak - expected.copies) < SCALARS, (strategy, base)
        assert expected.peak <= lesam.peak <= TRANSIENT * expected.peak
        assert expected.transient <= lesam.transient


def test_the_formula_on_a_list_done_by_hand() -> None:
    """Three ranks, float32: a stem of 4 rows, a unit of 5 x 2 and one of 1 x 2, a head of 2 rows."""
    params = [nn.Linear(1, 4, bias=False), *(nn.Linear(2, n, bias=False) for n in (5, 1)), nn.Linear(1, 2, bias=False)]
    stem, first, second, head = (network_of(module, []).stem for module in params)
    by_hand = Network(stem, [first, second], head)
    # Rows per rank: 2, 2 (rank 2 has 1), 1 (rank 0 alone), 1 (rank 2 has none).
    assert predict(by_hand, "fsdp", "sgd", 3, rank=0)[:4] == (4 * 9, 4 * 9, 4 * 9, 4 * 9)
    assert predict(by_hand, "fsdp", "adamw", 3, rank=2)[:4] == (4 * 9, 4 * 9, 4 * 2, 8 * 2 + 16)
    # Gathered: 12 for the first unit, 6 for the second, 9 for the root. The gradient of the first one is 10 elements,
    # and the second one's shard 2; while all shards of gradients are 9.
    assert predict(by_hand, "fsdp", "sgd", 3).transient == 4 * (12 + 10 + 6 + 2 + 9 + 2 - 9)
    assert predict(by_hand, "ddp", "sgd", 3).transient == 4 * 10
    assert predict(by_hand, "none", "sgd").peak == 4 * 4 * 18


def test_the_script(tmp_path: Path) -> None:
    """In processes of its own, at toy sizes: what it prints and what it writes."""
    out = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    models = ["--device", "cpu", "--models", "resnet_tiny,vit_tiny", "--base", "adamw"]
    command = [sys.executable, "benchmarks/memory.py", *models, *out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.md").read_text().split() == done.stdout.split()
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * 3
    assert len({row.count("|") for row in rows}) == 1
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["environment"].keys() >= {"device", "torch", "commit", "command", "date"}
    found = [(r["model"], r["strategy"], r["ranks"], r["rank"]) for r in document["results"]]
    assert found == [
        *((model, "none", 1, 0) for model in ("resnet_tiny", "vit_tiny")),
        *((m, s, 2, rank) for rank in (0, 1) for m in ("resnet_tiny", "vit_tiny") for s in ("ddp", "fsdp")),
    ]
    for result in document["results"]:
        measured, predicted = result["measured"], result["predicted"]
        assert all(measured[key] == predicted[key] for key in Memory._fields if key != "transient")
        assert measured["transient"] >= predicted["transient"]
        assert math.isfinite(measured["transient"])

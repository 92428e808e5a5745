"""PGD on linear models in closed form, on a small network by what it is shown, and on several processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lesam_dist.analysis.engine.accuracy import Accuracy
from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Batch, Objective
from lesam_dist.analysis.engine.starts import random_starts
from lesam_dist.analysis.measures.robustness import passes, robustness
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.classification.pgd import Norm, Scale
from tests.analysis.corrupted_files import write_files
from tests.analysis.nets import conv_net, state
from tests.analysis.quadratics import F64, in_batches
from tests.parallel import processes

KINDS = ("shot_noise", "fog")
NORMS: list[Norm] = ["linf", "l2"]
MEAN, STD = (0.3, 0.6), (0.2, 0.45)


def channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=F64).view(-1, 1, 1)


class Binary(nn.Module):
    """Logits (0, w x + b) of images (B, 2, 3, 3)."""

    def __init__(self, w: Tensor, b: float = 0.0) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x: Tensor) -> Tensor:
        out = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(out), out], dim=1)


class Shown(nn.Module):
    """A model that remembers the images that it was shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        out: Tensor = self.model(x)
        return out


def attack(model: nn.Module, batches: list[Batch], norm: Norm, eps: float, **how: Any) -> Accuracy:
    other: dict[str, Any] = {"linf": (), "l2": ()} | {norm: (eps,)}
    return robustness(Objective(model, batches), **other, **how).attacked[norm, eps]


def middle(n: int) -> Tensor:
    """Pixels far from 0 and 1, (n, 2, 3, 3)."""
    return torch.rand(n, 2, 3, 3, dtype=F64) * 0.1 + 0.45


def known(norm: Norm, eps: float, n: int, scale: Scale) -> tuple[Binary, Tensor, Tensor, Tensor]:
    """A linear model of normalised images, pixels, labels, and the margins that are left under the worst attack.

    They are the margins of random images, less ``eps * ||w||`` in the dual norm, none nearer to 0 than 1 % of that: in
    pixels, of which the model's weights are w = weights / std.
    """
    weights = torch.randn(2, 3, 3, dtype=F64)
    w = (weights / channels(scale.std)).flatten()
    loss = eps * float(w.abs().sum() if norm == "linf" else w.norm())
    labels = torch.randint(2, (n,))
    sides = 2 * labels - 1
    b = float((weights * channels(scale.mean) / channels(scale.std)).sum() - 0.5 * w.sum())
    x = middle(n).flatten(1)
    left = loss * (torch.rand(n, dtype=F64) * 1.5 + 0.01) * (2 * torch.randint(2, (n,)) - 1)
    wanted = (left + loss) * sides  # of (x - 1/2) w
    x += ((wanted - (x - 0.5) @ w) / w.square().sum())[:, None] * w
    return Binary(weights.flatten(), b), x.view(n, 2, 3, 3), labels, left


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [Scale(), Scale(MEAN, STD)], ids=["as they are", "normalised"])
def test_a_linear_model_loses_eps_times_the_dual_norm(seed: int, norm: Norm, scale: Scale) -> None:
    eps = 0.01
    model, x, labels, left = known(norm, eps, 60, scale)
    assert float((x - 0.5).abs().max()) < 0.45, "nothing is clipped"
    shown = Shown(model)
    x = (x - channels(scale.mean)) / channels(scale.std)
    how = {"mean": scale.mean, "std": scale.std, "seed": seed}
    # From the start l_inf needs 8 steps of eps/4 at most. In l_2 the angle shrinks by 8/9 a step.
    found = attack(shown, in_batches(x, labels, 60), norm, eps, steps=10 if norm == "linf" else 150, **how)
    assert found.right == int((left > 0).sum())
    margins = (2 * labels - 1) * model(shown.seen[-1])[:, 1]
    torch.testing.assert_close(margins.detach(), left, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_each_step_of_a_linear_model(seed: int, norm: Norm) -> None:
    """From what it was shown before: a step down the margin, onto the ball, and only then into the box."""
    eps, w = 0.3, 0.1 * torch.randn(18, dtype=F64)
    x, labels = (torch.rand(12, 2, 3, 3, dtype=F64) * 1.6 - 0.3).clamp(0, 1), torch.randint(2, (12,))
    shown = Shown(Binary(w))
    attack(shown, [(x, labels)], norm, eps, seed=seed)
    iterates = [(seen - x).flatten(1) for seen in shown.seen[1:]]  # the first are the clean images
    assert len(iterates) == 11
    for before, after in pairwise(iterates):
        for i in range(12):
            down = w * (1 - 2 * labels[i])
            if norm == "linf":
                moved = (before[i] + eps / 4 * down.sign()).clamp(-eps, eps)
            else:
                moved = before[i] + eps / 8 * down / down.norm()
                moved = moved * min(1.0, eps / float(moved.norm()))
            pixels = x[i].flatten()
            torch.testing.assert_close(after[i], (pixels + moved).clamp(0, 1) - pixels, rtol=1e-6, atol=1e-9)


def pictures(n: int) -> Tensor:
    """Pixels of which many are 0 and 1, (n, 2, 4, 4)."""
    return (torch.rand(n, 2, 4, 4, dtype=F64) * 1.6 - 0.3).clamp(0, 1)


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - channels(MEAN)) / channels(STD)


@pytest.mark.parametrize("norm", NORMS)
def test_all_iterates_are_in_the_ball_and_in_the_box(seed: int, norm: Norm) -> None:
    net, pixels, labels = Shown(conv_net()), pictures(12), torch.randint(3, (12,))
    eps = 0.3
    attack(net, [(normalised(pixels), labels)], norm, eps, mean=MEAN, std=STD, seed=seed)
    assert len(net.seen) == 12, "clean, ten gradients, and the last iterate"
    assert torch.equal(net.seen[0], normalised(pixels))
    for seen in net.seen[1:]:
        here = seen * channels(STD) + channels(MEAN)
        assert float((here - 0.5).abs().max()) < 0.5 + 1e-12
        delta = (here - pixels).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert float(size.max()) < eps * (1 + 1e-9)
        assert float(size.min()) > 0


@pytest.mark.parametrize("norm", NORMS)
def test_starts_fill_the_box_and_the_ball(seed: int, norm: Norm) -> None:
    n = 2000
    starts = random_starts(norm, torch.empty(n, 1, 2, 2, dtype=F64), seed, 0).flatten(1)
    lengths = starts[:, 0].add(1).div(2) if norm == "linf" else starts.norm(dim=1)
    share = torch.arange(1, n + 1) / n
    # Dvoretzky, Kiefer and Wolfowitz: a uniform sample is farther off once in 10^9.
    assert float((lengths.sort().values - share).abs().max()) < math.sqrt(math.log(2e9) / (2 * n)) + 1 / n
    assert float(starts.mean(0).abs().max()) < 6.5 / math.sqrt(n), "in all directions: a standard deviation is below 1"
    again = random_starts(norm, torch.empty(3, 1, 2, 2, dtype=F64), seed, 5).flatten(1)
    assert torch.equal(again, starts[5:8])
    assert not torch.equal(again, random_starts(norm, torch.empty(3, 1, 2, 2, dtype=F64), seed + 1, 5).flatten(1))


def test_eps_of_0_is_clean_and_nothing_else_changes(seed: int) -> None:
    net, labels = Shown(conv_net().float()).train(), torch.randint(3, (15,))
    x = normalised(1.002 * pictures(15) - 0.001).float()  # a little out of the box, as by rounding
    before = state(net)
    objective = Objective(net, in_batches(x, labels, 15))
    found = robustness(objective, linf=(0.0,), l2=(0.0,), mean=MEAN, std=STD, seed=seed, steps=2)
    assert all(torch.equal(seen, x) for seen in net.seen), "bit for bit"
    error = objective.loss_and_error()[1]
    assert found.clean.percent == pytest.approx(100 - error)
    assert found.attacked == {("linf", 0.0): found.clean, ("l2", 0.0): found.clean}
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    assert all(p.grad is None for p in net.parameters())


def test_accuracy_and_its_error() -> None:
    found = Accuracy(30, 40)
    assert found.percent == 75
    draws = torch.tensor([1.0] * 30 + [0.0] * 10, dtype=F64)
    assert found.standard_error == pytest.approx(100 * float(draws.std(correction=0)) / 40**0.5)
    assert found.numbers()["accuracy"] == 75


def shared(world: Distributed, seed: int, size: int, root: Path) -> dict[str, Any]:
    """Uneven shares of 23 images; each image's last iterates, by rank; and what corruptions do to 23 others."""
    torch.manual_seed(seed)
    net, x, labels = Shown(conv_net()), normalised(pictures(23)), torch.randint(3, (23,))
    ends = {1: [0, 23], 2: [0, 16, 23], 3: [0, 3, 14, 23]}[world.world_size]
    own = slice(ends[world.rank], ends[world.rank + 1])
    batches = in_batches(x[own], labels[own], size)
    found = robustness(Objective(net, batches, world), linf=(0.1,), l2=(0.5,), mean=MEAN, std=STD, seed=seed)
    each = iter(net.seen[len(batches) :])
    last = [torch.cat([[next(each) for _ in range(11)][-1] for _ in batches]) for _ in NORMS]
    cells: list[Any] = []
    if world.world_size < 3:  # importing what makes corruptions takes a while
        large, net = torch.rand(23, 3, 32, 32, dtype=F64), nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)).double()
        objective = Objective(net, in_batches(large[own], labels[own], size), world)
        how: dict[str, Any] = {"linf": (), "l2": (), "seed": seed, "severities": (3,), "corruptions": KINDS}
        for files in (None, root):
            cells += robustness(objective, corruptions_root=files, **how).numbers()["corrupted"]["cells"]
    return found.numbers() | {"last": last, "cells": cells}


def test_processes_and_sizes_of_batches_change_nothing(seed: int, tmp_path: Path) -> None:
    write_files(tmp_path, KINDS, 23, seed, 3)
    alone = processes.run(shared, 1, seed, 23, tmp_path)[0]
    for count, size in ((1, 5), (2, 4), (3, 9)):
        found = processes.run(shared, count, seed, size, tmp_path)
        for i, last in enumerate(alone["last"]):
            torch.testing.assert_close(torch.cat([each["last"][i] for each in found]), last, rtol=1e-9, atol=1e-9)
        for each in found:
            assert each["clean"] == alone["clean"]
            assert each["attacked"] == alone["attacked"]
            for name in ("nll", "ece"):
                assert each["calibration"][name] == pytest.approx(alone["calibration"][name], rel=1e-9)
            for here, there in zip(each["cells"], alone["cells"] if count < 3 else (), strict=True):
                assert here.pop("kind") == there["kind"]
                assert here == pytest.approx({name: there[name] for name in here}, rel=1e-9)


def test_what_was_interrupted_makes_the_missing_passes_alone(seed: int, tmp_path: Any) -> None:
    objective = Objective(conv_net(), in_batches(normalised(pictures(9)), torch.randint(3, (9,)), 4))
    how: dict[str, Any] = {"mean": MEAN, "std": STD, "seed": seed, "steps": 3, "l2": (0.1,)}
    whole = robustness(objective, linf=(0.05, 0.1), **how)
    forwards, backwards = passes((0.05, 0.1), (0.1,), 3)
    assert objective.passes == {"forward": forwards, "backward": backwards} == {"forward": 13, "backward": 9}
    robustness(objective, linf=(0.05,), journal=Journal(tmp_path / "journal", {}), **how)
    objective.passes.update(forward=0, backward=0)
    seen: list[float] = []
    again = robustness(
        objective, linf=(0.05, 0.1), journal=Journal(tmp_path / "journal", {}), on_passes=seen.append, **how
    )
    assert again == whole
    assert objective.passes == {"forward": 4, "backward": 3}
    assert seen == sorted(seen)
    assert seen[-1] == forwards + backwards


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"linf": (0.1, -0.1)}, r"^linf is -0\.1: it must be from 0 to 1"),
        (
            {"linf": (8.0,)},
            r"^linf is 8: it must be from 0 to 1, for pixels from 0 to 1; eight grey levels are 8/255\.$",
        ),
        ({"l2": (-0.5,)}, r"^l2 is -0\.5: it must be finite and at least 0"),
        ({"l2": (float("nan"),)}, r"^l2 is nan: it must be finite and at least 0"),
        ({"steps": 0}, r"^steps is 0: it must be at least 1\.$"),
        ({}, r"^pixels are from -.* to .* once mean and std are undone, and should be from 0 to 1: give the mean"),
    ],
)
def test_what_is_out_of_range_is_refused(wrong: dict[str, Any], message: str) -> None:
    objective = Objective(conv_net(), [(normalised(pictures(4)), torch.zeros(4, dtype=torch.long))])
    with pytest.raises(UserError, match=message):
        robustness(objective, **wrong)
    assert objective.passes == {"forward": 0, "backward": 0}, "refused before anything is computed"

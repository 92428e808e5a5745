"""Every provider against float64 on fresh random lists, and what happens to one that is wrong."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from lib.problem import Problem, make_problem
from lib.providers import PROVIDERS, Compile, Eager, Foreach, Ours, Provider, base_optimizer, minimal_passes
from lib.reference64 import expected_steps, wrong
from lib.timing import CpuClock, Deadline
from lib.traffic import BASES, Base

from kernels import compare, report  # noqa: TID251 (the script benchmarks/kernels.py)

CPU = torch.device("cpu")


class EagerCompile(Compile):
    """The functions that `Compile` compiles, captured but not lowered: no compiler is needed."""

    compiler = staticmethod(functools.partial(torch.compile, backend="aot_eager"))

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return None


class WrongRadius(Eager):
    """Climbs one per cent too far."""

    def build(self) -> None:
        super().build()
        self.simple.sigma *= 1.01


class ForgetsToRestore(Foreach):
    def descent(self) -> None:
        self.optimizer.step()


class WrongMomentum(Foreach):
    """Right weights after the first step, another momentum."""

    def descent(self) -> None:
        super().descent()
        for p in self.params:
            self.optimizer.state[p]["momentum_buffer"].mul_(0.9)


class Broken(Foreach):
    def ascent(self) -> None:
        raise RuntimeError("a peer's bug")


def problem(seed: int, dtype: torch.dtype = torch.float32) -> Problem:
    """A dozen tensors of 0 to 3 dimensions, 1 to a few hundred elements."""
    rng = random.Random(seed)
    shapes = [tuple(rng.randint(1, 7) for _ in range(rng.randint(1, 3))) for _ in range(12)]
    return make_problem(shapes, dtype, CPU, seed)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROVIDERS)
def test_agrees_with_float64(name: str, dtype: torch.dtype, base: Base, seed: int) -> None:
    provider = EagerCompile if name == "compile" else PROVIDERS[name]
    reason = provider.unavailable(CPU)
    if reason:
        pytest.skip(reason)
    task = problem(seed, dtype)
    assert wrong(provider, task, base, expected_steps(task, base)) is None


@pytest.mark.parametrize("base", BASES)
def test_the_reference_is_torchs_own_update(base: Base, seed: int) -> None:
    """Without a perturbation left, two steps are two steps of torch.optim in float64."""
    task = problem(seed)
    params = [torch.nn.Parameter(w.double()) for w in task.weights]
    optimizer = base_optimizer(params, base, task.hyper)
    for step in expected_steps(task, base):
        for p, g in zip(params, task.second, strict=True):
            p.grad = g.double()
        optimizer.step()
        torch.testing.assert_close([p.detach() for p in params], step.weights, rtol=1e-12, atol=1e-14)
    first = expected_steps(task, base)[0].perturbed
    distance = sum(float((a - b).square().sum()) for a, b in zip(first, task.weights, strict=True)) ** 0.5
    assert distance == pytest.approx(task.rho, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("provider", "base", "message"),
    [
        (ForgetsToRestore, "sgd", "wrong weights after step 1"),
        (ForgetsToRestore, "adamw", "wrong weights after step 1"),
        (WrongMomentum, "sgd", "wrong momentum after step 1"),
    ],
)
def test_what_is_wrong_is_named(
    provider: type[Provider], base: Base, message: str, dtype: torch.dtype, seed: int
) -> None:
    task = problem(seed, dtype)
    assert str(wrong(provider, task, base, expected_steps(task, base))).startswith(message)


def test_a_radius_one_per_cent_off_is_noticed(seed: int) -> None:
    task = problem(seed)
    assert "wrong perturbed weights in step 1" in str(wrong(WrongRadius, task, "sgd", expected_steps(task, "sgd")))


def test_a_wrong_provider_gets_no_number(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, provider in (("forgets", ForgetsToRestore), ("broken", Broken), ("lesam_dist", Ours)):
        monkeypatch.setitem(PROVIDERS, name, provider)
    names = ["lesam_dist", "forgets", "broken"]
    results = compare("random", "sgd", problem(seed), names, CpuClock(), 2, Deadline(None))
    ours, forgets, broken = results
    assert ours["status"] == "ok"
    assert ours["seconds"]["device"]["phase"]["p50"] > 0
    assert forgets["status"].startswith("wrong weights")
    assert broken["status"] == "failed: RuntimeError: a peer's bug"
    assert "seconds" not in forgets
    assert "seconds" not in broken
    text = report(results)
    assert "| forgets | wrong weights after step 1" in text
    assert "| broken | failed: RuntimeError: a peer's bug | - | - |" in text


@pytest.mark.parametrize(("base", "update"), [("sgd", 5), ("adamw", 7)])
def test_passes(base: Base, update: int) -> None:
    """Ascent: norm 1, climb 4. Descent: the update's, and 1 where the second gradient is checked."""
    assert minimal_passes(base, "ascent", checks_second=True) == 5
    assert minimal_passes(base, "descent", checks_second=True) == 1 + update
    assert minimal_passes(base, "phase", checks_second=False) == 5 + update
    passes = {name: provider.passes(base) for name, provider in PROVIDERS.items()}
    assert passes == {
        "lesam_dist": 6 + update,
        "lesam_unchecked": 5 + update,
        "foreach": 8 + update,
        "foreach_swap": 6 + update,
        "compile": 5 + update,
        "pytorch_optimizer": 12 + update,
        "eager": {"sgd": 19, "adamw": 28}[base],
    }

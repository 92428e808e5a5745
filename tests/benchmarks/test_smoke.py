"""The checks of a first GPU run: what is right passes, and what is wrong is named and takes nothing else with it."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import ab
import pytest
import ranks
import replay
import smoke
import torch
from lib.launches import Launches, as_table, time_launches
from lib.problem import Problem, make_problem
from lib.reference64 import TOLERANCE, _error, expected_steps
from lib.timing import Call, CpuClock, CudaClock, Deadline
from lib.traffic import BASES, Base
from torch import Tensor

import kernels  # noqa: TID251 (the script benchmarks/kernels.py)

CPU = torch.device("cpu")


class PretendGpu(CpuClock):
    def host_seconds(self, call: Call) -> tuple[float, float]:
        seconds = self.device_seconds(call)
        return seconds, seconds


def problem(seed: int) -> Problem:
    return make_problem([(33, 5), (7,), (1,)], torch.float32, CPU, seed)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", smoke.DTYPES)
def test_every_launcher_is_right(dtype: str, offset: int, seed: int) -> None:
    results = [smoke.check(name, dtype, offset, CPU, seed) for name in smoke.LAUNCHERS]
    assert {r["status"] for r in results} == {"ok"}


def test_what_a_launcher_gets_wrong_is_named(
    seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = smoke.sum_sq

    def crashes(*_: object) -> None:
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(smoke, "sum_sq", lambda *args: real(*args) * (1 + 1e-5))
    monkeypatch.setattr(smoke, "dots", crashes)
    monkeypatch.setattr(smoke, "restore", lambda table: table)  # forgets to
    options = ["--device", "cpu", "--launchers", "sum_sq,dots,restore,restore_sgd", "--dtypes", "float32"]
    assert smoke.main([*options, "--seed", str(seed)]) == 1
    stdout = capsys.readouterr().out
    rows = {line.split(" | ")[0]: line for line in stdout.splitlines()}
    assert rows["| sum_sq"].count("**wrong** ") == 2
    assert rows["| dots"].count("**failed**") == rows["| restore"].count("**failed**") == 2
    assert "**" not in rows["| restore_sgd"]
    assert "- failed: RuntimeError: CUDA error: misaligned address (2 times, first dots float32)" in stdout
    assert "elements of tensor 0 differ (2 times, first restore float32)" in stdout
    assert "2 of 8 are right" in stdout


def test_an_error_that_is_nan_is_not_right() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert smoke.error(nan, torch.ones(2, dtype=torch.float64)) == float("inf")


class Event:
    """CUDA's, on a clock of its own, which moves a millisecond with every event."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        Event.now += 1e-3
        self.at = Event.now

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def busy(seconds: float) -> None:
    """What keeps the device of these events busy."""
    Event.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> CudaClock:
    """A GPU's clock, as far as it goes without one."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: busy(1e-9 * cycles), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return CudaClock(CPU)


def test_calls_in_a_row_are_timed_one_by_one(clock: CudaClock) -> None:
    calls: list[Call] = [lambda: busy(0.02), lambda: None, lambda: busy(0.05)]
    assert clock.each_device_seconds(calls) == pytest.approx([0.021, 0.001, 0.051])


def test_each_kernel_beside_what_others_take(clock: CudaClock, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of kernels.py that a CPU leaves out."""
    monkeypatch.setattr(clock, "copy_bandwidth", lambda: 3e12)
    task = problem(seed)
    results = kernels.compare("m", "sgd", task, ["lesam_dist", "foreach"], clock, 1, Deadline(None))
    text = kernels.each_kernel(results, "sgd", task, clock, 1)
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == [
        *("| sum_sq g", "| perturb", "| sum_sq g_hat", "| restore_sgd", "| all")
    ]
    assert [k["kernel"] for k in results[0]["kernels"]] == ["sum_sq g", "perturb", "sum_sq g_hat", "restore_sgd"]
    assert "kernels" not in results[1]
    assert kernels.each_kernel(results[1:], "sgd", task, clock, 1) == ""


@pytest.mark.parametrize("base", BASES)
def test_the_launches_that_are_timed_are_a_step(base: Base, seed: int) -> None:
    """Against float64, two steps; their bytes are the table's in kernels/README.md."""
    task = problem(seed)
    launches = Launches(task, base)
    before = [w.double() for w in task.weights]
    for expected in expected_steps(task, base):
        for launch in (*launches.ascent, *launches.descent):
            launch.call()
        assert _error(launches.weights, expected.weights, before) <= TOLERANCE[torch.float32]
        before = expected.weights
    (each,) = time_launches({"": launches}, CpuClock(), 1).values()
    elements = sum(w.numel() for w in task.weights)
    assert [(k["kernel"], k["bytes"] // elements) for k in each] == [
        ("sum_sq g", 4),
        ("perturb", 16),
        ("sum_sq g_hat", 4),
        (f"restore_{base}", 20 if base == "sgd" else 28),
    ]


def test_the_table_of_kernels() -> None:
    kernels = [
        {"kernel": "perturb", "bytes": 3e8, "seconds": {"p20": 1e-4, "p50": 1.25e-4, "p80": 2e-4}},
        {"kernel": "sum_sq g", "bytes": 3e8, "seconds": dict.fromkeys(("p20", "p50", "p80"), 1e-4)},
    ]
    rows = as_table(kernels, 3e12).splitlines()[2:]
    assert rows[0] == "| perturb | 0.1250 (0.1000-0.2000) | 300.0 | 2400 | 80 % | 0.1000 | 1.25 |"
    assert rows[2] == "| all | 0.2250 (0.2000-0.3000) | 600.0 | 2667 | 89 % | 0.2000 | 1.12 |"


def test_variants_of_the_kernels(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one makes the default's step; a wrong one and one that does not compile get no number."""

    def off(task: Problem, base: Base) -> Launches:
        launches = Launches(task, base)
        with torch.no_grad():
            launches.weights[0][0, 0] += 0.01
        return launches

    def broken(task: Problem, base: Base) -> Launches:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(ab, "VARIANTS", {**ab.VARIANTS, "off": off, "broken": broken})
    results = ab.compare("m", "sgd", problem(seed), list(ab.VARIANTS), PretendGpu(), 1)
    status = {r["variant"]: r["status"] for r in results}
    assert status.pop("off").startswith("weights differ by")
    assert status.pop("broken") == "failed: RuntimeError: out of resources"
    assert set(status.values()) == {"ok"}
    rows = [line for line in ab.report(results, on_cuda=True).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2].split(" | ")[6] == "1.000"
    assert " ms" not in ab.report(results, on_cuda=False)


def test_warps_change_what_is_launched(seed: int) -> None:
    launched: list[dict[str, Any]] = []
    launches = Launches(problem(seed), "sgd")
    launches.table.launch = lambda *_, **constants: launched.append(constants)  # type: ignore[assignment]
    default = [launch.call() for launch in launches.ascent] and list(launched)
    launched.clear()
    for launch in ab.with_warps(launches, 4).ascent:
        launch.call()
    assert [c["num_warps"] for c in launched] == [4, 4]
    assert launched[0]["TYPES"] == tuple((dtype, block // 2) for dtype, block in default[0]["TYPES"])
    assert launched[1]["BLOCK"] * 2 == default[1]["BLOCK"]


def test_a_replay_that_differs_is_an_error(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay.check(replay.replays, "sgd", {}, CPU, seed, 1) == "ok"
    made = itertools.count()

    class Drifts(replay.Model):
        def schedule(self, number: int) -> None:
            super().schedule(number)
            if number == replay._WARM_UP + 1 and next(made) % 2:
                self.optimizer.param_groups[0]["lr"] *= 1.001

    monkeypatch.setattr(replay, "Model", Drifts)
    outcome = replay.check(replay.replays, "sgd", {}, CPU, seed, 2)
    assert outcome == "failed: ArithmeticError: 5 tensors differ after step 2"


def test_ranks_are_compared_with_one_process(seed: int) -> None:
    """`tests/benchmarks/test_gpu.py` has the processes."""
    args = argparse.Namespace(device="cpu", ranks=2, seed=seed)
    cases = list(itertools.product(("ddp", "fsdp"), ranks.BASES))
    right: list[list[Tensor]] = [ranks.train(None, *case, CPU, seed) for case in cases]
    wrong = [right[0], [right[1][0] * 1.001, *right[1][1:]], right[2]]
    results = ranks.compare([right, right], args)
    assert [r["status"] for r in results] == ["ok"] * 4
    results = ranks.compare([wrong, [right[0], wrong[1], [w + 1e-7 for w in right[2]]]], args)
    assert [r["status"] for r in results] == ["ok", "wrong weights", "ranks differ", "not run"]
    results = ranks.compare([right, [["failed to gather"]]], args)
    assert [r["status"] for r in results] == ["failed: failed to gather", *["not run"] * 3]

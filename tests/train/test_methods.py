"""Every method by one word in the config, and the epochs in which it works."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from lesam_dist import optim
from lesam_dist.config.schema import OptimizerConfig
from lesam_dist.errors import UserError
from lesam_dist.optim.engine.registry import methods
from lesam_dist.train.build import build_optimizer
from lesam_dist.train.methods import method_arguments
from lesam_dist.train.telemetry import read_metrics
from tests.conftest import Command

METHODS = {name: method for name, method in methods().items() if method.module.startswith("lesam_dist.")}


def test_every_method_of_the_library_has_a_name() -> None:
    values = [getattr(optim, name) for name in optim.__all__]
    exported = {v for v in values if isinstance(v, type) and issubclass(v, optim.SharpnessAware)}
    assert {method.load() for method in METHODS.values()} == exported - {optim.SharpnessAware}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_with_every_method(command: Command, small: tuple[str, ...], tmp_path: Path, name: str) -> None:
    status, out, err = command(*small, "--epochs", "2", "--run_dir", tmp_path / "run", "--optimizer.name", name)
    assert (status, err) == (0, "")
    assert f"{name} on sgd" in out
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    assert all(line["skipped"] == 0 and line["loss"] is not None for line in lines)
    assert any(line["rho"] > 0 for line in lines)


@pytest.mark.parametrize("name", METHODS)
def test_values_of_the_config_arrive(name: str, seed: int) -> None:
    """In the class's own signature, in which no argument may be forgotten."""
    cls = METHODS[name].load()
    keywords = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    given = {p.name: p.default / 2 for p in keywords if isinstance(p.default, float)}
    arguments = method_arguments(OptimizerConfig(name=name, args=given, scope="local"))
    assert given
    assert {p.name: arguments[p.name] for p in keywords} == {p.name: given.get(p.name, p.default) for p in keywords}
    assert not {"momentum", "lr"} & arguments.keys()
    assert arguments["scope"] == "local"
    assert ("ascent_interval" in arguments) == (name != "looksam")


def test_a_method_of_ones_own(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    """By its import path alone: trained, saved, and resumed with the same arguments only."""
    run_dir = tmp_path / "run"
    flags = (*small, "--optimizer.name", "tests.halves:Halved", "--run_dir", run_dir)
    status, out, err = command(*flags, "--optimizer.args.part", "0.2")
    assert (status, err) == (0, "")
    assert "tests.halves:Halved on sgd" in out
    lines = [line for line in read_metrics(run_dir) if line["split"] == "train"]
    assert [line["rho"] for line in lines] == pytest.approx([0.1 * 0.2] * 9)
    status, _, err = command(*flags, "--resume", "auto")
    assert status == 2
    assert "optimizer.args.part: 0.2 then, 0.5 now" in err
    assert command("--config", run_dir / "config.yaml", "--resume", "auto")[0] == 0


def test_null_keeps_a_methods_default() -> None:
    model = nn.Linear(2, 2)
    for name, rho in (("sam", 0.05), ("asam", 0.5), ("msam", 3.0)):
        assert build_optimizer(model, OptimizerConfig(name=name)).param_groups[0]["rho"] == rho


def test_param_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    flags = {"decay_norm_and_bias": False, "weight_decay": 0.1}
    groups = build_optimizer(model, OptimizerConfig(name="asam", **flags)).param_groups  # type: ignore[arg-type]
    found = {id(p): (group["weight_decay"], group["adaptive"]) for group in groups for p in group["params"]}
    names = {n: found[id(p)] for n, p in model.named_parameters()}
    expected = {"0.weight": (0.1, True), "0.bias": (0.0, False), "1.weight": (0.0, True), "1.bias": (0.0, False)}
    assert names == expected
    groups = build_optimizer(model, OptimizerConfig(name="samon")).param_groups
    assert [(group["perturb"], len(group["params"])) for group in groups] == [(False, 2), (True, 2)]
    with pytest.raises(UserError, match="samon but the model has nothing that it perturbs"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(name="samon"))
    with pytest.raises(UserError, match=r"wsam.*|WSAM: gamma is 1.0"):
        build_optimizer(model, OptimizerConfig(name="wsam", args={"gamma": 1.0}))
    with pytest.raises(UserError, match="GSAM: scope is 'local', but its update uses the first gradient"):
        build_optimizer(model, OptimizerConfig(name="gsam", scope="local"))


def test_late_switch(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    """Epochs of 3 steps: the method works in the second and third of four."""
    window = ("--optimizer.start_epoch", "1", "--optimizer.stop_epoch", "3")
    flags = (*small, "--epochs", "4", "--schedule.anneal_start_epoch", "null")
    status, out, _ = command(*flags, *window, "--run_dir", tmp_path / "run")
    assert status == 0
    assert "plan: sgd from epoch 0 to 1, lesam from epoch 1 to 3, sgd from epoch 3 to 4" in out
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    assert [line["rho"] > 0 for line in lines] == [False] * 3 + [True] * 6 + [False] * 3
    command(*flags, "--optimizer.name", "sgd", "--run_dir", tmp_path / "sgd")
    plain = [line for line in read_metrics(tmp_path / "sgd") if line["split"] == "train"]
    assert [line["loss"] for line in lines[:3]] == [line["loss"] for line in plain[:3]], "plain before, bit for bit"
    assert [line["loss"] for line in lines[4:]] != [line["loss"] for line in plain[4:]]


@pytest.mark.parametrize("name", ["s2sam", "looksam", "fsam"])
def test_methods_with_a_memory_may_start_late(
    command: Command, small: tuple[str, ...], tmp_path: Path, name: str
) -> None:
    flags = ("--optimizer.name", name, "--optimizer.start_epoch", "1", "--run_dir", tmp_path / "run")
    assert command(*small, *flags)[0] == 0
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    assert not any(line["rho"] > 0 for line in lines[:3])
    assert any(line["rho"] > 0 for line in lines[3:])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--optimizer.start_epoch", "3"), "the method stops at epoch 3 of 3: it would never work"),
        (("--optimizer.start_epoch", "2", "--optimizer.stop_epoch", "1"), "stops at epoch 1.0 of 3"),
        (("--optimizer.stop_epoch", "1", "--schedule.anneal_start_epoch", "2"), "annealing would never start"),
        (("--optimizer.start_epoch", "1", "--optimizer.name", "sgd"), "optimizer.name is sgd"),
    ],
    ids=str,
)
def test_a_schedule_that_never_fires(
    command: Command, small: tuple[str, ...], tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    status, _, err = command(*small, *flags, "--run_dir", tmp_path / "run")
    assert status == 2
    assert message in err


def test_disabled_steps_are_plain_and_not_counted() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.LookSAM([p], torch.optim.SGD, lr=0.5)
    optimizer.enabled = False

    def closure() -> torch.Tensor:
        loss = p.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5))
    assert optimizer.step_index == 0

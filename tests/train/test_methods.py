"""Every method by one word in the config, and the epochs in which it works."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lesam_dist import optim
from lesam_dist.config.checks import OPTIMIZERS
from lesam_dist.config.method_fields import METHOD_FIELDS
from lesam_dist.config.schema import OptimizerConfig
from lesam_dist.errors import UserError
from lesam_dist.train.build import build_optimizer
from lesam_dist.train.methods import METHODS, method_arguments
from lesam_dist.train.telemetry import read_metrics
from tests.conftest import Command


def test_every_method_of_the_library_has_a_name() -> None:
    values = [getattr(optim, name) for name in optim.__all__]
    exported = {v for v in values if isinstance(v, type) and issubclass(v, optim.SharpnessAware)}
    assert set(METHODS.values()) == exported - {optim.SharpnessAware}
    assert set(OPTIMIZERS) == {*METHODS, "sgd", "adamw"}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_with_every_method(command: Command, small: tuple[str, ...], tmp_path: Path, name: str) -> None:
    status, out, err = command(*small, "--epochs", "2", "--run_dir", tmp_path / "run", "--optimizer.name", name)
    assert (status, err) == (0, "")
    assert f"{name} on sgd" in out
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    assert all(line["skipped"] == 0 and line["loss"] is not None for line in lines)
    assert any(line["rho"] > 0 for line in lines)


def test_values_of_the_config_arrive() -> None:
    config = OptimizerConfig(
        rho=0.3, sigma=0.7, eta=0.2, beta=0.5, gamma=0.4, lam=0.1, alpha=0.9, interval=7, power_steps=2, rho_min=0.01
    )
    expected: dict[str, dict[str, Any]] = {
        "lesam": {"sigma": 0.7, "rho_max": 0.2, "alpha": 0.9, "eta": 0.2, "adaptive": False},
        "asam": {"rho": 0.3, "eta": 0.2},
        "esam": {"rho": 0.3, "beta": 0.5, "gamma": 0.4},
        "fsam": {"rho": 0.3, "lam": 0.1},
        "eigensam": {"rho": 0.3, "alpha": 0.9, "interval": 7, "power_steps": 2},
        "gsam": {"rho": 0.3, "alpha": 0.9, "rho_min": 0.01},
        "looksam": {"rho": 0.3, "alpha": 0.9, "interval": 7},
        "wsam": {"rho": 0.3, "gamma": 0.4},
    }
    for name, values in expected.items():
        arguments = method_arguments(replace(config, name=name))
        assert {key: arguments[key] for key in values} == values
        assert not {"momentum", "lr"} & arguments.keys()
        assert ("sigma" in arguments) == (name == "lesam"), "F-SAM's sigma is no loss budget"


def test_the_table_of_fields_is_what_the_methods_take() -> None:
    """Every argument of a method's class that a config has a field for; F-SAM's sigma is no loss budget."""
    known = set(vars(OptimizerConfig()))
    for name, method in METHODS.items():
        taken = inspect.signature(method.__init__).parameters.keys() & known
        assert set(METHOD_FIELDS[name]) == taken - ({"sigma"} if name == "fsam" else set())


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
        build_optimizer(model, OptimizerConfig(name="wsam", gamma=1.0))
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

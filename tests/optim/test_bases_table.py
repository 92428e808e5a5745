"""docs/bases.md shows what the optimizers do now; an optimizer that is there already, and what is refused of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lesam_dist import ASAM, LESAM, SAM, WSAM
from tests.optim import bases_table
from tests.optim.nets import make_closure, make_net, same, snapshot


def test_the_table_of_bases() -> None:
    page = bases_table.DOCS.read_text()
    assert page == bases_table.render(page), f"run python -m {bases_table.__name__}"


@pytest.mark.parametrize(("base", "kwargs"), [(SGD, {"lr": 0.1, "momentum": 0.9}), (AdamW, {"lr": 0.01})])
def test_an_optimizer_that_is_there_keeps_its_state_and_settings(seed: int, base: Any, kwargs: dict[str, Any]) -> None:
    """Two plain steps, then LE-SAM: as with the class, whose state is loaded; a scheduler on it goes on."""
    net = make_net()
    closure = make_closure(net)
    plain = base([{"params": [net[0].weight], "perturb": False}, {"params": [*net[0:1].parameters()][1:]}], **kwargs)
    plain.add_param_group({"params": list(net[2].parameters()), "sigma": 0.7})
    for _ in range(2):
        plain.zero_grad()
        closure()
        plain.step()
    plain.zero_grad()
    twin = copy.deepcopy(net)
    groups = [{"params": [twin[0].weight], "perturb": False}, {"params": [twin[0].bias]}]
    groups.append({"params": list(twin[2].parameters()), "sigma": 0.7})
    built = LESAM(groups, base, sigma=0.2, **kwargs)
    built.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert [group["sigma"] for group in built.param_groups] == [0.2, 0.2, 0.7]

    scheduler = torch.optim.lr_scheduler.StepLR(plain, step_size=1, gamma=0.5)
    optimizer = LESAM(plain.param_groups, plain, sigma=0.2)
    assert optimizer.base_optimizer is plain
    torch.manual_seed(seed)
    theirs = make_closure(twin)
    torch.manual_seed(seed)
    ours = make_closure(net)
    for _ in range(3):
        optimizer.step(ours)
        scheduler.step()
        built.step(theirs)
        for group in built.param_groups:
            group["lr"] *= 0.5
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert optimizer.param_groups[1]["lr"] == kwargs["lr"] / 8


def test_an_optimizer_that_is_there_is_refused_where_it_does_not_fit() -> None:
    net = make_net()
    with pytest.raises(ValueError, match=r"lr is 0\.2, but the base optimizer, SGD, is built already"):
        SAM(net.parameters(), SGD(net.parameters(), lr=0.1), lr=0.2)
    with pytest.raises(ValueError, match="SGD, has 4 parameters, 1 of the 1 that SAM is given"):
        SAM([net[0].weight], SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"a param group sets rho, but the base optimizer, SGD, has groups of its own"):
        SAM([{"params": list(net.parameters()), "rho": 0.3}], SGD(net.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (
            lambda p: SAM(p, SGD, adaptive=True, lr=0.1),
            r"SGD has an argument 'adaptive': take ASAM, or lesam_dist\.compat",
        ),
        (lambda p: ASAM(p, SGD, lr=0.1, use_gc=True), "'use_gc': centralized gradients are not offered"),
        (lambda p: SAM(p, SGD, lr=0.1, momentun=0.9), r"'momentun': did you mean momentum\?"),
        (lambda p: LESAM(p, SGD, lr=0.1, rhomax=0.9), r"'rhomax': did you mean rho_max\?"),
        (lambda p: SAM(p, SGD, 0.05, lr=0.1), r"SAM: 0\.05 without a name\. Write rho=0\.05: only params and base_opt"),
        (
            lambda p: WSAM(nn.Linear(2, 2), p, SGD, lr=0.1),
            "the first argument is a network, Linear. Give its parameters",
        ),
        (lambda p: SAM(p, "sgd", lr=0.1), "base_optimizer is 'sgd'; give a class"),
    ],
)
def test_arguments_that_nobody_has_are_named(make: Any, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        make(make_net().parameters())


def test_schedule_free_bases_are_switched_through_the_method(seed: int) -> None:
    import schedulefree

    net = make_net()
    optimizer = SAM(net.parameters(), schedulefree.SGDScheduleFree, lr=0.1)
    closure, before = make_closure(net), snapshot(net)
    with pytest.raises(
        RuntimeError, match=r"SGDScheduleFree, holds the weights of an evaluation\. Write optimizer\.train"
    ):
        optimizer.step(closure)
    assert same(net, before)
    optimizer.train()
    for _ in range(3):
        optimizer.step(closure)
    trained = snapshot(net)
    optimizer.eval()
    assert not same(net, trained)
    optimizer.train()
    for p, w in zip(net.parameters(), trained, strict=True):
        torch.testing.assert_close(p.detach(), w)
    closure()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="the weights are perturbed"):
        optimizer.eval()

"""`first_step` and `second_step` in a loop of one's own: the weights of ``step(closure)``, or a refusal."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD

from lesam_dist import optim
from tests.methods import CASES, LR, MOMENTUM
from tests.optim.test_methods import Quadratic, make

MORE: dict[str, tuple[Any, dict[str, Any]]] = {
    "plus": (optim.LESAM, {"alpha": 0.5}),
    "esam, tensors": (optim.ESAM, {"beta": 0.5, "gamma": 1.0}),
    "esam, samples": (optim.ESAM, {"beta": 1.0, "gamma": 0.5}),
    "eigen, alpha 0": (optim.EigenSAM, {"alpha": 0.0, "interval": 1}),
    "looksam, interval 1": (optim.LookSAM, {"interval": 1}),
    "interval": (optim.SAM, {"ascent_interval": 2}),
    "reuse": (optim.SAM, {"ascent_interval": 2, "ascent_between": "reuse"}),
    "fraction": (optim.LESAM, {"ascent_fraction": 0.5}),
}
OWN_PASSES = {"looksam", "eigen", "esam, samples", "interval", "reuse", "fraction"}
ONE_PASS = {"msam", "s2sam"}


def build(name: str, net: Quadratic, **options: Any) -> Any:
    if name in CASES:
        return make(name, net, **options)
    method, kwargs = MORE[name]
    return method(net.parameters(), SGD, lr=LR, momentum=MOMENTUM, **kwargs, **options)


def two_steps(net: Quadratic, optimizer: Any, t: int, first_pass: bool = True) -> None:
    if first_pass:
        net(t).backward()
    optimizer.first_step(zero_grad=True)
    net(t).backward()
    optimizer.second_step(zero_grad=True)


EVERY = [(name, "reference") for name in [*CASES, *MORE]]
KERNELS = [(name, "triton") for name in ("lesam", "plus", "friendly", "gsam", "wsam", "s2sam")]


@pytest.mark.parametrize(("name", "backend"), EVERY + KERNELS)
def test_two_step_form_equals_step_bit_for_bit(seed: int, name: str, backend: str) -> None:
    net = Quadratic(torch.float32)
    twin = copy.deepcopy(net)
    by_hand = build(name, twin, backend=backend)
    if name in OWN_PASSES:
        before = twin.flat()
        twin(0).backward()
        with pytest.raises(RuntimeError, match=r"call step\(closure\)"):
            by_hand.first_step()
        assert np.array_equal(twin.flat(), before)
        return
    optimizer = build(name, net, backend=backend)
    for t in range(4):
        optimizer.step(net.closure(t))
        two_steps(twin, by_hand, t, first_pass=name not in ONE_PASS or t % 2 == 0)
    assert np.array_equal(net.flat(), twin.flat())
    assert by_hand.step_index == optimizer.step_index


@pytest.mark.parametrize("name", ["sam", "friendly", "wsam", "gsam", "msam", "s2sam"])
def test_switched_off_both_forms_are_the_base_optimizer(seed: int, name: str) -> None:
    net = Quadratic(torch.float32)
    plain = SGD(net.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
    twins = [copy.deepcopy(net) for _ in range(2)]
    by_closure, by_hand = (make(name, twin, backend="reference") for twin in twins)
    by_closure.enabled = by_hand.enabled = False
    for t in range(3):
        plain.zero_grad()
        net(t).backward()
        plain.step()
        by_closure.step(twins[0].closure(t))
        two_steps(twins[1], by_hand, t)
    for twin in twins:
        assert np.array_equal(twin.flat(), net.flat())

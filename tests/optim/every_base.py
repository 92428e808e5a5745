"""Run by hand: every optimizer of pytorch_optimizer and timm as the base of SAM, against a loop written out.

    pip install --target DIR pytorch_optimizer timm && PYTHONPATH=.:kernels:DIR python -m tests.optim.every_base

For each it takes four steps with SAM, once with a state_dict reloaded in between, and compares the weights with SAM by
hand: perturb, second gradient, restore, the optimizer's own step. Those that fail by hand too are counted only. Some
divide by what is almost nothing: they may be as far off as the loop by hand is with another rounding.
"""

from __future__ import annotations

import copy
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lesam_dist import SAM

STEPS, RHO = 4, 0.05
Make = Callable[[Any], Optimizer]


def providers() -> Iterator[tuple[str, Make]]:
    """Name and constructor of every optimizer; a package that is not installed gives none."""
    try:
        others = importlib.import_module("pytorch_optimizer")
    except ImportError:
        print("pytorch_optimizer is not installed", file=sys.stderr)
    else:
        for name in others.get_supported_optimizers():
            yield f"pytorch_optimizer {name}", others.load_optimizer(name)
        for name in ("Lookahead", "OrthoGrad", "TRAC", "ScheduleFreeWrapper"):
            yield f"pytorch_optimizer {name}", around_adamw(getattr(others, name))
    try:
        timm = importlib.import_module("timm.optim")
    except ImportError:
        print("timm is not installed", file=sys.stderr)
    else:
        yield "timm Lookahead", around_adamw(timm.Lookahead)
        for name in timm.list_optimizers(exclude_filters=["bnb*", "fused*"]):  # bitsandbytes and APEX need CUDA
            yield f"timm {name}", timm.get_optimizer_class(name, bind_defaults=True)


def around_adamw(wrapper: Any) -> Make:
    return lambda params: wrapper(torch.optim.AdamW(params, lr=1e-2))


def problem(seed: int = 0) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 2, 6, 6), torch.randint(0, 3, (16,))

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return net, closure


def build(make: Make, params: Any) -> Optimizer:
    """With a learning rate where it takes one, and a momentum where it wants one."""
    try:
        return make(params, lr=1e-2)  # type: ignore[call-arg]
    except TypeError:
        return make(params)
    except ValueError:
        return make(params, lr=1e-2, momentum=0.9)  # type: ignore[call-arg]


def by_hand(make: Make, reload: bool, rho: float = RHO) -> list[Tensor]:
    net, closure = problem()
    params = list(net.parameters())
    optimizer = build(make, [{"params": params}])
    for step in range(STEPS):
        if step == 2 and reload:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build(make, [{"params": params}])
            optimizer.load_state_dict(state)
        torch.manual_seed(step)
        optimizer.zero_grad()
        closure()
        norm = torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()
        exact = [p.detach().clone() for p in params]
        for p in params:
            p.data.add_(p.grad, alpha=rho / norm.item())  # type: ignore[arg-type]
        optimizer.zero_grad()
        closure()
        for p, w in zip(params, exact, strict=True):
            p.data.copy_(w)
        optimizer.step()
    return [p.detach() for p in params]


def by_sam(make: Make, reload: bool) -> list[Tensor]:
    net, closure = problem()
    params = list(net.parameters())

    def new() -> SAM:
        return SAM([{"params": params}], lambda groups: build(make, groups), rho=RHO)

    optimizer = new()
    for step in range(STEPS):
        if step == 2 and reload:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = new()
            optimizer.load_state_dict(state)
        torch.manual_seed(step)
        optimizer.step(closure)
    return [p.detach() for p in params]


def outcome(take: Callable[..., list[Tensor]], make: Make, reload: bool) -> tuple[list[Tensor] | None, str]:
    """The final weights, or why there are none."""
    try:
        return take(make, reload), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    right, by_hand_too = {False: 0, True: 0}, {False: 0, True: 0}
    for name, make in providers():
        for reload in (False, True):
            expected, _ = outcome(by_hand, make, reload)
            if expected is None:
                by_hand_too[reload] += 1
                continue
            actual, fault = outcome(by_sam, make, reload)
            if actual is not None:
                worst = distance(actual, expected)
                allowed = (
                    max(1e-5, distance(by_hand(make, reload, RHO * (1 + 1e-6)), expected)) if worst > 1e-5 else worst
                )
                fault = "" if worst <= allowed else f"weights are {worst:.1e} off"
            right[reload] += not fault
            if fault:
                print(f"{name}{', state_dict reloaded' if reload else ''}: {fault}", flush=True)
    for reload, what in ((False, "train"), (True, "go on from a state_dict")):
        print(f"{right[reload]} {what} as by hand; {by_hand_too[reload]} fail by hand too")


if __name__ == "__main__":
    main()

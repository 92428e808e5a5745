"""Every method with the float64 rule that it must follow, written from its paper on one flat vector.

A rule takes the flat weights, a gradient function, the step t and the method's own state (a dict), and returns the
gradient that the base optimizer steps with, and what is subtracted from the weights beside that step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesam_dist import optim
from tests.halves import Halved

Vector = NDArray[np.float64]
Gradient = Callable[[Vector], Vector]
State = dict[str, Any]
Rule = Callable[[Vector, Gradient, int, State], "tuple[Vector, Vector | float]"]

RHO = 0.1


def unit(v: Vector) -> Vector:
    return v / np.linalg.norm(v)


def sam(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    return grad(w + RHO * unit(grad(w))), 0.0


def lesam(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g = grad(w)
    return grad(w + min(RHO / np.linalg.norm(g), 0.05) * unit(g)), 0.0


def lesam_adaptive(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g, metric = grad(w), np.abs(w) + 0.2
    return grad(w + RHO * metric**2 * g / np.linalg.norm(metric * g) ** 2), 0.0


def asam(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g, metric = grad(w), np.abs(w) + 0.01
    return grad(w + RHO * metric**2 * g / np.linalg.norm(metric * g)), 0.0


def fisher(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g = grad(w)
    d = g / (1 + 2.0 * g**2)
    return grad(w + RHO * d / np.sqrt(g @ d)), 0.0


def friendly(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g = grad(w)
    d = g if t == 0 else g - 0.8 * s["m"]
    s["m"] = g if t == 0 else 0.6 * s["m"] + 0.4 * g
    return grad(w + RHO * unit(d)), 0.0


def gsam(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g = grad(w)
    g_hat = grad(w + RHO * unit(g))
    vertical = g - (g @ unit(g_hat)) * unit(g_hat)
    return g_hat - 0.4 * vertical, 0.0


def ssam(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g = grad(w)
    return unit(grad(w + RHO * unit(g))) * np.linalg.norm(g), 0.0


def wsam(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, Vector]:
    g = grad(w)
    return g, LR * 4.0 * (grad(w + RHO * unit(g)) - g)  # gamma 0.8: 0.8/0.2 = 4


def wsam_coupled(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g = grad(w)
    return 4.0 * grad(w + RHO * unit(g)) - 3.0 * g, 0.0


def looksam(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g = grad(w)
    if t % 2 == 0:
        g_hat = grad(w + RHO * unit(g))
        s["g_v"] = g_hat - (g_hat @ unit(g)) * unit(g)
        return g_hat, 0.0
    return g + 0.7 * np.linalg.norm(g) * unit(s["g_v"]), 0.0


def msam(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g_hat = grad(w - RHO * unit(s["v"]) if t else w)
    s["v"] = MOMENTUM * s["v"] + g_hat if t else g_hat
    return g_hat, 0.0


def s2sam(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    s["g"] = grad(w + RHO * unit(s["g"]) if t else w)
    return s["g"], 0.0


def eigen(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g = grad(w)
    if t and t % 2 == 0:
        v = unit(s.get("v", g))
        for _ in range(3):
            v = unit(grad(w + v) - grad(w))  # of a quadratic exactly H v
        s["v"] = v
    if "v" not in s:
        return grad(w + RHO * unit(g)), 0.0
    along = s["v"] @ unit(g)
    return grad(w + RHO * (unit(g) + 0.3 * np.sign(along) * (s["v"] - along * unit(g)))), 0.0


def halved(w: Vector, grad: Gradient, t: int, s: State) -> tuple[Vector, float]:
    g = grad(w)
    d = g + 0.5 * s.get("g", 0.0)
    s["g"] = g
    return grad(w + 0.5 * RHO * unit(d)), 0.0


@dataclass
class Case:
    """A method with hyper-parameters that differ from every default, its rule, and closure calls in steps 0 and 1."""

    method: type[optim.SharpnessAware]
    rule: Rule
    kwargs: dict[str, Any] = field(default_factory=dict)
    calls: tuple[int, int] = (2, 2)


LR, MOMENTUM = 0.05, 0.9

# The products that every strategy has; the exact ones are compared to them.
EIGEN = {"rho": RHO, "alpha": 0.3, "interval": 2, "power_steps": 3, "products": "difference"}

CASES = {
    "sam": Case(optim.SAM, sam, {"rho": RHO}),
    "lesam": Case(optim.LESAM, lesam, {"sigma": RHO, "rho_max": 0.05}),
    "lesam-adaptive": Case(optim.LESAM, lesam_adaptive, {"sigma": RHO, "rho_max": None, "adaptive": True, "eta": 0.2}),
    "asam": Case(optim.ASAM, asam, {"rho": RHO}),
    "fisher": Case(optim.FisherSAM, fisher, {"rho": RHO, "eta": 2.0}),
    "friendly": Case(optim.FriendlySAM, friendly, {"rho": RHO, "sigma": 0.8}),
    "gsam": Case(optim.GSAM, gsam, {"rho": RHO}),
    "ssam": Case(optim.SSAM, ssam, {"rho": RHO}),
    "wsam": Case(optim.WSAM, wsam, {"rho": RHO, "gamma": 0.8}),
    "wsam-coupled": Case(optim.WSAM, wsam_coupled, {"rho": RHO, "gamma": 0.8, "decouple": False}),
    "looksam": Case(optim.LookSAM, looksam, {"rho": RHO, "interval": 2}, (2, 1)),
    "msam": Case(optim.MSAM, msam, {"rho": RHO}, (1, 1)),
    "s2sam": Case(optim.S2SAM, s2sam, {"rho": RHO}, (1, 1)),
    "eigen": Case(optim.EigenSAM, eigen, EIGEN),
    "own": Case(Halved, halved, {"rho": RHO, "part": 0.5}),  # which the project does not have
    "esam": Case(optim.ESAM, sam, {"rho": RHO, "beta": 1.0, "gamma": 1.0}),
}


def follow(rule: Rule, w: Vector, grad: Callable[[Vector, int], Vector], steps: int) -> Vector:
    """The weights after ``steps`` steps of SGD with momentum under a rule."""
    state: State = {}
    buffer = np.zeros_like(w)
    for t in range(steps):
        g, beside = rule(w, lambda x, t=t: grad(x, t), t, state)  # type: ignore[misc]
        buffer = MOMENTUM * buffer + g
        w = w - LR * buffer - beside
    return w

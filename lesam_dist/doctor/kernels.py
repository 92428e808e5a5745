"""The Triton kernels: whether they run here, and give what plain torch gives; which backend a run takes by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from lesam_dist.doctor.finding import Finding

_TOLERANCE = 1e-5  # of weights of about 1 in float32, after one step


@dataclass(frozen=True)
class Kernels:
    """A step made twice.

    Attributes:
        device: where, "cuda" or "cpu".
        auto: what `backend="auto"` is there.
        installed: whether Triton is.
        difference: largest one between the weights of both backends; None where the kernels did not run.
        error: why not.
    """

    device: str
    auto: str
    installed: bool
    difference: float | None
    error: str = ""


def read_kernels() -> Kernels:
    """Make a LE-SAM step with both backends; without a GPU in Triton's interpreter."""
    import torch

    from lesam_dist.optim.engine.backend import choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: Any = SimpleNamespace(device=torch.device(device), params=[torch.zeros(1)])
    auto, installed = choose("auto", rows), find_spec("triton") is not None
    if not installed:
        return Kernels(device, auto, installed, None)
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    try:
        return Kernels(device, auto, installed, _difference(device))
    except Exception as error:  # of a compiler or an interpreter that is broken here
        said = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        return Kernels(device, auto, installed, None, said)


def check_kernels(kernels: Kernels) -> Iterator[Finding]:
    """Whether they are right, and what runs take."""
    how = "compiled" if kernels.device == "cuda" else "in Triton's interpreter"
    if not kernels.installed:
        yield Finding("kernels", "ok" if kernels.device == "cpu" else "warning", "no Triton", "pip install triton")
    elif kernels.difference is None and kernels.device == "cpu":
        text = f"Triton's interpreter does not work here, which debugging alone needs: {kernels.error}"
        yield Finding("kernels", "warning", text, "Triton 3.6 and older need numpy<2.4")
    elif kernels.difference is None:
        remedy = "--optimizer.backend reference until then; a C compiler and Python's headers must be there"
        yield Finding("kernels", "problem", f"do not run: {kernels.error}", remedy)
    elif kernels.difference <= _TOLERANCE:
        text = f"{how}, a LE-SAM step differs from plain torch by {kernels.difference:.1e}"
        yield Finding("kernels", "ok", text)
    else:
        text = f"{how}, a LE-SAM step differs from plain torch by {kernels.difference:.1e}"
        yield Finding("kernels", "problem", text, "--optimizer.backend reference, and report it")
    meaning = {"triton": "the Triton kernels", "reference": "plain torch"}[kernels.auto]
    yield Finding("backend", "ok", f"--optimizer.backend auto takes {kernels.auto} here: {meaning}")


def _difference(device: str) -> float:
    """Largest one between the weights after a step on a quadratic with each backend."""
    import torch

    from lesam_dist.optim.lesam import LESAM

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator)
    weights = []
    for backend in ("reference", "triton"):
        weight = torch.nn.Parameter(start.clone().to(device))
        options: dict[str, Any] = {"sigma": 0.3, "rho_max": 0.2, "lr": 0.1, "momentum": 0.9, "backend": backend}
        optimizer = LESAM([weight], torch.optim.SGD, **options)

        def closure(weight: torch.nn.Parameter = weight) -> torch.Tensor:
            loss = (weight.pow(4) / 4).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        weights.append(weight.detach().double().cpu())
    return float((weights[0] - weights[1]).abs().max())

"""What the loss looks like around the weights of a checkpoint: how sharp it is, in which sense, and how we know.

Beside it, what attacks on the pixels and corruptions do to the accuracy, and how far the confidence is to be trusted.

Each analysis is a command, `lesam-dist analyze NAME`, and a function here, of an `Objective`: the loss of any model on
any images, or what `load` makes of a checkpoint::

    from lesam_dist.analysis import hessian, load_run

    print(hessian(load_run("runs/digits", samples=1000).objective(), top=5).eigenvalues)

`measures` has one file for each of them, `engine` what they stand on, and `commands` what is around them on the command
line. The names are imported when they are first used: a help needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lesam_dist.analysis.engine.objective import Objective
    from lesam_dist.analysis.engine.subject import load, load_run
    from lesam_dist.analysis.measures.connect import connect
    from lesam_dist.analysis.measures.hessian import hessian
    from lesam_dist.analysis.measures.landscape import filter_normalised, grid, landscape
    from lesam_dist.analysis.measures.lpf import lpf, lpf_one_pass
    from lesam_dist.analysis.measures.radius import radius
    from lesam_dist.analysis.measures.robustness import robustness
    from lesam_dist.analysis.measures.sharpness import sharpness
    from lesam_dist.analysis.measures.sharpness_plan import SharpnessPlan
    from lesam_dist.train.source import read_source

_WHERE = {
    "engine.objective": ("Objective",),
    "engine.subject": ("load", "load_run", "read_source"),
    "measures.connect": ("connect",),
    "measures.hessian": ("hessian",),
    "measures.landscape": ("filter_normalised", "grid", "landscape"),
    "measures.lpf": ("lpf", "lpf_one_pass"),
    "measures.radius": ("radius",),
    "measures.robustness": ("robustness",),
    "measures.sharpness": ("sharpness",),
    "measures.sharpness_plan": ("SharpnessPlan",),
}
__all__ = [
    "Objective",
    "SharpnessPlan",
    "connect",
    "filter_normalised",
    "grid",
    "hessian",
    "landscape",
    "load",
    "load_run",
    "lpf",
    "lpf_one_pass",
    "radius",
    "read_source",
    "robustness",
    "sharpness",
]


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module(f"lesam_dist.analysis.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

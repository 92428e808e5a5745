"""What the radius did in a run, and what the loss made of it (Figure 5 and Eq. 15 of the paper): from metrics.jsonl."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lesam_dist.errors import UserError
from lesam_dist.train.telemetry import METRICS, read_metrics

_NEEDED = ("loss", "perturbed_loss", "rho", "grad_norm")
QUANTITIES = {
    "rho": "radius that was applied",
    "uncapped": "radius without rho_max, sigma / ||g||",
    "loss": "loss at the weights",
    "perturbed_loss": "loss at the perturbed weights",
    "increase": "rise of the loss, L(w + eps) - L(w)",
    "beyond_first_order": "rise beyond rho ||g||, which curvature makes",
    "over_budget": "rise beyond the budget, L(w + eps) - L(w) - sigma",
}


def radius(run: Path) -> dict[str, Any]:
    """Mean, minimum and maximum over each epoch's logged steps, of a run of any method that perturbs along g.

    ``over_budget`` is Eq. 15 with sigma on the left: where the radius is not capped, what is beyond the first order of
    Taylor's theorem; where it is, the rise aims at less than sigma, and ``beyond_first_order`` is that remainder.
    ``uncapped`` and ``over_budget`` are there for methods with a sigma. Losses are those of the step's own batch.

    Args:
        run: its folder.

    Returns:
        ``epochs`` (1, 2, ...), for each of `QUANTITIES` its ``mean``, ``min`` and ``max`` by epoch, and ``capped``, the
        share of an epoch's logged steps in which rho_max was the radius.

    Raises:
        UserError: there is no run, or it has not logged what this needs.
    """
    if not (run / METRICS).is_file():
        raise UserError(f"'{run}' has no {METRICS}: name the folder of a run.")
    lines = [line for line in read_metrics(run) if line["split"] == "train"]
    if not lines:
        raise UserError(f"'{run / METRICS}' has no training step: the run logged none before it ended.")
    usable = [line for line in lines if all(isinstance(line.get(name), (int, float)) for name in _NEEDED)]
    if not usable:
        missing = [name for name in _NEEDED if not any(isinstance(line.get(name), (int, float)) for line in lines)]
        raise UserError(
            f"'{run / METRICS}' has no {missing[0] if missing else 'finite numbers'}: this needs a run of a method "
            "that perturbs along the gradient, as lesam or sam."
        )
    by_epoch: defaultdict[int, list[Mapping[str, float]]] = defaultdict(list)
    for line in usable:
        by_epoch[max(1, math.ceil(line["epoch"]))].append(_of_step(line))
    found: dict[str, Any] = {"epochs": sorted(by_epoch), "steps": len(usable), "last_step": usable[-1]["step"]}
    for name in QUANTITIES:
        if all(name in step for steps in by_epoch.values() for step in steps):
            found[name] = _spread([step[name] for step in by_epoch[epoch]] for epoch in found["epochs"])
    if "uncapped" in found:
        found["capped"] = [_share_capped(by_epoch[epoch]) for epoch in found["epochs"]]
    return found


def _of_step(line: Mapping[str, Any]) -> dict[str, float]:
    rho, norm = line["rho"], line["grad_norm"]
    increase = line["perturbed_loss"] - line["loss"]
    step = {
        "rho": rho,
        "loss": line["loss"],
        "perturbed_loss": line["perturbed_loss"],
        "increase": increase,
        "beyond_first_order": increase - rho * norm,
    }
    if isinstance(line.get("sigma"), (int, float)):
        step |= {"over_budget": increase - line["sigma"]}
        step |= {"uncapped": line["sigma"] / norm if norm else math.inf}
    return step


def _spread(epochs: Iterable[list[float]]) -> dict[str, list[float]]:
    of_epochs = list(epochs)
    means = [math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan for values in of_epochs]
    return {"mean": means, "min": list(map(min, of_epochs)), "max": list(map(max, of_epochs))}


def _share_capped(steps: list[Mapping[str, float]]) -> float:
    # Radii are logged in float32, and differ by rounding where nothing caps them.
    return sum(step["rho"] < step["uncapped"] * (1 - 1e-5) for step in steps) / len(steps)

"""What one step of every method costs: launches, passes over memory, collectives, calls of the closure, memory.

Counted from outside, on whatever the optimizer does between its closure's calls: kernels as Triton's interpreter
launches them, torch's operators as they are dispatched. `step_costs.json` has the numbers and `docs/costs.md` shows
them; both are written by

    python -m tests.optim.step_costs
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from lesam_dist import optim
from lesam_dist.optim.plain import Plain
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from tests.cost_meter import Meter
from tests.methods import CASES, EIGEN, RHO

JSON = Path(__file__).with_suffix(".json")
DOCS = Path(__file__).parents[2] / "docs" / "costs.md"
COMMAND = "python -m tests.optim.step_costs"

Costs = dict[str, Any]

SHAPES = ((40, 30), (900,), (300,))  # of the parameters: far more elements than any table of scalars
MEASURED = 2  # steps; every interval below is 2, so that they are both kinds of step


@dataclass(frozen=True)
class Setting:
    """A method with its options around a base optimizer; ``closures`` above 1 is m-sharpness."""

    method: Callable[..., Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    base: type[Optimizer] = SGD
    closures: int = 1
    enabled: bool = True
    warm_up: int = 2  # steps that are not measured
    groups: bool = False  # all parameters but the first in a group that is not perturbed
    scaled: bool = False  # with a GradScaler


BASE_KWARGS: dict[type[Optimizer], dict[str, Any]] = {
    SGD: {"lr": 0.05, "momentum": 0.9},
    AdamW: {"lr": 0.01},
    RMSprop: {"lr": 0.01},
}


# What they do is over when the weights are perturbed: with another base they differ as LE-SAM does.
_PERTURBS_ONLY = {"sam", "lesam-adaptive", "asam", "fisher", "esam"}


def settings() -> dict[str, Setting]:
    """By name: the methods of `tests.methods` on SGD, some on AdamW, and what the options cost."""
    # Eigen-SAM's first power iteration, in step 2, starts from another vector than those after it.
    of_cases = {
        name: Setting(c.method, c.kwargs, warm_up=4 if name == "eigen" else 2)
        for name, c in CASES.items()
        if name != "own"
    }
    result = dict(of_cases)
    for name in sorted(of_cases.keys() - _PERTURBS_ONLY):
        result[f"{name}, AdamW"] = replace(of_cases[name], base=AdamW)
    lesam: dict[str, Any] = {"sigma": RHO, "rho_max": 0.05}
    plus = {**lesam, "alpha": 0.5}
    result |= {
        "plain": Setting(Plain),
        "plain, AdamW": Setting(Plain, base=AdamW),
        "samon": Setting(optim.SAMON, {"rho": RHO}, groups=True),
        "lesam+ paper": Setting(optim.LESAM, {**plus, "plus_form": "paper"}),
        "lesam+ released": Setting(optim.LESAM, {**plus, "plus_form": "released"}),
        "lesam+, AdamW": Setting(optim.LESAM, plus, AdamW),
        "lesam, RMSprop": Setting(optim.LESAM, lesam, RMSprop),  # a base that no kernel fuses
        "lesam+, RMSprop": Setting(optim.LESAM, plus, RMSprop),
        "lesam, one perturbed": Setting(optim.LESAM, lesam, groups=True),
        "lesam, interval 2 skip": Setting(optim.LESAM, {**lesam, "ascent_interval": 2}),
        "lesam, interval 2 reuse": Setting(optim.LESAM, {**lesam, "ascent_interval": 2, "ascent_between": "reuse"}),
        "lesam, 2 closures": Setting(optim.LESAM, lesam, closures=2),
        "lesam+, 2 closures": Setting(optim.LESAM, plus, closures=2),
        "lesam, not enabled": Setting(optim.LESAM, lesam, enabled=False),
        "lesam, max_grad_norm": Setting(optim.LESAM, {**lesam, "max_grad_norm": 0.1}),
        "lesam, check_second=False": Setting(optim.LESAM, {**lesam, "check_second": False}),
        "lesam, scaled": Setting(optim.LESAM, lesam, scaled=True),
        "lesam, scaled, max_grad_norm": Setting(optim.LESAM, {**lesam, "max_grad_norm": 0.1}, scaled=True),
        "lesam+, scaled": Setting(optim.LESAM, plus, scaled=True),
        "lesam, scaled, RMSprop": Setting(optim.LESAM, lesam, RMSprop, scaled=True),
        "esam, half of all": Setting(optim.ESAM, {"rho": RHO, "beta": 0.5, "gamma": 0.5}),
        "gsam, alpha 0": Setting(optim.GSAM, {"rho": RHO, "alpha": 0.0}),
        # Exact where weights are whole, so not in the column of FSDP2.
        "eigen, auto": Setting(optim.EigenSAM, {**EIGEN, "products": "auto"}, warm_up=4),
        "eigen, alpha 0": Setting(optim.EigenSAM, {"rho": RHO, "alpha": 0.0}),
    }
    return result


class Bowl:
    """Parameters, and as a closure what leaves in ``.grad`` what a quadratic loss would, one new tensor each."""

    def __init__(self, meter: Meter, params: list[nn.Parameter], scaler: GradScaler | None = None) -> None:
        self._meter, self.params, self._scaler = meter, params, scaler
        self._curvatures = [p.detach().abs() + 0.5 for p in params]

    def __call__(
        self,
        *,
        per_sample: bool = False,
        backward: bool = True,
        subset: Tensor | None = None,
        sync: bool | str = True,
        fraction: float = 1.0,
    ) -> Tensor:
        self._meter.calls += 1
        with self._meter.pause(), torch.no_grad():
            if backward:
                for p, curvature in zip(self.params, self._curvatures, strict=True):
                    p.grad = p * curvature if self._scaler is None else self._scaler.scale(p * curvature)
            return torch.ones(4) if per_sample else torch.ones(())

    def hessian_product(self, along: Mapping[Tensor, Tensor]) -> None:
        self._meter.calls += 1
        with self._meter.pause(), torch.no_grad():
            for p, curvature in zip(self.params, self._curvatures, strict=True):
                p.grad = along[p] * curvature

    def step(self, optimizer: Any, setting: Setting) -> None:
        """One step, after which the scaler is brought up to date."""
        optimizer.step(self.closures(setting))
        if self._scaler is not None:
            with self._meter.pause():
                self._scaler.update()

    def closures(self, setting: Setting) -> Any:
        """What ``step`` is given."""
        return self if setting.closures == 1 else [self] * setting.closures


def build(setting: Setting, params: list[nn.Parameter], backend: str = "reference") -> Any:
    """The optimizer of a setting."""
    groups: Any = [{"params": params[:1]}, {"params": params[1:], "perturb": False}] if setting.groups else params
    optimizer = setting.method(groups, setting.base, backend=backend, **BASE_KWARGS[setting.base], **setting.kwargs)
    optimizer.enabled = setting.enabled
    return optimizer


def measure(setting: Setting, backend: str) -> list[Costs]:
    """What a step costs in one process, once for each kind of step, in units of one pass over all parameters."""
    meter = Meter()
    with meter, meter.interpreter():
        generator = torch.Generator().manual_seed(0)
        scaler = GradScaler("cpu", init_scale=8.0) if setting.scaled else None
        bowl = Bowl(meter, [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES], scaler)
        optimizer = build(setting, bowl.params, backend)
        optimizer.grad_scaler = scaler
        unit = sum(p.nbytes for p in bowl.params)
        before = meter.live()
        steps = []
        for number in range(setting.warm_up + MEASURED):
            meter.clear()
            bowl.step(optimizer, setting)
            if number < setting.warm_up:
                continue
            steps.append(
                {
                    "closure calls": meter.calls,
                    "kernels": dict(sorted(meter.kernels.items())),
                    "kernel passes": round(meter.kernel_moved / unit, 1),
                    "operators": dict(sorted(meter.passes.items())),
                    "operator passes": round(meter.moved / unit, 1),
                    "scalar operators": meter.tiny.total(),
                    "host reads": meter.reads,
                    "kept": round((meter.live() - before) / unit, 1),
                    "peak": round((meter.peak - before) / unit, 1),
                }
            )
    return _kinds(steps)


def reductions(world: Distributed) -> dict[str, list[int]]:
    """Collectives of a step under FSDP2, beside those of its passes, by setting: of each kind of step."""
    counts = {}
    for name, setting in settings().items():
        net = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4))
        scaler = GradScaler("cpu", init_scale=8.0) if setting.scaled else None
        bowl = Bowl(meter := Meter(), list(wrap(net, world, "fsdp").parameters()), scaler)
        optimizer = build(setting, bowl.params)
        optimizer.grad_scaler = scaler
        steps = []
        with meter:
            for _ in range(setting.warm_up + MEASURED):
                meter.clear()
                bowl.step(optimizer, setting)
                assert meter.reduced <= 3, "a norm, or the three sums of an inner product"
                steps.append(meter.reductions)
        counts[name] = _kinds(steps[setting.warm_up :])
    return counts


def _kinds(steps: list[Any]) -> list[Any]:
    """One where all are the same."""
    return steps[:1] if all(step == steps[0] for step in steps) else steps


def measure_all() -> dict[str, Costs]:
    """The whole table: by setting, what a step costs on either backend, and its collectives under FSDP2."""
    collectives = all_reductions()
    return {
        name: {
            "reference": measure(setting, "reference"),
            "triton": measure(setting, "triton"),
            "all-reduces": collectives[name],
        }
        for name, setting in settings().items()
    }


def all_reductions() -> dict[str, list[int]]:
    """`reductions`, of which both processes must have the same."""
    from tests.parallel.processes import run

    first, second = run(reductions, 2)
    assert first == second, "ranks that make other collectives wait for each other forever"
    return first


_INTRODUCTION = f"""# What a step costs

What the optimizer of each method does beside the passes that the closure makes. `{COMMAND}`
counts it and writes this page, and `tests/optim/test_step_costs.py` fails where a step costs anything else. The base
optimizer is SGD with momentum where no other is named.

- **calls**: of the closure in a step, forward passes without backward and exact products with the Hessian included.
  "2 / 1": two kinds of step alternate.
- **kernels**: launches of Triton kernels, which do not depend on the number of parameters.
- **operators**: those of torch on whole tensors beside the kernels, for {len(SHAPES)} parameters. Each is a launch; of
  most there is one for each parameter.
- **scalars**: operators on a few numbers, such as norms and radii; a tiny launch each.
- **traffic**: what all of them read and write, in units of one pass over all parameters (float32).
- **memory**: what stays between steps beside weights and gradients, in the same unit; base optimizer's state included.
- **all-reduces**: of the optimizer under FSDP2, of at most a few numbers each.
- **CPU**: operators, scalars and traffic of the reference backend, which uses no kernels.

On the kernels no method waits for the device, except with a base optimizer that is not fused (RMSprop here: once).

| method | calls | kernels | operators | scalars | traffic | memory | all-reduces | CPU |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def as_markdown(rows: dict[str, Costs]) -> str:
    """The page for people: a line for each setting."""
    return _INTRODUCTION + "".join(_line(name, row) for name, row in rows.items())


def _line(name: str, row: Costs) -> str:
    def column(backend: str, value: Callable[[Costs], Any]) -> str:
        return _joined([value(step) for step in row[backend]])

    cells = (
        name,
        column("triton", lambda step: step["closure calls"]),
        column("triton", lambda step: sum(step["kernels"].values())),
        column("triton", lambda step: sum(step["operators"].values())),
        column("triton", lambda step: step["scalar operators"]),
        column("triton", lambda step: f"{step['kernel passes'] + step['operator passes']:.1f}"),
        column("triton", lambda step: step["kept"]),
        _joined(row["all-reduces"]),
        ", ".join(
            (
                column("reference", lambda step: sum(step["operators"].values())),
                column("reference", lambda step: step["scalar operators"]),
                column("reference", lambda step: step["operator passes"]),
            )
        ),
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def _joined(values: list[Any]) -> str:
    return " / ".join(map(str, values[:1] if len(set(values)) == 1 else values))


def load() -> dict[str, Any]:
    """The table as committed: of which torch it is, and `settings`."""
    table: dict[str, Any] = json.loads(JSON.read_text())
    return table


def as_json(torch_version: str, rows: dict[str, Costs]) -> str:
    """A line for each kind of step, so that a change of one shows as a line of a diff."""
    lines = []
    for name, row in rows.items():
        fields = []
        for key in ("reference", "triton"):
            steps = ",\n   ".join(json.dumps(step) for step in row[key])
            fields.append(f'  "{key}": [\n   {steps}\n  ]')
        fields.append(f'  "all-reduces": {json.dumps(row["all-reduces"])}')
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(fields) + "\n }")
    return f'{{"torch": {json.dumps(torch_version)}, "settings": {{\n' + ",\n".join(lines) + "\n}}\n"


def main() -> None:
    rows = measure_all()
    JSON.write_text(as_json(torch.__version__.split("+")[0], rows))
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(as_markdown(rows))


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    main()

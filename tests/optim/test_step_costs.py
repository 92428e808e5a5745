"""No step costs more than the table says: launches, passes over memory, collectives, memory that stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cost_meter import Meter
from tests.optim import step_costs
from tests.optim.step_costs import Costs, load, measure, settings

TABLE = load()
ROWS: dict[str, Costs] = TABLE["settings"]
SAME_TORCH = TABLE["torch"] == torch.__version__.split("+")[0]
# Which operators torch's own optimizers and functions are made of is up to its version.
OF_TORCH = ("operators", "operator passes", "scalar operators", "peak")
REWRITE = f"what a step costs changed; `{step_costs.COMMAND}` writes the table anew, for a change that is meant"


def comparable(steps: list[Costs]) -> list[Costs]:
    return [{key: value for key, value in step.items() if SAME_TORCH or key not in OF_TORCH} for step in steps]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", settings())
def test_a_step_costs_what_the_table_says(name: str, backend: str) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("counted in Triton's interpreter")
    assert comparable(measure(settings()[name], backend)) == comparable(ROWS[name][backend]), REWRITE


def test_collectives_are_those_of_the_table() -> None:
    expected = {name: row["all-reduces"] for name, row in ROWS.items()}
    assert step_costs.all_reductions() == expected, REWRITE


def test_the_page_shows_the_table() -> None:
    assert step_costs.DOCS.read_text() == step_costs.as_markdown(ROWS), REWRITE
    assert list(ROWS) == list(settings())


def test_what_is_counted() -> None:
    """Reads and writes of operators whose traffic is known, and none where nothing moves."""
    with Meter() as meter:
        a, b, out = (torch.ones(2, 512) for _ in range(3))
        n = a.nbytes
        counts: list[tuple[str, Any, int]] = [
            ("add", lambda: a + b, 3 * n),
            ("add_", lambda: a.add_(b), 3 * n),
            ("add out", lambda: torch.add(a, b, out=out), 3 * n),
            ("copy_", lambda: a.copy_(b), 2 * n),
            ("zero_", lambda: a.zero_(), n),
            ("zeros_like", lambda: torch.zeros_like(a), n),
            ("clone", lambda: a.clone(), 2 * n),
            ("double", lambda: a.double(), 3 * n),
            ("sum", lambda: a.sum(), n + 4),
            ("foreach", lambda: torch._foreach_mul_([a, b], 2.0), 4 * n),
            ("view", lambda: a.view(-1)[3:].detach(), 0),
            ("empty", lambda: torch.empty_like(a), 0),
        ]
        for name, call, moved in counts:
            meter.clear()
            call()
            assert meter.moved == moved, name
            assert meter.passes.total() == (moved > 0), name
        meter.clear()
        scalar = torch.ones(()) * 2
        assert meter.tiny.total() == 2
        assert meter.moved == 0
        scalar.item()
        assert meter.reads == 1
        with meter.pause():
            scalar.item(), a + b
        assert (meter.reads, meter.moved) == (1, 0)


def test_kernels_are_counted() -> None:
    """SAM's step: two norms, a perturbation, an update; per element 1 + 4 + 1 + 5 tensors read or written."""
    if torch.cuda.is_available():
        pytest.skip("counted in Triton's interpreter")
    (step,) = measure(settings()["sam"], "triton")
    assert step["kernels"] == {"perturb": 1, "restore_sgd": 1, "sum_sq": 2}
    assert step["kernel passes"] == 11.0
    assert step["closure calls"] == 2

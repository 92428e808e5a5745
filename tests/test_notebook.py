"""The notebook of examples/: its cells run as they stand, and what its text says of the curves is so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "lesam_in_five_minutes.ipynb"


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    """What its variables are at its end; a cell is executed as a kernel does it, without the kernel."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "show", lambda: None)
        for number, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    yield names
    plt.close("all")


def test_what_the_text_says(names: dict[str, Any]) -> None:
    assert all(accuracy > 0.95 for _, _, accuracy in names["runs"].values())
    rises = {}
    for name, (_, history, _) in names["runs"].items():
        if name != "SGD":
            rho, loss, perturbed = history.T
            rises[name] = names["smooth"](perturbed - loss)
            if name.startswith("SAM"):
                assert rho.min() == pytest.approx(0.1, rel=1e-5)
                assert rho.max() == pytest.approx(0.1, rel=1e-5)
            else:
                assert rho[0] < 0.1
                assert rho[-1] == pytest.approx(0.5, rel=1e-5)
    sam, lesam = rises["SAM, rho 0.1"], rises["LE-SAM, sigma 0.1"]
    assert sam[-1] < sam[0] / 30
    assert lesam.min() > 0.1 / 3
    assert lesam.max() < 0.1 * 3


def test_two_pictures_and_their_numbers(names: dict[str, Any]) -> None:
    """It is committed with what it shows, and shows now: 2 figures, and a curve for each run in the last one."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    assert not any("error" in output["output_type"] for output in shown)
    assert len(plt.get_fignums()) == 2
    assert len(names["axis"].lines) == len(names["runs"])

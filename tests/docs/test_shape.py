"""What pages are like: short, in the index, and their tables and pictures as what they are made of."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import lesam_dist
import lesam_dist.analysis
import lesam_dist.parallel
import lesam_dist.tasks
from lesam_dist.config.command_line import read_command_line
from tests.docs.pages import PAGES, ROOT


def test_pages_are_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900
    assert all(len(page.read_text().splitlines()) < 400 for page in PAGES)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} == set(
        re.findall(r"^\| \[(\w+\.md)\]\(\1\)", index, re.M)
    )


def test_the_reference_is_complete() -> None:
    """Every public name is there, with the file that defines it."""
    modules = (lesam_dist, lesam_dist.tasks, lesam_dist.analysis, lesam_dist.parallel)
    public = {f"{m.__name__}.{n}": getattr(m, n) for m in modules for n in m.__all__ if not n.startswith("_")}
    entries = re.findall(r"^- \[`([\w.]+)`\]\(\.\./(\S+)\): ", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert len(dict(entries)) == len(entries)
    assert set(public) <= set(dict(entries))
    for entry, file in entries:
        module, _, last = entry.rpartition(".")
        assert getattr(importlib.import_module(module), last).__module__ == file.removesuffix(".py").replace("/", ".")


def test_the_tables_of_methods() -> None:
    """They are what the classes say of themselves, and every method that a user can import is there."""
    script = runpy.run_path(str(ROOT / "docs" / "render_methods.py"))
    page = (ROOT / "docs" / "methods.md").read_text()
    assert page == script["render"](page), "run python docs/render_methods.py"
    classes = {name for name in lesam_dist.__all__ if hasattr(getattr(lesam_dist, name), "registration")}
    assert set(re.findall(r"^\| `(\w+)` \| `\w+` \| [^`]", page, re.M)) == classes


@pytest.mark.parametrize("page", ["methods.md", "distributed.md"])
def test_methods_without_scopes(page: str) -> None:
    """The methods that a page says are refused under the scopes "local" and "replica" are, and no others."""
    (listed,) = re.findall(
        r"drift\s+apart: ((?:.|\n)*?)have no first\s+pass to change", (ROOT / "docs" / page).read_text()
    )
    named = {name.strip("`") for name in re.findall(r"`\w+`|LE-SAM\+", listed)}
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    classes = {n: getattr(lesam_dist, n) for n in lesam_dist.__all__}
    cases = {n: (cls, {}) for n, cls in classes.items() if hasattr(cls, "registration")}
    cases["LE-SAM+"] = (lesam_dist.LESAM, {"alpha": 0.5})

    def is_refused(cls: Any, **arguments: Any) -> bool:
        try:
            cls(lesam_dist.norm_groups(net), torch.optim.SGD, lr=0.1, momentum=0.9, scope="local", **arguments)
        except ValueError:
            return True
        return False

    assert named == {case for case, (cls, arguments) in cases.items() if is_refused(cls, **arguments)}


def test_the_picture(tmp_path: Path) -> None:
    """Its script draws what runs log, and the README's caption says what the picture's own metadata say."""
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "loss_budget.py"))
    for command in script["COMMANDS"].values():
        read_command_line(command.split())
    line = {"loss": 1.0, "rho": 0.05, "perturbed_loss": 1.1}
    log = [{"epoch": step / 4, **line} for step in range(1, 9)]
    script["draw"]({"SAM": log, "LE-SAM": log}, tmp_path / "drawn.svg", "how it was made")
    assert "how it was made" in (tmp_path / "drawn.svg").read_text()
    picture = ROOT / "docs" / "figures" / "loss_budget.svg"
    found = re.search(r"<dc:description>commit (\w+), .*digits_resnet8_sam.*digits_resnet8_lesam", picture.read_text())
    assert found
    assert f"as of commit {found[1]}" in (ROOT / "README.md").read_text()


def test_the_drawn_figures(tmp_path: Path) -> None:
    """Their script draws them, and what the text beside them says of them holds."""
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "picture.py"))
    radius, rise = script["radius"], script["rise"]
    steep, flat, rho = script["STEEP"], script["FLAT"], script["RHO"]
    assert [rho * norm for norm in (steep, flat)] == pytest.approx([0.25, 0.075])
    assert [rise(rho, norm) - rho * norm for norm in (steep, flat)] == pytest.approx([0.0625, 0.0625])
    assert [radius(norm) for norm in (steep, flat)] == pytest.approx([0.12, 0.4])
    assert [rise(radius(norm), norm) - 0.12 for norm in (steep, flat)] == pytest.approx([0.0144, 0.16])
    ends = [(script["drift"](dtype)[0], script["drift"](dtype)[-1]) for dtype in (torch.float32, torch.bfloat16)]
    assert ends == [
        (pytest.approx(3e-9, rel=0.2), pytest.approx(8e-8, rel=0.2)),
        (pytest.approx(2e-4, rel=0.2), pytest.approx(4e-3, rel=0.2)),
    ]
    script["draw_budget"](figure := Figure())
    assert len(figure.axes) == 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "hsdp"])
def test_the_diagrams_of_strategies(strategy: str, tmp_path: Path) -> None:
    """Every row has each process once, and bars are as many as the calls of the table of what a step communicates."""
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "strategies.py"))
    rows = script["FIGURES"][strategy]()
    processes = [sorted(i for part in row for i in range(part.first, part.last + 1)) for row in rows]
    assert all(row == list(range(len(processes[0]))) for row in processes)
    scalars = sum(row[0].what == "a number" for row in rows)
    named = {"ddp": "DDP", "fsdp2": "FSDP2", "hsdp": "HSDP, shards of s"}[strategy]
    table = (ROOT / "docs" / "distributed.md").read_text()
    assert re.findall(rf"^\| {named} \| [^|]+ \| (\d) \|", table, re.M) == [str(scalars)]
    script["draw"](rows, tmp_path / "drawn.svg")
    assert "</svg>" in (tmp_path / "drawn.svg").read_text()


def test_figures_are_small_and_used() -> None:
    shown = {target for page in PAGES for target in re.findall(r"\]\((?:docs/)?figures/([\w.]+)\)", page.read_text())}
    there = [path for path in (ROOT / "docs" / "figures").iterdir() if path.suffix in (".svg", ".png")]
    assert {path.name for path in there} == shown
    assert all(path.stat().st_size <= 200_000 for path in there)

"""curves.png while a run goes on: whole at any time, at a bounded cost, and never a reason for a run to end."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lesam_dist.tasks.classification.task import ACC1
from lesam_dist.train import curves as module
from lesam_dist.train.curves import SHARE, Curves
from lesam_dist.train.telemetry import RunLog
from tests.conftest import Command


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    log = RunLog(tmp_path, 20)
    for step in (10, 20):
        log.write("train", step, step / 10, {"loss": 2.0, "rho": 0.1})
        log.write("val", step, step / 10, {"loss": 1.0, "acc1": float(step)})
    log.close("finished", 1.0)
    return tmp_path


def test_drawing_takes_a_bounded_share_of_the_time(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of epochs of any length, with drawings that take longer and longer."""
    clock, drawn = Clock(), list[float]()

    def draw(*_: object) -> None:
        drawn.append(clock.now)
        clock.now += 0.2 * len(drawn)

    monkeypatch.setattr(module, "plot_curves", draw)
    found, spent = Curves(run_dir, ACC1, clock), 0.0
    for epoch in range(4000):
        clock.now += 1 if epoch % 5 else 7
        before = clock.now
        found.refresh()
        spent += clock.now - before
    assert len(drawn) > 5
    assert drawn[0] < 60
    assert spent / clock.now <= SHARE + 0.2 * len(drawn) / clock.now, "but for the last one"


def test_a_picture_is_replaced_whole(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there stays until the next one is complete."""
    found = Curves(run_dir, ACC1)
    assert found.refresh() is None
    assert not (run_dir / "curves.png").exists(), "the run has only begun"
    assert found.draw() is None
    before = (run_dir / "curves.png").read_bytes()
    Image.open(run_dir / "curves.png").verify()

    def tears(self: object, path: Path, **_: object) -> None:
        path.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", tears)
    told = found.draw()
    assert told is not None
    assert told.startswith(
        f"warning: {run_dir}/curves.png cannot be drawn ([Errno 28] No space left on device): the run"
    )
    assert found.draw() is None, "said once"
    assert (run_dir / "curves.png").read_bytes() == before


def test_a_run_whose_plots_fail(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch tries, and the run ends well."""
    tried = []

    def fail(*_: object) -> None:
        tried.append(1)
        raise ValueError("no font")

    monkeypatch.setattr(module, "plot_curves", fail)
    monkeypatch.setattr(module, "SHARE", float("inf"))
    status, out, err = command(*small, "--run_dir", tmp_path / "run", "--parallel.device", "cpu")
    assert (status, err) == (0, "")
    assert len(tried) == 3 + 1
    assert out.count("curves.png cannot be drawn (no font)") == 1

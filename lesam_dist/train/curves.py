"""RUN_DIR/curves.png: loss, metric, radius and budget over the steps, drawn while the run goes on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from lesam_dist.tasks.task import Metric
from lesam_dist.train.telemetry import read_metrics

SHARE = 0.02
"""Most of a run's time that drawing takes."""

_FIRST = 0.5  # seconds that the first drawing is taken to need, most of them to import matplotlib


class Curves:
    """Draws after an epoch, where that costs little; rank 0 alone has one.

    In the thread that trains: drawing is Python, and would hold up the launches of a thread beside it just as long.
    All processes wait meanwhile, so it is left out until the last drawing took less than `SHARE` of the time since it
    ended; a log that grows long is drawn less often. Nothing that goes wrong in drawing ends a run.

    Args:
        run_dir: of the run.
        metric: of its task.
        clock: seconds, for tests.
    """

    def __init__(self, run_dir: Path, metric: Metric, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_dir, self.metric, self._clock = run_dir, metric, clock
        self._took, self._since, self._failed = _FIRST, clock(), False

    def refresh(self) -> str | None:
        """Draw, unless it would take too much of the time; what to warn of, the first time that it fails."""
        if self._took > SHARE * (self._clock() - self._since):
            return None
        return self.draw()

    def draw(self) -> str | None:
        """Draw in any case; what to warn of, the first time that it fails."""
        begin = self._clock()
        problem: Exception | None = None
        try:
            plot_curves(self.run_dir, self.metric)
        except Exception as error:  # of matplotlib, of its fonts, or of the disk
            problem = error
        self._since = self._clock()
        self._took = self._since - begin
        if problem is None or self._failed:
            return None
        self._failed = True
        reason = " ".join(str(problem).split()) or type(problem).__name__
        return f"warning: {self.run_dir / 'curves.png'} cannot be drawn ({reason}): the run goes on without it."


def plot_curves(run_dir: Path, metric: Metric) -> Path:
    """Draw loss, the task's metric, rho and sigma over the steps into RUN_DIR/curves.png, in place of what is there."""
    from matplotlib.figure import Figure  # no pyplot: no global state and no display

    lines = read_metrics(run_dir)
    panels: list[tuple[str, Sequence[tuple[str, str, str]]]] = [
        (
            "loss",
            [
                ("train", "loss", "train"),
                ("train", "perturbed_loss", "train, perturbed"),
                ("val", "loss", "val"),
                ("val", "ema_loss", "val, averaged weights"),
                ("val", "lpf", "train, low-pass filtered"),
                ("val", "lpf_loss", "train, the same images"),
            ],
        ),
        (
            metric.title,
            [
                ("val", metric.name, "val"),
                ("val", f"robust_{metric.name}", "val, attacked"),
                ("val", f"ema_{metric.name}", "val, averaged weights"),
            ],
        ),
        ("radius rho", [("train", "rho", "rho")]),
        ("loss budget sigma", [("train", "sigma", "sigma")]),
    ]
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for split, key, label in curves:
            points = [
                (e["step"], e[key]) for e in lines if e["split"] == split and isinstance(e.get(key), (int, float))
            ]
            if points:
                style = {"marker": "o", "markersize": 3} if split == "val" else {}
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, **style)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
            if title == "loss":
                axes.set_yscale("log")  # a first evaluation with young BatchNorm statistics can be off the scale
        else:
            axes.text(0.5, 0.5, "not used by this optimizer", ha="center", transform=axes.transAxes, color="gray")
    name = run_dir.name.encode(errors="replace").decode()  # a name in another encoding than the terminal's
    figure.suptitle(name, parse_math=False)
    target = run_dir / "curves.png"
    aside = run_dir / ".curves.png.partial"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # it draws a box instead
        figure.savefig(aside, dpi=110, format="png")
    aside.replace(target)
    return target

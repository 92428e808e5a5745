"""Draws loss_budget.svg: what SAM and LE-SAM hold constant while a network trains.

    python docs/figures/loss_budget.py [RUNS]

It trains the digits recipe with each on this machine (two to four minutes in all on a CPU core) into the folder RUNS
(default: runs/loss_budget), goes on where an interrupted call stopped, and draws what the runs logged. The picture's
metadata say commit, versions and commands.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lesam_dist.config.command_line import parse
from lesam_dist.train.telemetry import read_metrics

ROOT = Path(__file__).parents[2]
TARGET = Path(__file__).with_name("loss_budget.svg")
_FLAGS = "--logging.every_steps 1 --logging.tensorboard false --parallel.device cpu"
COMMANDS = {
    "SAM": f"--config digits_resnet8_sam {_FLAGS}",
    # A budget that stays: with the recipe's annealing one would not see what the radius does by itself.
    "LE-SAM": f"--config digits_resnet8_lesam --schedule.anneal_start_epoch null {_FLAGS}",
}
COLOURS = {"SAM": "#d55e00", "LE-SAM": "#0072b2"}  # told apart by colour-blind readers too


def train(runs: Path) -> dict[str, list[dict[str, Any]]]:
    """The training lines that each run logged, one a step."""
    lines = {}
    for name, command in COMMANDS.items():
        flags = [*command.split(), "--data.root", str(runs / "data"), "--run_dir", str(runs / name), "--resume", "auto"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "lesam_dist.train", *flags], check=True, env=environment)
        lines[name] = [line for line in read_metrics(runs / name) if line["split"] == "train"]
    return lines


def draw(lines: Mapping[str, list[dict[str, Any]]], target: Path, description: str) -> None:
    """Radius and rise of the loss: each epoch's mean, and the range of the middle 80 % of its steps."""
    lesam, sam = (parse(COMMANDS[name].split()).optimizer.args for name in ("LE-SAM", "SAM"))
    style = {"font.size": 11, "svg.hashsalt": "lesam", "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(9, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, log in lines.items():
            epoch = np.array([line["epoch"] for line in log])
            _curve(left, name, epoch, np.array([line["rho"] for line in log]))
            _curve(right, name, epoch, np.array([line["perturbed_loss"] - line["loss"] for line in log]))
        for axes, level in ((left, lesam["rho_max"]), (right, lesam["sigma"])):
            axes.axhline(float(level or 0), color="black", linewidth=0.9, linestyle="--")
            axes.set(xlabel="epoch", xlim=(0, 15), ylim=(0, 0.22))
            axes.set(xticks=range(0, 16, 3), yticks=np.arange(0, 0.21, 0.05))
            axes.grid(alpha=0.25)
        left.text(15, 0.203, f"LE-SAM's cap: {lesam['rho_max']:g}", ha="right", va="bottom")
        left.text(4.6, 0.135, "LE-SAM", color=COLOURS["LE-SAM"])
        left.text(15, 0.054, f"SAM: always {sam['rho']:g}", color=COLOURS["SAM"], ha="right")
        arrow = {"arrowstyle": "-", "linewidth": 0.9}
        budget = f"LE-SAM's budget $\\sigma$ = {lesam['sigma']:g}"
        right.annotate(budget, (12, lesam["sigma"]), (15, 0.155), ha="right", arrowprops=arrow)
        right.text(2.6, 0.146, "LE-SAM", color=COLOURS["LE-SAM"])
        right.text(3.1, 0.065, "SAM", color=COLOURS["SAM"])
        left.set(title="how far the weights move", ylabel=r"radius $\rho$ (length in weight space)")
        right.set(title="how far the loss rises", ylabel=r"$L(w + \rho\, g/\Vert g\Vert) - L(w)$ (nats)")
        figure.savefig(target, metadata={"Date": None, "Description": description})


def _curve(axes: Axes, name: str, epoch: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> None:
    whole = np.ceil(epoch).astype(int)  # the first epoch's lines have 0 < epoch <= 1
    numbers = np.unique(whole)
    each = [values[whole == number] for number in numbers]
    low, high = np.array([np.quantile(part, (0.1, 0.9)) for part in each]).T
    axes.fill_between(numbers - 0.5, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
    axes.plot(numbers - 0.5, [part.mean() for part in each], color=COLOURS[name], linewidth=2.2)


def describe() -> str:
    """What the picture was made of, for whoever opens the file."""
    last = ["git", "log", "-1", "--format=%h", "--", "lesam_dist", "kernels"]
    commit = subprocess.run(last, cwd=ROOT, capture_output=True, text=True)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread"
    runs = "; ".join(f"{name}: python -m lesam_dist.train {command}" for name, command in COMMANDS.items())
    return f"commit {commit.stdout.strip()}, {versions}. {runs}"


if __name__ == "__main__":
    draw(train(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/loss_budget")), TARGET, describe())

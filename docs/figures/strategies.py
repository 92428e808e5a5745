"""Draws what is summed where in a step, for distributed.md: python docs/figures/strategies.py

A column is a process, a row what all do next. A box is one process's own work; a bar that spans processes is a
collective between them, coloured by what travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FOLDER = Path(__file__).parent
COLOURS = {"own": "#eeeeee", "gradients": "#9ecae1", "weights": "#a1d99b", "a number": "#fdd0a2"}
STYLE = {"font.size": 9.5, "svg.hashsalt": "lesam"}
WIDTH = 9.0  # inches


class Part(NamedTuple):
    """What the processes ``first`` to ``last`` do together; ``what`` is a key of `COLOURS`."""

    first: int
    last: int
    text: str
    what: str = "own"


Rows = Sequence[Sequence[Part]]


def each(texts: str | Sequence[str], processes: int) -> list[Part]:
    """The same of each process, or a text for each."""
    return [Part(i, i, texts if isinstance(texts, str) else texts[i]) for i in range(processes)]


def together(processes: int, text: str, what: str, groups: int = 1) -> list[Part]:
    """A collective of all processes, or one in each of several groups of neighbours."""
    size = processes // groups
    return [Part(group * size, (group + 1) * size - 1, text, what) for group in range(groups)]


def ddp() -> Rows:
    n = 3
    return [
        each([f"process {i}: all of w" for i in range(n)], n),
        each("forward, backward\nof its own samples", n),
        together(
            n, 'gradients averaged, bucket by bucket: all-reduce       (left out with scope="local")', "gradients"
        ),
        each("norm, radius, climb:\nthe same bits everywhere", n),
        each("the same samples\nat the perturbed weights", n),
        together(n, "gradients averaged, bucket by bucket: all-reduce", "gradients"),
        each("w back from the copy,\nupdate", n),
    ]


def fsdp2() -> Rows:
    n = 3
    return [
        each([f"process {i}: third {i} of w,\nof its copy and of the state" for i in range(n)], n),
        together(n, "weights of a unit gathered, for its forward and again for its backward: all-gather", "weights"),
        each("forward, backward\nof its own samples", n),
        together(n, "gradients averaged, each keeps its third: reduce-scatter", "gradients"),
        each("squares of its third", n),
        together(n, "squares added: all-reduce of one float64", "a number"),
        each("climb of its third", n),
        together(n, "the second pass: gather, forward and backward, reduce-scatter", "gradients"),
        together(n, "is any gradient not finite: all-reduce of one float64", "a number"),
        each("its third back from the\ncopy, update", n),
    ]


def hsdp() -> Rows:
    n, replicas = 4, 2
    return [
        each([f"replica {i // 2}\nprocess {i}: half {i % 2} of w" for i in range(n)], n),
        together(n, "weights gathered within a replica: all-gather", "weights", replicas),
        each("forward, backward\nof its own samples", n),
        together(n, "gradients averaged within: reduce-scatter", "gradients", replicas),
        together(
            n,
            'halves averaged between replicas, 0 with 2 and 1 with 3: all-reduce       (left out with scope="replica")',
            "gradients",
        ),
        together(n, "squares added within a replica: one float64", "a number", replicas),
        each("climb of its half", n),
        together(n, "second pass: gather, reduce-scatter within", "gradients", replicas),
        together(n, "halves averaged between replicas, 0 with 2 and 1 with 3: all-reduce", "gradients"),
        together(n, "any not finite within: one float64", "a number", replicas),
        each("its half back from the\ncopy, update", n),
    ]


FIGURES = {"ddp": ddp, "fsdp2": fsdp2, "hsdp": hsdp}


def draw(rows: Rows, path: Path) -> None:
    processes = 1 + max(part.last for part in rows[0])
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 * len(rows) + 0.3), layout="constrained")
        axes = figure.subplots()
        for number, row in enumerate(rows):
            for part in row:
                left, width = part.first + 0.04, part.last - part.first + 0.92
                box = FancyBboxPatch((left, -number + 0.09), width, 0.82, boxstyle="round,pad=0,rounding_size=0.06")
                box.set(facecolor=COLOURS[part.what], edgecolor="none", mutation_aspect=1.5)
                axes.add_patch(box)
                axes.text(left + width / 2, -number + 0.5, part.text, ha="center", va="center")
        used = {part.what for row in rows for part in row} - {"own"}
        for index, what in enumerate(what for what in COLOURS if what in used):
            place = 0.04 + index * 0.14 * processes
            axes.text(place, -len(rows) + 0.6, what, backgroundcolor=COLOURS[what], fontsize=8.5)
        axes.set(xlim=(0, processes), ylim=(-len(rows) + 0.4, 1))
        axes.axis("off")
        figure.savefig(path, metadata={"Date": None, "Description": "drawn by docs/figures/strategies.py"})


if __name__ == "__main__":
    for name, rows in FIGURES.items():
        draw(rows(), FOLDER / f"{name}.svg")

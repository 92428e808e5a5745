"""What `lesam-dist analyze robustness` shows of corruptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lesam_dist.analysis.commands.labels import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lesam_dist.analysis.engine.output import Document


def corruption_rows(corrupted: Document) -> list[tuple[str, str]]:
    """A line for each kind, with the error at each severity, and their mean, of the document's part."""
    severities, errors = _severities(corrupted), _errors(corrupted)
    rows = [("error under corruptions, at severity", " ".join(f"{severity:5d}" for severity in severities) + "   mean")]
    for kind in corrupted["kinds"]:
        each = " ".join(f"{errors[kind['kind'], severity]:5.1f}" for severity in severities)
        rows.append((kind["kind"], f"{each}  {kind['mean_error']:5.1f} %"))
    mean = f"{corrupted['mean_error']:.2f} %, {number(corrupted['mean_nll'])}, {number(corrupted['mean_ece'])}"
    return [*rows, ("mean error (not AlexNet's mCE), NLL, ECE", mean)]


def heat_map(axes: Axes, corrupted: Document) -> None:
    """The error of each kind at each severity."""
    severities, errors = _severities(corrupted), _errors(corrupted)
    kinds = [each["kind"] for each in corrupted["kinds"]]
    axes.imshow(
        [[errors[kind, severity] for severity in severities] for kind in kinds],
        vmin=0,
        vmax=100,
        cmap="Reds",
        aspect="auto",
    )
    for y, kind in enumerate(kinds):
        for x, severity in enumerate(severities):
            error = errors[kind, severity]
            colour = "white" if error > 60 else "black"
            axes.text(x, y, f"{error:.0f}", ha="center", va="center", fontsize="small", color=colour)
    axes.set_xticks(range(len(severities)), [str(severity) for severity in severities])
    axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], fontsize="small")
    axes.set(xlabel="severity", title=f"error (%) under corruptions: mean {corrupted['mean_error']:.1f}")


def _severities(corrupted: Document) -> list[int]:
    return sorted({cell["severity"] for cell in corrupted["cells"]})


def _errors(corrupted: Document) -> dict[tuple[str, int], float]:
    return {(cell["kind"], cell["severity"]): cell["error"] for cell in corrupted["cells"]}

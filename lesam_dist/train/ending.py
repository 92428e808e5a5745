"""What a run says when it has ended: what came of it, where its files are, and the command that trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lesam_dist.tasks.task import Metric
from lesam_dist.train.best import Best, best_evaluation
from lesam_dist.train.curves import Curves
from lesam_dist.train.resume_command import Command


def draw_and_describe(
    curves: Curves, evaluation: Mapping[str, float] | None, epoch: int, command: Command | None, *, stopping: bool
) -> Iterator[str]:
    """Draw the curves a last time, and say what the user is told, line by line.

    Args:
        curves: of the run, which know its folder and its metric.
        evaluation: the last one, if it is known.
        epoch: after how many epochs it was made.
        command: that started the run, if it has finished; says how it is trained for longer.
        stopping: the process was asked to stop and has seconds left: draw nothing.
    """
    if not stopping and (warning := curves.draw()):
        yield warning
    if evaluation:
        yield describe_results(evaluation, epoch, curves.metric, best_evaluation(curves.run_dir, curves.metric))
    drawn = "" if stopping else "curves.png, "
    yield f"results: {curves.run_dir}  (metrics.jsonl, {drawn}checkpoints/, tensorboard/)"
    if command and (longer := command.longer()):
        yield longer


def describe_results(evaluation: Mapping[str, float], epoch: int, metric: Metric, best: Best | None = None) -> str:
    """The last evaluation, which was made after so many epochs, and the best one of the run."""
    beside = {"acc5": "top-5", "robust_acc1": "under attack"}
    others = "".join(f", {text} {evaluation[name]:.2f} %" for name, text in beside.items() if name in evaluation)
    samples = f"{evaluation['samples']:.0f} validation {metric.samples} after epoch {epoch}"
    text = f"{metric.label} {_number(evaluation[metric.name], metric)}{others} of {samples}"
    if best is None:
        return text
    if best.epoch == epoch:
        return f"{text}, the best of all"
    return f"{text}; best after epoch {best.epoch:g}: {_number(best.value, metric)}, chosen on the same ones"


def replay_verdict(images_per_s: float) -> str:
    """What the speed of a run without input is for."""
    return (
        f"data.replay: {images_per_s:.4g} images/s without reading any. Compare images_per_s in metrics.jsonl of the "
        "same command without data.replay: what is missing there is lost to the input."
    )


def _number(value: float, metric: Metric) -> str:
    return f"{value:.2f} {metric.unit}" if metric.unit else f"{value:.4g}"

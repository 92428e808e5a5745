"""`lesam-dist compare`: methods against each other, with the same data, epochs and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lesam_dist.config.command_line import parse
from lesam_dist.config.flags import flags_for
from lesam_dist.config.methods import PLAIN, complete, defaults, method_of
from lesam_dist.config.recipes import base_optimizer, bases, compose_parts, merge, method_part, methods, split
from lesam_dist.errors import UserError, one_line, unknown_name
from lesam_dist.experiments.report import note, number, outcome_numbers, plot, plus_minus, report
from lesam_dist.experiments.runs import ExperimentParser, Outcome, Setting, make_setting, paired_difference, run_all

if TYPE_CHECKING:
    from lesam_dist.tasks.task import Metric

_PREFERRED = "sam"  # what the others are measured against


def compare(argv: Sequence[str]) -> None:
    """Train every method with every seed; show and save the table and the plot.

    Raises:
        UserError: for anything wrong in ``argv``, before the first run starts; as `lesam_dist.train.run.train`.
    """
    parser = _parser()
    arguments, flags = parser.parse_known(argv)
    parser.refuse(flags, ["optimizer.name"])
    names, run_dir = method_names(arguments.methods), arguments.run_dir
    settings = method_settings(arguments.config, names, flags, run_dir, arguments.seeds)
    outcomes, metric, world = run_all(settings, "compare", argv)
    if not world.is_main:
        return
    reference = _PREFERRED if _PREFERRED in names else names[0]
    rows, numbers = compared(outcomes, reference, metric)
    epochs = settings[0].runs[0].epochs
    title = f"{arguments.config}, {epochs} epochs, {arguments.seeds} seed{'s' * (arguments.seeds > 1)}"
    text = f"{title}. {note(metric)} Difference: to {reference} with the same seed, mean and standard error."
    if reference != _PREFERRED:
        text += f" ({_PREFERRED} is not among the methods, so the first one takes its place.)"
    header = ("method", metric.title, "best epoch", f"difference to {reference}", "cost (SGD steps)")
    described = {"config": arguments.config, "flags": flags, "epochs": epochs, "seeds": arguments.seeds}
    plot(run_dir / "compare.png", outcomes, metric, title, "method", None)
    report(run_dir, "compare", header, rows, text, {**described, "reference": reference, "methods": numbers})


def method_settings(
    config: str, names: Sequence[str], flags: Sequence[str], run_dir: Path, seeds: int
) -> list[Setting]:
    """A setting for each method, with these flags; a method's hyper-parameter is of those that have it."""
    optimizers, step = [_optimizer(config, name) for name in names], _step(config)
    return [
        make_setting(name, _sources(config, name), flags_for(optimizer, optimizers, flags, step), run_dir, seeds)
        for name, optimizer in zip(names, optimizers, strict=True)
    ]


def compared(
    outcomes: Sequence[Outcome], reference: str, metric: Metric
) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """The rows of the table, and the same numbers by method; ``reference`` is the method that differences are to."""
    base = next(outcome for outcome in outcomes if outcome.name == reference)
    rows: list[tuple[str, ...]] = []
    numbers: dict[str, Any] = {}
    for outcome in outcomes:
        mean, error = paired_difference(outcome.values, base.values)
        shown = "-" if outcome is base else plus_minus(mean, error, signed=True)
        last, best = plus_minus(outcome.mean, outcome.std), plus_minus(outcome.best_mean, outcome.best_std)
        rows.append((outcome.name, last, best, shown, f"{outcome.cost:.2f}"))
        difference = {"mean": number(mean), "standard_error": number(error)}
        numbers[outcome.name] = outcome_numbers(outcome, metric) | {"difference": difference}
    return rows, numbers


def _parser() -> ExperimentParser:
    parser = ExperimentParser(
        "compare",
        usage="lesam-dist compare --config DATA_MODEL --methods M1,M2,... [--seeds N] [--run_dir DIR] "
        "[--SECTION.FIELD VALUE ...]",
        description="Train several methods with the same seeds, one run after the other, and compare their final top-1 "
        "accuracy: a table (compare.md, compare.json) and a plot (compare.png). Every other flag is one of "
        "`lesam-dist train` and holds for all runs, e.g. --epochs, --data.root or --optimizer.lr; a method's "
        "hyper-parameter holds for those of the methods that have it.",
        config_help="DATA_MODEL, e.g. cifar100_resnet18, where each method has the hyper-parameters of its recipe; or "
        "a YAML file, whose own method is taken as it is, and any other with that method's usual hyper-parameters",
        example="compare --config digits_noisy --methods sgd,sam,lesam --seeds 5",
    )
    parser.add_argument(
        "--methods",
        required=True,
        help=f"names with commas between: {', '.join(known_methods())}, or package.module:Class. Differences are to "
        f"{_PREFERRED}, or to the first one",
    )
    return parser


def known_methods() -> list[str]:
    """The names that `method_names` takes, beside import paths."""
    return sorted({*methods(), *PLAIN})


def method_names(text: str) -> list[str]:
    """The methods that are named, with commas between.

    Raises:
        UserError: one of them is none, or there twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known_methods() and ":" not in name:
            raise unknown_name("method", name, known_methods())
        method_of(method_part(name)["optimizer"]["name"])  # raises for a path where there is no method
    if not names:
        raise UserError("--methods is empty: give names with commas between, e.g. --methods sgd,sam,lesam.")
    if len(set(names)) < len(names):
        raise UserError(f"--methods is {one_line(text)}: each method can be there once.")
    return names


def _base(config: str) -> str | None:
    """The DATA_MODEL of a recipe's name, or of a name without a method; None for a file."""
    found = split(config)
    return found[0] if found else config if config in bases() else None


def _step(config: str) -> str:
    """What the methods of a config step with."""
    base = _base(config)
    return parse(["--config", config]).optimizer.base if base is None else base_optimizer(base)


def _optimizer(config: str, method: str) -> str:
    """What `optimizer.name` is for a method: the baseline of a recipe may be another optimizer than SGD."""
    base = _base(config)
    part = method_part(method) if base is None else compose_parts(base, method)
    name: str = part["optimizer"]["name"]
    return name


def _sources(config: str, method: str) -> list[str]:
    """What makes up the config of a method: a recipe, or a file with the method over it."""
    base = _base(config)
    if base is not None:
        return [f"{base}_{method}"] if method in methods() else [str(yaml.safe_dump(compose_parts(base, method)))]
    optimizer = parse(["--config", config]).optimizer
    own = "lesam_plus" if optimizer.name == "lesam" and complete(optimizer)["alpha"] else optimizer.name
    if own == method:
        return [config]
    part = method_part(method)
    kind = method_of(part["optimizer"]["name"])
    usual = (
        {} if kind is None else {"optimizer": {"args": defaults(kind)}}
    )  # rather than what the file has by that name
    return [config, str(yaml.safe_dump(merge(usual, part)))]

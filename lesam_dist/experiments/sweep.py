"""`lesam-dist sweep`: one field of the config at several values, as in the paper's Figure 7."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lesam_dist.config.explain import unknown_key
from lesam_dist.config.values import get
from lesam_dist.errors import UserError, one_line
from lesam_dist.experiments.report import note, outcome_numbers, plot, plus_minus, report
from lesam_dist.experiments.runs import ExperimentParser, make_setting, run_all


def sweep(argv: Sequence[str]) -> None:
    """Train with every value of the field and every seed; show and save the table and the plot.

    Raises:
        UserError: for anything wrong in ``argv``, before the first run starts; as `lesam_dist.train.run.train`.
    """
    parser = _parser()
    arguments, flags = parser.parse_known(argv)
    field, run_dir = arguments.field, arguments.run_dir
    texts = _value_texts(arguments.values)
    parser.refuse([f"--{field}"], ["run_dir", "seed", "resume", "dry_run"])
    parser.refuse(flags, [field])
    if wrong := unknown_key([field]):
        raise UserError(f"--field: {wrong}")
    settings = [
        make_setting(f"{field}={text}", [arguments.config], [*flags, f"--{field}", text], run_dir, arguments.seeds)
        for text in texts
    ]
    values = [get(setting.runs[0], field) for setting in settings]
    _check_distinct(field, values)
    outcomes, metric, world = run_all(settings, "sweep", argv)
    if not world.is_main:
        return
    epochs = settings[0].runs[0].epochs
    title = f"{arguments.config}, {epochs} epochs, {arguments.seeds} seed{'s' * (arguments.seeds > 1)}"
    rows = [
        (
            text,
            plus_minus(outcome.mean, outcome.std),
            plus_minus(outcome.best_mean, outcome.best_std),
            f"{outcome.cost:.2f}",
        )
        for text, outcome in zip(texts, outcomes, strict=True)
    ]
    results = [{"value": v, **outcome_numbers(o, metric)} for v, o in zip(values, outcomes, strict=True)]
    described = {"config": arguments.config, "flags": flags, "epochs": epochs, "seeds": arguments.seeds}
    plot(run_dir / "sweep.png", outcomes, metric, title, field, _numbers(values))
    header = (field, metric.title, "best epoch", "cost (SGD steps)")
    report(run_dir, "sweep", header, rows, f"{title}. {note(metric)}", {**described, "field": field, "values": results})


def _parser() -> ExperimentParser:
    parser = ExperimentParser(
        "sweep",
        usage="lesam-dist sweep --config NAME_OR_FILE --field SECTION.FIELD --values V1,V2,... [--seeds N] "
        "[--run_dir DIR] [--SECTION.FIELD VALUE ...]",
        description="Train with several values of one field of the config, one run after the other, and compare the "
        "final top-1 accuracy: a table (sweep.md, sweep.json) and a plot with error bars (sweep.png). Every other flag "
        "is one of `lesam-dist train` and holds for all runs.",
        config_help="a recipe's name, e.g. cifar100_resnet18_lesam, or a YAML file",
        example="sweep --config digits_noisy_resnet8_lesam --field optimizer.sigma --values 0.05,0.1,0.2",
    )
    parser.add_argument("--field", required=True, help="the field, e.g. optimizer.sigma, as in lesam-dist train --help")
    help_values = "its values with commas between; lists in brackets: [0.1,1],[0.5,1]; null for none"
    parser.add_argument("--values", required=True, help=help_values)
    return parser


def _value_texts(text: str) -> list[str]:
    """Each value as one would write it behind a flag; commas inside brackets do not count."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    texts = [part.strip() for part in parts]
    if not all(texts):
        raise UserError(
            f"--values is '{one_line(text)}': a value is empty. Give them with commas between, e.g. 0.1,0.2."
        )
    if "/" in text:
        raise UserError(f"--values is '{one_line(text)}': values name folders, and cannot have a '/' in them.")
    return texts


def _check_distinct(field: str, values: Sequence[Any]) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise UserError(f"--values has {value} twice for {field}: give each value once.")


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """The values as places on an axis, None where they are not all numbers."""
    are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return [float(value) for value in values] if are_numbers else None

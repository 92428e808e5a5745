"""`lesam-dist domains`: training on each domain in turn, testing on all others, as in section 6.2 of the paper."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lesam_dist.config.domain_checks import BUILTIN, BUILTIN_DOMAINS, WHERE_FROM
from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError, one_line, unknown_name
from lesam_dist.experiments.compare import known_methods, method_names, method_settings
from lesam_dist.experiments.domain_results import (
    NOTE,
    as_outcome,
    by_source,
    numbers,
    outcome_on_targets,
    over_sources,
    pairs,
)
from lesam_dist.experiments.report import markdown, number, plot, report
from lesam_dist.experiments.runs import ExperimentParser, run_all


def domains(argv: Sequence[str]) -> None:
    """Train every method with every source domain and seed; show and save the tables and the plot.

    Raises:
        UserError: for anything wrong in ``argv``, before the first run starts; as `lesam_dist.train.run.train`.
    """
    parser = _parser()
    arguments, flags = parser.parse_known(argv)
    parser.refuse(flags, ["optimizer.name", "domains.source", "domains.target"])
    names, run_dir, seeds = method_names(arguments.methods), arguments.run_dir, arguments.seeds
    config = method_settings(arguments.config, names[:1], _from("any", flags), run_dir, 1)[0].runs[0]
    settings = {
        (source, setting.name): replace(setting, name=f"{source}/{setting.name}")
        for source in _sources(config, arguments.sources)
        for setting in method_settings(arguments.config, names, _from(source, flags), run_dir / source, seeds)
    }
    outcomes, metric, world = run_all(list(settings.values()), "domains", argv)
    if not world.is_main:
        return
    tested = {
        key: [
            None if math.isnan(value) else outcome_on_targets(Path(run.run_dir), chooses=not run.ema.swad)
            for run, value in zip(setting.runs, outcome.values, strict=True)
        ]
        for (key, setting), outcome in zip(settings.items(), outcomes, strict=True)
    }
    costs = {method: outcome.cost for (_, method), outcome in zip(settings, outcomes, strict=True)}
    methods = [as_outcome(name, over_sources(tested, name), costs[name]) for name in names]
    title = f"{arguments.config}, {config.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}"
    described = {
        "config": arguments.config,
        "flags": flags,
        "epochs": config.epochs,
        "seeds": seeds,
        "mean": {outcome.name: [number(value) for value in outcome.values] for outcome in methods},
        "runs": numbers(tested),
    }
    plot(run_dir / "domains.png", methods, metric, title, "method", None)
    report(run_dir, "domains", *by_source(tested, methods), f"{title}. {NOTE}\n\n{markdown(*pairs(tested))}", described)


def _from(source: str, flags: Sequence[str]) -> list[str]:
    return [*flags, "--domains.source", json.dumps([source])]


def _parser() -> ExperimentParser:
    parser = ExperimentParser(
        "domains",
        usage="lesam-dist domains --config DATA_MODEL --methods M1,M2,... [--sources D1,D2,...] [--seeds N] "
        "[--run_dir DIR] [--SECTION.FIELD VALUE ...]",
        description="Train each method on each domain in turn, with the same seeds, and test it on all other domains: "
        "a table by source domain and one of every pair (domains.md, domains.json), and a plot (domains.png). Every "
        "other flag is one of `lesam-dist train` and holds for all runs.",
        config_help="DATA_MODEL, e.g. pacs_resnet18_ermpp, or a YAML file with task: domains",
        example="domains --config digit_domains_resnet8_ermpp --methods sgd,sam,lesam",
    )
    names = ", ".join(known_methods())
    parser.add_argument("--methods", required=True, help=f"with commas between: {names}, or package.module:Class")
    parser.add_argument("--sources", help="domains to train on, with commas between (default: all)")
    return parser


def _sources(config: Config, text: str | None) -> list[str]:
    """The domains that are asked for, or all.

    Raises:
        UserError: the config has another task, or data.root no such domain.
    """
    found = list(BUILTIN_DOMAINS) if config.data.builtin == BUILTIN else _folders(config.data.root)
    if text is None:
        return found
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in found:
            raise unknown_name("domain in --sources", name, found)
    if not names or len(set(names)) < len(names):
        raise UserError(f"--sources is '{one_line(text)}': name each domain once, e.g. {','.join(found)}.")
    return names


def _folders(root: str | None) -> list[str]:
    from lesam_dist.data.folder import subfolders  # which needs torch

    if root is None or not Path(root).is_dir():
        state = "not set" if root is None else f"'{root}', which does not exist"
        raise UserError(
            f"data.root is {state}: give the folder that holds DOMAIN/CLASS/IMAGE with --data.root DIR. {WHERE_FROM}"
        )
    return subfolders(Path(root))

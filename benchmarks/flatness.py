"""Is what generalises better also flatter? Several methods and seeds on small data, and how the ranks go together.

    python benchmarks/flatness.py --config digits_noisy_resnet8 --folder runs/flatness [--methods sgd,sam,lesam]
        [--seeds 5] [--jobs 2] [FLAGS OF `lesam-dist train`]

Trains each method of the recipes with each seed and makes the analyses of `lesam-dist analyze` of every last
checkpoint, one run at a time on each of so many processes of one thread. The same command goes on after an
interruption. Tables: each measure by method, mean and standard deviation over the seeds; the difference to the first
method with the same seed; and Kendall's rank correlation to the test error. docs/flatness.md reads the results.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch
from lib.arguments import Parser, names_of
from lib.ranks import Mean, Run, correlations, mean_of
from lib.report import Report, progress, table

from lesam_dist.analysis.command import analyze
from lesam_dist.config.command_line import read_command_line
from lesam_dist.config.recipes import methods
from lesam_dist.train.run import train

METHODS = ("sgd", "sam", "asam", "lesam", "lesam_plus")
_CORRUPTED = "--corruptions", "all", "--severities", "3"
ANALYSES: dict[str, tuple[str, ...]] = {
    "hessian": ("--samples", "128", "--top", "1", "--trace_vectors", "10", "--density_vectors", "0"),
    "lpf": ("--samples", "256", "--draws", "20"),
    "sharpness": (
        *("--samples", "256", "--parts", "auto_pgd", "--rho", "0.05", "--adaptive_rho", "0.5"),
        *("--linf_rho", "--adaptive_linf_rho"),
    ),
    "robustness": (
        "--samples",
        "all",
        "--linf",
        "8/255",
        "--l2",
        "128/255",
        "--corruptions",
        "all",
        "--severities",
        "3",
    ),
}
"""What is asked of each checkpoint: of the same images and random numbers for all of them; 359 are all that digits have
for validation."""

Results = Mapping[str, Any]
"""By analysis, what its JSON has under "results"; and the run's last "evaluation", of all validation images."""


class Measure(NamedTuple):
    """A number of a run, and the digits to show of it. More of each is worse."""

    name: str
    of: Callable[[Results], float]
    digits: int


def _attacked(norm: str) -> Callable[[Results], float]:
    return lambda r: 100 - next(a["accuracy"] for a in r["robustness"]["attacked"] if a["norm"] == norm)


def _auto_pgd(is_adaptive: bool) -> Callable[[Results], float]:
    measures = "sharpness", "measures"
    return lambda r: next(
        m["mean"] for m in r[measures[0]][measures[1]] if m["part"] == "auto_pgd" and m["adaptive"] == is_adaptive
    )


MEASURES = (
    Measure("test error (%)", lambda r: 100 - r["evaluation"]["acc1"], 2),
    Measure("test NLL", lambda r: r["evaluation"]["loss"], 3),
    Measure("training loss", lambda r: r["lpf"]["loss"], 3),
    Measure("largest eigenvalue", lambda r: r["hessian"]["eigenvalues"][0], 1),
    Measure("trace", lambda r: r["hessian"]["trace"]["mean"], 0),
    Measure("LPF - L, sigma 0.01", lambda r: r["lpf"]["difference"], 4),
    Measure("worst rise, rho 0.05", _auto_pgd(False), 3),
    Measure("worst rise, adaptive 0.5", _auto_pgd(True), 3),
    Measure("ECE", lambda r: r["evaluation"]["ece"], 3),
    Measure("PGD error, l_inf 8/255 (%)", _attacked("linf"), 2),
    Measure("PGD error, l_2 128/255 (%)", _attacked("l2"), 2),
    Measure("corruption error (%)", lambda r: r["robustness"]["corrupted"]["mean_error"], 2),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    runs = [(method, seed) for seed in range(args.seeds) for method in args.methods]
    own = {"config": args.config, "flags": args.flags, "analyses": {k: list(v) for k, v in ANALYSES.items()}}
    found: dict[Run, Results] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(measured, args.folder, args.config, run, args.flags, own): run for run in runs}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            progress(f"{len(found)}/{len(runs)}: {' seed '.join(map(str, futures[future]))}")
    numbers = {m.name: {run: m.of(found[run]) for run in runs} for m in MEASURES}
    title = f"{args.config}: {len(args.methods)} methods, {args.seeds} seeds"
    report = Report(args, "flatness.py", torch.device("cpu"), title, **own)
    rows = [{"method": m, "seed": s, **{name: of[m, s] for name, of in numbers.items()}} for m, s in runs]
    report.add(sections(numbers, args.methods, args.seeds), rows)
    return 0


def parse(argv: Sequence[str] | None) -> Any:
    parser = Parser(__doc__)
    parser.allow_abbrev = False
    parser.add_argument("--config", required=True, metavar="DATA_MODEL", help="as digits_noisy_resnet8")
    parser.add_argument("--folder", type=Path, required=True, help="for all runs: FOLDER/METHOD/seed_K")
    parser.add_argument("--methods", type=names_of(methods()), default=METHODS, metavar="A,B", help="of the recipes")
    parser.add_argument("--seeds", type=int, default=5, help="their number; default: 5")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: 1")
    parser.add_files()
    argv = sys.argv[1:] if argv is None else list(argv)
    args, args.flags = parser.parse_known_args(argv)
    args.argv = argv
    if min(args.seeds, args.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    return args


def measured(folder: Path, config: str, run: Run, flags: Sequence[str], own: dict[str, Any]) -> Results:
    """Train and analyse one run, unless that is done; what its analyses have found."""
    method, seed = run
    run_dir = folder / method / f"seed_{seed}"
    done = run_dir / "flatness.json"
    if done.exists() and (known := json.loads(done.read_text()))["settings"] == own:
        return known["results"] | {"evaluation": last_evaluation(run_dir)}
    output = io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            cv2.setNumThreads(1)  # which the corruptions use
            argv = ["--config", f"{config}_{method}", *flags, "--seed", str(seed), "--resume", "auto"]
            read = read_command_line([*argv, "--run_dir", str(run_dir)])
            train(read.config, read.given)
            for name, settings in ANALYSES.items():
                analyze([name, str(run_dir), *settings, "--force"])
    except BaseException as error:
        raise RuntimeError(f"{run_dir}: {output.getvalue()[-2000:]}\n{traceback.format_exc()}") from error
    found = {}
    for name in ANALYSES:
        (path,) = (run_dir / "analysis").glob(f"{name}-*.json")
        found[name] = json.loads(path.read_text())["results"]
    done.write_text(json.dumps({"settings": own, "results": found}) + "\n")
    return found | {"evaluation": last_evaluation(run_dir)}


def last_evaluation(run_dir: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluation: dict[str, float] = [line for line in lines if line["split"] == "val"][-1]
    return evaluation


def sections(numbers: Mapping[str, Mapping[Run, float]], names: Sequence[str], seeds: int) -> str:
    """The three tables."""
    digits = {m.name: m.digits for m in MEASURES}
    means, differences, ranks = [], [], []
    errors = numbers[MEASURES[0].name]
    for measure, of in numbers.items():
        each = {name: [of[name, seed] for seed in range(seeds)] for name in names}
        means.append([measure, *(_plus_minus(*_mean_and_std(each[name]), digits[measure]) for name in names)])
        apart = [mean_of(a - b for a, b in zip(each[name], each[names[0]], strict=True)) for name in names[1:]]
        differences.append([measure, *(_shown(mean, digits[measure]) for mean in apart)])
        if of is not errors:
            tau = correlations(of, errors)
            ranks.append([measure, f"{tau.overall:+.2f}", _shown(tau.within_seeds, 2), _shown(tau.within_methods, 2)])
    between = ["measure", "all runs", "methods, within a seed", "seeds, within a method"]
    return "\n".join(
        [
            f"Mean and standard deviation over {seeds} seeds; more of each is worse:\n",
            table(["measure", *names], means),
            f"Difference to {names[0]} with the same seed, mean ± standard error. *: a two-sided t-test at 5 % tells "
            "it from 0, as it does one in twenty that are 0:\n",
            table(["measure", *names[1:]], differences),
            "Kendall's tau with the test error, mean ± standard error where it is one of several:\n",
            table(between, ranks),
        ]
    )


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    mean = mean_of(values)
    return mean.value, mean.error * mean.count**0.5


def _plus_minus(value: float, spread: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" + (f" ± {spread:.{digits}f}" if spread == spread else "")


def _shown(mean: Mean, digits: int) -> str:
    if not mean.count:
        return "-"
    return _plus_minus(mean.value, mean.error, digits, "+") + ("*" if mean.is_shown() else "")


if __name__ == "__main__":
    sys.exit(main())

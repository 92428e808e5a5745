"""The first screen: which method came out ahead, by how much, over how many seeds, at what cost; or that none did."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lesam_dist.analysis.commands.labels import number
from lesam_dist.experiments.report import plus_minus
from lesam_dist.report.blocks import Block, Section, Table, Text
from lesam_dist.report.grouping import differing
from lesam_dist.report.reading import Run
from lesam_dist.report.results import Result, compare, rank
from lesam_dist.report.statistics import LEVEL, Difference, Spread
from lesam_dist.tasks.task import Metric

_FEW = 10_000  # validation images below which it is said what one of them is
_NOTE = (
    " on the validation samples: mean and standard deviation (n - 1) over the seeds that finished. The best epoch "
    "is chosen by the samples that it is measured on, and so flatters; the last is what counts. Cost: forward and "
    "backward passes of a step, and of the whole run, where SGD makes one a step."
)


def summary(results: Sequence[Result]) -> tuple[str, Section]:
    """The headline, and the table below it."""
    blocks: list[Block] = [_table(results)]
    if more := _more(results):
        blocks.append(Text(" ".join(more), "note"))
    return headline(results), Section("summary", "Summary", blocks)


def headline(results: Sequence[Result]) -> str:
    """A sentence or two; claims no difference that the seeds do not show."""
    ranked = rank(results)
    if not ranked:
        return "No run has finished yet."
    return _unbroken(_of_one(ranked[0]) if len(ranked) == 1 else _of_several(ranked, results))


def _of_one(result: Result) -> str:
    n, epochs = len(result.by_seed), result.group.runs[0].config.epochs
    over = f", n = {n} seeds." if n > 1 else ". One seed says nothing of the spread."
    return f"{result.name} reaches {_reached(result)} after {epochs} epochs, at {_cost(result)} SGD steps a step{over}"


def _of_several(ranked: Sequence[Result], results: Sequence[Result]) -> str:
    if _elsewhere(results):
        return "These runs were evaluated on different images, so their results are not compared."
    first, second = ranked[:2]
    found = compare(results)[first.name, second.name]
    one, two = (f"{each.name} ({amount(each.last(), each.metric)})" for each in (first, second))
    costs = f"Cost of a step in SGD steps: {', '.join(f'{each.name} {_cost(each)}' for each in ranked)}."
    if found.n < 2:
        return f"One seed does not tell which is best. {_most(first)} is {one}, then {two}. {costs}"
    by = f"{_difference(found)}{_points(first.metric)}, n = {found.n} seeds{', paired' * found.paired}"
    if found.is_shown:
        return f"{first.name} comes out ahead with {_reached(first)}, by {by}, over {two}. {costs}"
    return f"The seeds show no difference between the two {_most(first).lower()}, {one} and {two}: {by}. {costs}"


def _reached(result: Result) -> str:
    return f"{amount(result.last(), result.metric)} {result.metric.label}"


def _most(result: Result) -> str:
    return "Highest" if result.metric.higher_is_better else "Lowest"


def _points(metric: Metric) -> str:
    return " points" if metric.unit == "%" else ""


def _cost(result: Result) -> str:
    return f"{result.cost:.3g}"


def _unbroken(text: str) -> str:
    """Numbers stay in one line."""
    return text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")


def percent(spread: Spread | None) -> str:
    """Of accuracies."""
    return "none" if spread is None else f"{plus_minus(spread.mean, spread.std)} %"


def amount(spread: Spread | None, metric: Metric) -> str:
    """Of a metric, in its unit."""
    if metric.unit == "%":
        return percent(spread)
    text = "none" if spread is None else plain(spread)
    return f"{text} {metric.unit}".rstrip()


def plain(spread: Spread | None) -> str:
    """Of anything else, in four digits, its deviation in two."""
    if spread is None:
        return "-"
    return number(spread.mean) + ("" if math.isnan(spread.std) else f" ± {spread.std:.2g}")


def _difference(found: Difference) -> str:
    return plus_minus(found.mean, found.error, signed=True)


def _more(results: Sequence[Result]) -> list[str]:
    """What the headline rests on."""
    texts = []
    found = {} if _elsewhere(results) else compare(results)
    metric = results[0].metric
    points = _points(metric)
    shown = [
        f"{first} over {second}, {_difference(each)}{points} ({each.low:+.2f} to {each.high:+.2f})"
        for (first, second), each in found.items()
        if each.is_shown
    ]
    if any(not math.isnan(each.error) for each in found.values()):
        how = f"{100 * LEVEL:.0f} % for all {len(found)} together, by Student's t with Bonferroni's correction"
        how = how if len(found) > 1 else f"{100 * LEVEL:.0f} %, by Student's t"
        texts.append(f"Differences that the seeds show ({how}): {'; '.join(shown) or 'none'}.")
    others = [path for path in differing([r.group for r in results]) if not path.startswith("optimizer.")]
    if others:
        texts.append(f"They differ in more than the optimizer: {', '.join(others)}.")
    samples = [count for result in results for run in result.group.runs if (count := _samples(run))]
    if len(set(samples)) == 1 and samples[0] < _FEW and metric.name == "acc1":
        texts.append(f"There are {samples[0]:.0f} validation images: one is {100 / samples[0]:.2g} points.")
    return texts


def _table(results: Sequence[Result]) -> Table:
    reference = next((r for r in results if r.name == "sam"), results[0])  # as `lesam-dist compare` chooses it
    several = len(rank(results)) > 1 and not _elsewhere(results) and bool(reference.by_seed)
    metric = results[0].metric
    header = ["method", "seeds", f"{metric.label}, last epoch", "best epoch"]
    header += [f"difference to {reference.name}"] if several else []
    header += ["cost of a step", "of a run, in SGD steps"]
    rows = []
    differences = compare(results) if several else {}
    for result in results:
        total, best = result.total_cost(), result.best()
        row = [result.name, _count(result), amount(result.last(), metric), amount(best, metric)]
        if several:
            row.append("-" if result is reference else _to(result.name, reference.name, differences))
        rows.append([*row, f"{result.cost:.2f}", "-" if total is None else f"{total:,.0f}"])
    note = (
        metric.label[:1].upper() + metric.label[1:] + _NOTE + (" Difference: mean ± standard error." if several else "")
    )
    return Table(header, rows, note, [result.group.style for result in results])


def _to(name: str, reference: str, differences: dict[tuple[str, str], Difference]) -> str:
    if found := differences.get((name, reference)):
        return _difference(found)
    if found := differences.get((reference, name)):
        return plus_minus(-found.mean, found.error, signed=True)
    return "-"


def _count(result: Result) -> str:
    done, all_runs = len(result.group.finished), len(result.group.runs)
    return str(all_runs) if done == all_runs else f"{done} of {all_runs}"


def _elsewhere(results: Sequence[Result]) -> bool:
    """Whether not all runs were evaluated on the same images, as far as their logs and configs say."""
    runs = [run for result in results for run in result.group.runs]
    return len({(_samples(run), run.values["data.builtin"]) for run in runs if run.of("val", run.metric.name)}) > 1


def _samples(run: Run) -> float | None:
    found = run.of("val", "samples")
    return found[-1][1] if found else None

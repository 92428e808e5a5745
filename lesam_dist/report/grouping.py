"""Which runs differ in the seed alone, what the others differ in, and a name for each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lesam_dist.config.methods import PLAIN
from lesam_dist.config.recipes import bases, compose, methods_of
from lesam_dist.config.sources import leaves
from lesam_dist.config.values import default_values
from lesam_dist.report.blocks import Style
from lesam_dist.report.reading import Run

# Where things go, how often they are said and kept, and who checks them: runs that differ in these alone are alike.
_NOT_OF_THE_RESULT = (
    "seed",
    "run_dir",
    "resume",
    "dry_run",
    "profile",
    "checkpoint.",
    "logging.",
    "checks.",
    "analysis.",
    "data.root",
)
_NAME, _ALPHA = "optimizer.name", "optimizer.args.alpha"


@dataclass(frozen=True)
class Group:
    """Runs of one config and different seeds.

    Attributes:
        name: what sets it apart from the other groups: its method, and more fields where that is not enough.
        runs: by seed.
        style: in every chart.
    """

    name: str
    runs: list[Run]
    style: Style

    @property
    def finished(self) -> list[Run]:
        """Those that have made all their epochs; results are of these."""
        return [run for run in self.runs if run.state.finished]

    @property
    def values(self) -> dict[str, Any]:
        """The config that its runs share, flat."""
        return {path: value for path, value in self.runs[0].values.items() if _matters(path)}


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first run. A seed that is there again begins a group of its own: it tells nothing
    of what another seed would do.
    """
    found: list[list[Run]] = []
    for run in runs:
        for members in found:
            if _shared(members[0]) == _shared(run) and run.seed not in [other.seed for other in members]:
                members.append(run)
                break
        else:
            found.append([run])
    names = _names(found)
    by_seed = [sorted(each, key=lambda run: run.seed) for each in found]
    return [Group(name, each, Style.of(i)) for i, (name, each) in enumerate(zip(names, by_seed, strict=True))]


def differing(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Every field that not all groups have the same of, with each group's value; None where its method has none."""
    paths = dict.fromkeys(path for each in groups for path in each.values)
    found = {path: [each.values.get(path) for each in groups] for path in paths}
    return {path: values for path, values in found.items() if any(value != values[0] for value in values)}


def nearest_recipe(values: dict[str, Any]) -> str:
    """The recipe of the run's method that sets the fewest fields to another value; of a method without one, SGD's."""
    method, defaults = method_of(values), default_values()

    def distance(name: str) -> int:
        recipe = defaults | leaves(compose(name))
        return sum(_matters(path) and recipe.get(path) != value for path, value in values.items() if path in recipe)

    own = [f"{base}_{method}" for base in bases() if method in methods_of(base)]
    return min(own or [f"{base}_sgd" for base in bases()], key=distance)


def changed(values: dict[str, Any], before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of a run that are not as in another config: (there, in the run)."""
    return {
        path: (before.get(path), value)
        for path, value in values.items()
        if _matters(path) and before.get(path) != value
    }


def method_of(values: dict[str, Any]) -> str:
    """The method's name, as recipes have it."""
    name = str(values[_NAME])
    return "lesam_plus" if name == "lesam" and values.get(_ALPHA) else name


def is_plain(group: Group) -> bool:
    """Whether its method is the base optimizer alone."""
    return group.values[_NAME] in PLAIN


def _matters(path: str) -> bool:
    return not path.startswith(_NOT_OF_THE_RESULT)


def _shared(run: Run) -> dict[str, Any]:
    return {path: value for path, value in run.values.items() if _matters(path)}


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    names = [method_of(runs[0].values) for runs in groups]
    for name in set(names):
        alike = [i for i, other in enumerate(names) if other == name]
        if len(alike) == 1:
            continue
        shared = [_shared(groups[i][0]) for i in alike]
        paths = [path for path in shared[0] if any(each.get(path) != shared[0][path] for each in shared)]
        for i, each in zip(alike, shared, strict=True):
            own = [f"{path.rpartition('.')[2]} {each.get(path)}" for path in paths[:3]]
            names[i] = ", ".join([name, *own])
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names

"""Recipes by composition: DATA_MODEL_METHOD names a data set, a model and a method, and each has its own YAML file.

Merged in this order, later ones win: data, model, method, and what the three need together (combinations.yaml). A
method of the registry needs no file: without one it has its own defaults.
`recipes/README.md` says which row of the paper has which name.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lesam_dist.config.methods import PLAIN
from lesam_dist.errors import UserError
from lesam_dist.optim.engine import registry

Tree = dict[str, Any]

ALIASES = {data: f"{data}_resnet8_lesam" for data in ("digits", "digits_noisy", "mnist5k", "mnist5k_noisy")}
_PARTS = Path(str(files("lesam_dist.recipes"))) / "parts"
_ALL = "all"  # in combinations.yaml: whatever the method


def methods() -> list[str]:
    """The METHODs: those of the registry, and those that have a file."""
    return sorted({*_names("methods"), *registry.methods()})


def bases() -> list[str]:
    """The DATA_MODELs."""
    return list(_combinations())


def methods_of(base: str) -> list[str]:
    """The METHODs of a DATA_MODEL: all, and its own plain optimizer by name, where that is not SGD."""
    return sorted({*methods(), base_optimizer(base)})


@cache
def base_optimizer(base: str) -> str:
    """The plain optimizer that the methods of a DATA_MODEL step with."""
    _, model = data_and_model(base)
    name: str = _part("models", model).get("optimizer", {}).get("base", "sgd")
    return name


def recipes() -> list[str]:
    """Every name that `compose` takes."""
    return [*ALIASES, *(f"{base}_{method}" for base in bases() for method in methods_of(base))]


def split(name: str) -> tuple[str, str] | None:
    """DATA_MODEL and METHOD of a recipe, None for any other name."""
    full = ALIASES.get(name, name)
    return next(((b, m) for b in bases() for m in methods_of(b) if f"{b}_{m}" == full), None)


def compose(name: str) -> Tree:
    """The recipe of a name, in the shape of `Config`.

    Raises:
        UserError: for an unknown name, with the nearest one.
    """
    found = split(name)
    if found is None:
        raise _unknown(name)
    base, method = found
    return {**compose_parts(base, method), "run_dir": f"runs/{name}"}


def compose_parts(base: str, method: str) -> Tree:
    """The recipe of a DATA_MODEL and any method that a config may name, without a ``run_dir``.

    ``sgd`` is the baseline: the recipe's own optimizer alone, which may be another than SGD.
    """
    data, model = data_and_model(base)
    together = _combinations()[base]
    tree: Tree = {}
    for one in (
        _part("data", data),
        _part("models", model),
        method_part(method),
        together.get(_ALL, {}),
        together.get(method, {}),
    ):
        tree = merge(tree, one)
    optimizer = dict(tree["optimizer"])
    if optimizer["name"] in PLAIN:
        own = optimizer.pop("base", "sgd")
        optimizer["name"] = own if method == "sgd" else optimizer["name"]
    return {**tree, "optimizer": optimizer}


def method_part(method: str) -> Tree:
    """What a method sets with any data and model: its file, or its name alone."""
    return _part("methods", method) if method in _names("methods") else {"optimizer": {"name": method}}


def merge(first: Tree, second: Tree) -> Tree:
    """Both trees in one; where both have a leaf, the second's."""
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def describe() -> str:
    """All recipes in a few lines, by their parts."""
    models_of: dict[str, list[str]] = {}
    for base in bases():
        data, model = data_and_model(base)
        models_of.setdefault(data, []).append(model)
    data_with: dict[str, list[str]] = {}
    for data, models in models_of.items():
        data_with.setdefault(", ".join(models), []).append(data)
    pairs = "; ".join(f"{' or '.join(data)} with {models}" for models, data in data_with.items())
    short = "; ".join(f"{name} is short for {full}" for name, full in ALIASES.items())
    return (
        f"DATA_MODEL_METHOD, e.g. cifar100_resnet18_lesam. DATA and MODEL: {pairs}. METHOD: {', '.join(methods())}. "
        f"{short}."
    )


def data_and_model(base: str) -> tuple[str, str]:
    """The DATA and the MODEL of a DATA_MODEL."""
    pairs = ((data, model) for data in _names("data") for model in _names("models"))
    return next(pair for pair in pairs if "_".join(pair) == base)


def _unknown(name: str) -> UserError:
    if name in bases():
        return UserError(
            f"recipe '{name}' names no method: add one of {', '.join(f'_{m}' for m in methods())}; or compare several "
            f"with `lesam-dist compare --config {name}`."
        )
    near = difflib.get_close_matches(name, [*recipes(), *bases()], n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"a recipe is {describe()}"
    return UserError(f"unknown recipe '{name}': {hint}")


def _names(kind: str) -> list[str]:
    return sorted(path.stem for path in (_PARTS / kind).glob("*.yaml"))


def _part(kind: str, name: str) -> Tree:
    tree = dict(_read(_PARTS / kind / f"{name}.yaml"))
    same_as = tree.pop("same_as", None)
    return tree if same_as is None else merge(_part(kind, same_as), tree)


def _combinations() -> dict[str, Tree]:
    return _read(_PARTS / "combinations.yaml")


@cache
def _read(path: Path) -> Tree:
    """A file of the package; not to be changed."""
    tree: Tree = yaml.safe_load(path.read_text())
    return tree

"""Recipes, files and flags as one config: later ones win, a new method forgets the old one's values, and schedules
keep their shape when the number of epochs changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml

from lesam_dist.config.flags import both_given
from lesam_dist.config.methods import canonical, known_method, left_behind, paths_of_some, paths_read, shown
from lesam_dist.config.recipes import Tree, merge
from lesam_dist.errors import UserError

# Measured in epochs: a source that states them beside its epochs means a share of the run.
_IN_EPOCHS = (
    "schedule.lr_warmup_epochs",
    "schedule.sigma_warmup_epochs",
    "schedule.anneal_start_epoch",
    "optimizer.start_epoch",
    "optimizer.stop_epoch",
    "long_tail.reweight_epoch",
)
_SIZES = "schedule.image_size"  # pairs of an epoch and a size
_MOST = 10**9  # epochs; what is more is refused
_Method = tuple[str, str]  # name and base
_Stated = dict[str, tuple[Any, int]]


@dataclass(frozen=True)
class Combined:
    """What the sources say, for flags to go over it.

    Attributes:
        tree: the fields, without the method's arguments.
        args: these.
        method: its name, of which the flags have the last word.
        notes: a line for each thing that was adapted.
    """

    tree: Tree
    args: dict[str, Any]
    method: str
    notes: tuple[str, ...]


def combine(sources: Sequence[Tree], flags: Mapping[str, str]) -> Combined:
    """Merge the sources, for flags that will be put over them.

    Args:
        sources: config trees, later ones win.
        flags: the flags' texts by canonical path.

    Raises:
        UserError: for an argument that one source gives in both of its spellings, with different values.
    """
    tree: Tree = {}
    stated: _Stated = {}  # where a value came with a number of epochs: both
    method = "lesam", "sgd"
    notes: list[str] = []
    for source in map(_with_args, sources):
        own = leaves(source)
        method = _change(tree, stated, method, _method(own, method), notes)
        tree = merge(tree, source)
        epochs = own.get("epochs")
        for path in (*_IN_EPOCHS, _SIZES):
            if path in own:
                stated.pop(path, None)
                scales = _are_pairs(own[path]) if path == _SIZES else _is_number(own[path])
                if scales and isinstance(epochs, int) and epochs > 0:
                    stated[path] = own[path], epochs
    method = _change(tree, stated, method, _method(flags, method), notes)
    notes += _scale(tree, stated, flags)
    args = _args(tree)
    if isinstance(tree.get("optimizer"), dict):
        tree["optimizer"] = {key: value for key, value in tree["optimizer"].items() if key != "args"}
    return Combined(tree, args, method[0], tuple(notes))


def _with_args(source: Tree) -> Tree:
    """A source in which the method's arguments stand in ``args``, however it spells them."""
    section = source.get("optimizer")
    if not isinstance(section, dict):
        return source
    args = _args(source)
    rest: Tree = {}
    for key, value in section.items():
        if key == "args":
            continue
        if canonical(f"optimizer.{key}") == f"optimizer.{key}":
            rest[key] = value
        elif key in args and args[key] != value:
            first, second = f"optimizer.{key}: {shown(value)}", f"optimizer.args.{key}: {shown(args[key])}"
            raise both_given(first, second)
        else:
            args[key] = value
    return {**source, "optimizer": {**rest, "args": args}}


def _args(tree: Tree) -> dict[str, Any]:
    section = tree.get("optimizer")
    args = section.get("args") if isinstance(section, dict) else None
    if args is not None and not isinstance(args, dict):
        raise UserError(f"optimizer.args is {shown(args)}: it must be arguments in braces, e.g. {{rho: 0.1}}.")
    return dict(args or {})


def _method(values: Mapping[str, Any], before: _Method) -> _Method:
    name, base = (values.get(f"optimizer.{key}", old) for key, old in zip(("name", "base"), before, strict=True))
    return str(name), str(base)


def _change(tree: Tree, stated: _Stated, old: _Method, new: _Method, notes: list[str]) -> _Method:
    """Take out of the tree, in place, what the new method does not read; returns the new method."""
    if new == old:
        return new
    lost = paths_of_some() - paths_read(*new)
    args = _args(tree)
    lost |= {f"optimizer.args.{name}" for name in left_behind(args, known_method(old[0]), known_method(new[0]))}
    given = leaves(tree)
    for path in lost & given.keys():
        _remove(tree, path.split("."))
        stated.pop(path, None)
    named = [f"{path} {shown(given[path])}" for path in given if path in lost and given[path] is not None]
    if named:
        before, after = (name if name == base else f"{name} on {base}" for name, base in (old, new))
        notes.append(f"{after} instead of {before}: left out {', '.join(named)}")
    return new


def _remove(tree: Tree, path: Sequence[str]) -> None:
    """Take a leaf out, in place; what the tree was made of stays as it is."""
    for name in path[:-1]:
        tree[name] = dict(tree[name])
        tree = tree[name]
    del tree[path[-1]]


def _scale(tree: Tree, stated: _Stated, flags: Mapping[str, str]) -> list[str]:
    """Stretch the schedules, in place, to the run's number of epochs; returns what changed."""
    epochs = tree.get("epochs")
    if "epochs" in flags:
        with suppress(yaml.YAMLError, ValueError):
            epochs = yaml.safe_load(flags["epochs"])
    notes: dict[tuple[int, int], list[str]] = {}
    for path, (value, of) in stated.items():
        if path in flags or value == 0 or not isinstance(epochs, int) or epochs == of or not 0 < epochs <= _MOST:
            continue
        section, name = path.split(".")
        scaled = _stretched_sizes(value, epochs, of) if path == _SIZES else round(value * epochs / of, 4)
        tree[section] = {**tree[section], name: scaled}
        before, after = (shown(each) if path == _SIZES else f"{each:g}" for each in (value, scaled))
        notes.setdefault((of, epochs), []).append(f"{path} {before} -> {after}")
    return [f"schedule stretched from {a} to {b} epochs: {', '.join(changed)}" for (a, b), changed in notes.items()]


def _stretched_sizes(pairs: Sequence[Sequence[int]], epochs: int, of: int) -> list[list[int]]:
    """Each size from its share of the run on, in whole epochs; of several from one epoch on, the last."""
    return [[epoch, size] for epoch, size in {epoch * epochs // of: size for epoch, size in pairs}.items()]


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair) for pair in value
    )


def leaves(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted path."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

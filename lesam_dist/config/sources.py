"""Recipes, files and flags as one config: later ones win, a new method forgets the old one's values, and schedules
keep their shape when the number of epochs changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml

from lesam_dist.config.method_fields import fields_of_some, fields_read
from lesam_dist.config.recipes import Tree, merge
from lesam_dist.errors import UserError

# Measured in epochs: a source that states them beside its epochs means a share of the run.
_IN_EPOCHS = (
    "schedule.lr_warmup_epochs",
    "schedule.sigma_warmup_epochs",
    "schedule.anneal_start_epoch",
    "optimizer.start_epoch",
    "optimizer.stop_epoch",
)
_MOST = 10**9  # epochs; what is more is refused


@dataclass(frozen=True)
class Combined:
    """The tree that flags go over, and a line for each thing that was adapted."""

    tree: Tree
    notes: tuple[str, ...]


def combine(sources: Sequence[Tree], flags: Mapping[str, str]) -> Combined:
    """Merge the sources, for flags that will be put over them.

    Args:
        sources: config trees, later ones win.
        flags: the flags' texts by dotted path.
    """
    tree: Tree = {}
    stated: dict[str, tuple[float, int]] = {}  # where a value came with a number of epochs: both
    method = "lesam", "sgd"
    for source in sources:
        own = leaves(source)
        now = _method(own, method)
        if now != method:
            _forget(tree, stated, fields_of_some() - fields_read(*now))
        method = now
        tree = merge(tree, source)
        epochs = own.get("epochs")
        for path in _IN_EPOCHS:
            if path in own:
                stated.pop(path, None)
                if _is_number(own[path]) and isinstance(epochs, int) and epochs > 0:
                    stated[path] = own[path], epochs
    now = _method(flags, method)
    if now != method:
        _forget(tree, stated, fields_of_some() - fields_read(*now))
    return Combined(tree, tuple(_scale(tree, stated, flags)))


def _method(values: Mapping[str, Any], before: tuple[str, str]) -> tuple[str, str]:
    name, base = (values.get(f"optimizer.{key}", old) for key, old in zip(("name", "base"), before, strict=True))
    return str(name), str(base)


def _forget(tree: Tree, stated: dict[str, tuple[float, int]], paths: set[str]) -> None:
    for path in paths:
        section, name = path.split(".")
        if isinstance(tree.get(section), dict):
            tree[section] = {key: value for key, value in tree[section].items() if key != name}
        stated.pop(path, None)


def _scale(tree: Tree, stated: Mapping[str, tuple[float, int]], flags: Mapping[str, str]) -> list[str]:
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
        scaled = round(value * epochs / of, 4)
        tree[section] = {**tree[section], name: scaled}
        notes.setdefault((of, epochs), []).append(f"{path} {value:g} -> {scaled:g}")
    return [f"schedule stretched from {a} to {b} epochs: {', '.join(changed)}" for (a, b), changed in notes.items()]


def leaves(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted path."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def flags_for(method: str, others: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Those flags that this method reads, where some method among ``others`` reads the rest.

    Flags that none of them reads stay, to be refused.
    """
    base = flag_values(flags).get("optimizer.base", "sgd")
    foreign = set().union(*(fields_read(other, base) for other in others)) - fields_read(method, base)
    kept: list[str] = []
    skips = False
    for flag in flags:
        if flag.startswith("--"):
            skips = flag[2:].split("=")[0] in foreign
        if not skips:
            kept.append(flag)
    return kept


def flag_values(flags: Sequence[str]) -> dict[str, str]:
    """The texts behind flags of the forms ``--a.b text`` and ``--a.b=text``, by dotted path; the last one wins.

    Raises:
        UserError: for a text with YAML aliases, which could expand without end.
    """
    values: dict[str, str] = {}
    key: str | None = None
    for flag in flags:
        text = flag
        if flag.startswith("--"):
            name, given, text = flag[2:].partition("=")
            key = name
            if not given:
                continue
        if key is not None:
            values[key] = text
            if "&" in text and "*" in text and text.lstrip()[:1] in "[{&":
                raise UserError(f"--{key} has YAML aliases: write its values out.")
            key = None
    return values

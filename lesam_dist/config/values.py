"""A config by dotted paths: ``optimizer.lr``, ``optimizer.args.sigma``."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from lesam_dist.config.methods import canonical, complete
from lesam_dist.config.schema import Config, OptimizerConfig


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its path, with tuples as lists (as YAML gives them back), and the method's arguments all given."""
    leaves: dict[str, Any] = {}
    for item in fields(config):
        value, path = getattr(config, item.name), prefix + item.name
        if isinstance(config, OptimizerConfig) and item.name == "args":
            leaves |= {f"{path}.{name}": argument for name, argument in complete(config).items()}
        elif is_dataclass(value):
            leaves |= flatten(value, path + ".")
        else:
            leaves[path] = _as_lists(value)
    return leaves


def _as_lists(value: Any) -> Any:
    """Tuples as lists, also inside one."""
    return [_as_lists(each) for each in value] if isinstance(value, (list, tuple)) else value


def default_values() -> dict[str, Any]:
    """`flatten` of a config in which nothing is set."""
    return flatten(Config())


def get(config: Config, path: str) -> Any:
    """The value at a path, e.g. ``"optimizer.lr"``; of a method's argument also in short, ``"optimizer.sigma"``."""
    return flatten(config)[canonical(path)]

"""The options that every sharpness-aware optimizer shares, and their checks."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from lesam_dist.parallel.scope import Scope

Between = Literal["skip", "reuse"]


def check_options(method: str, options: dict[str, Any]) -> None:
    """Raise ValueError for an option out of range, or for two that exclude each other."""
    for name, choices in (("scope", get_args(Scope)), ("ascent_between", get_args(Between))):
        if options[name] not in choices:
            raise ValueError(f"{method}: {name} is {options[name]!r}; choose one of {', '.join(choices)}.")
    max_norm, fraction = options["max_grad_norm"], options["ascent_fraction"]
    if max_norm is not None and not (max_norm > 0 and math.isfinite(max_norm)):
        raise ValueError(f"{method}: max_grad_norm is {max_norm}; it must be a finite number > 0, or None.")
    if not 0 < fraction <= 1:
        raise ValueError(f"{method}: ascent_fraction is {fraction}; it must be in (0, 1].")
    interval = options["ascent_interval"]
    if interval < 1 or interval != int(interval):
        raise ValueError(f"{method}: ascent_interval is {interval}; it must be a whole number >= 1.")
    if interval > 1 and options["ascent_between"] == "reuse" and options["scope"] != "global":
        raise ValueError(
            f"{method}: ascent_between='reuse' keeps a gradient that a checkpoint saves once, but with "
            f"scope={options['scope']!r} every process has its own. Choose 'skip', or scope='global'."
        )


def require_nonnegative(method: str, name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number >= 0."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{method}: {name} is {value}; it must be a finite number >= 0.")

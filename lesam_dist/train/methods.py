"""What the method of a config is built with: its arguments, and the model's parameters in groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from lesam_dist.config.methods import OPTIONS, complete, method_of
from lesam_dist.config.schema import OptimizerConfig
from lesam_dist.errors import UserError


def method_arguments(config: OptimizerConfig) -> dict[str, Any]:
    """The method's hyper-parameters, and those of the shared options that it has; nothing for a plain optimizer."""
    method = method_of(config.name)
    if method is None:
        return {}
    options = {name: getattr(config, name) for name in OPTIONS if name not in method.registration.without}
    return {**complete(config), **options}


def param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The model's parameters, in groups where weight decay or the method treats some of them otherwise.

    Raises:
        UserError: for a model of which the method perturbs nothing.
    """
    method = method_of(config.name)
    cls = method.load() if method else None
    arguments = method_arguments(config)
    groups: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for leaf, p in module.named_parameters(prefix, recurse=False):
            if p in seen or not p.requires_grad:
                continue
            seen.add(p)
            settings: dict[str, Any] = {}
            if not config.decay_norm_and_bias and p.ndim <= 1:  # the field's rule: biases and normalisation weights
                settings["weight_decay"] = 0.0
            if cls:
                settings |= cls.settings_of(leaf, module, arguments)
            groups.setdefault(tuple(settings.items()), []).append(p)
    if not any(dict(settings).get("perturb", True) for settings in groups):
        raise UserError(
            f"optimizer.name is {config.name} but the model has nothing that it perturbs: choose another method."
        )
    return [{"params": params, **dict(settings)} for settings, params in groups.items()]

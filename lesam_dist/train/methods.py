"""The methods that a config may name, and what each takes from it."""

from __future__ import annotations

from typing import Any

from torch import nn

from lesam_dist import optim
from lesam_dist.config.method_fields import METHOD_FIELDS, shared_fields
from lesam_dist.config.schema import OptimizerConfig
from lesam_dist.errors import UserError

METHODS: dict[str, type[optim.SharpnessAware]] = {
    "lesam": optim.LESAM,
    "sam": optim.SAM,
    "asam": optim.ASAM,
    "esam": optim.ESAM,
    "fsam": optim.FriendlySAM,
    "eigensam": optim.EigenSAM,
    "fishersam": optim.FisherSAM,
    "gsam": optim.GSAM,
    "ssam": optim.SSAM,
    "msam": optim.MSAM,
    "s2sam": optim.S2SAM,
    "looksam": optim.LookSAM,
    "wsam": optim.WSAM,
    "samon": optim.SAMON,
}


def method_arguments(config: OptimizerConfig) -> dict[str, Any]:
    """What the config says of its method's hyper-parameters and of the options that all share.

    A hyper-parameter that is null in the config keeps the method's own default; those of other methods are left out.
    """
    own = (name for name in METHOD_FIELDS[config.name] if getattr(config, name) is not None)
    arguments = {name: getattr(config, name) for name in (*own, *shared_fields(config.name))}
    if config.name == "lesam":
        arguments["rho_max"] = config.rho_max  # null means no cap
    return arguments


def param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The model's parameters, in groups where weight decay or the method treats some of them otherwise.

    Raises:
        UserError: for a model of which the method perturbs nothing.
    """
    method = METHODS.get(config.name)
    arguments = method_arguments(config) if method else {}
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
            if method:
                settings |= method.settings_of(leaf, module, arguments)
            groups.setdefault(tuple(settings.items()), []).append(p)
    if not any(dict(settings).get("perturb", True) for settings in groups):
        raise UserError(
            f"optimizer.name is {config.name} but the model has nothing that it perturbs: choose another method."
        )
    return [{"params": params, **dict(settings)} for settings, params in groups.items()]

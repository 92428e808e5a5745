"""Which fields of a config each method reads; no torch, so that a wrong one is refused at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lesam_dist.errors import UserError

if TYPE_CHECKING:
    from lesam_dist.config.schema import Config

# Hyper-parameters of `OptimizerConfig`, by method; arguments of the same name of its class, see `methods`.
METHOD_FIELDS: dict[str, tuple[str, ...]] = {
    "lesam": ("sigma", "rho_max", "eps", "alpha", "plus_form", "adaptive", "eta"),
    "sam": ("rho",),
    "asam": ("rho", "eta"),
    "esam": ("rho", "beta", "gamma"),
    "fsam": ("rho", "lam"),
    "eigensam": ("rho", "alpha", "interval", "power_steps"),
    "fishersam": ("rho", "eta"),
    "gsam": ("rho", "alpha", "rho_min"),
    "ssam": ("rho",),
    "msam": ("rho",),
    "s2sam": ("rho",),
    "looksam": ("rho", "alpha", "interval"),
    "wsam": ("rho", "gamma"),
    "samon": ("rho",),
}
PLAIN = ("sgd", "adamw")
# Options that every method has; looksam has its own interval.
SHARED_FIELDS = ("backend", "scope", "max_grad_norm", "ascent_fraction", "ascent_interval", "ascent_between")
_NOT_OF = {"looksam": ("ascent_interval", "ascent_between")}
_BASE_FIELDS = {"sgd": ("momentum", "nesterov"), "adamw": ("betas",)}
_SCHEDULES = {"lesam": ("schedule.sigma_warmup_epochs", "schedule.anneal_start_epoch")}


def shared_fields(method: str) -> tuple[str, ...]:
    """Those of `SHARED_FIELDS` that the method has."""
    return tuple(name for name in SHARED_FIELDS if name not in _NOT_OF.get(method, ()))


def fields_read(method: str, base: str) -> set[str]:
    """Dotted paths that this method reads, of those that not every method does."""
    if method in PLAIN:
        names: tuple[str, ...] = ("max_grad_norm", *_BASE_FIELDS[method])
    else:
        names = ("base", *METHOD_FIELDS.get(method, ()), *shared_fields(method), *_BASE_FIELDS.get(base, ()))
    return {f"optimizer.{name}" for name in names} | set(_SCHEDULES.get(method, ()))


def fields_of_some() -> set[str]:
    """Dotted paths that not every method reads."""
    names = {"base", *SHARED_FIELDS}.union(*METHOD_FIELDS.values(), *_BASE_FIELDS.values())
    return {f"optimizer.{name}" for name in names}.union(*_SCHEDULES.values())


def check_method_fields(config: Config, values: dict[str, object], defaults: dict[str, object]) -> None:
    """Refuse what was set for a method that does not read it: it would have no effect.

    Args:
        config: what it is about.
        values: `flatten` of it.
        defaults: `flatten` of a config in which nothing is set.

    Raises:
        UserError: naming the field, the method and the fields that it has.
    """
    optimizer = config.optimizer
    own = fields_read(optimizer.name, optimizer.base)
    for path in values:
        if path in fields_of_some() - own and values[path] not in (defaults[path], None):
            has = METHOD_FIELDS.get(optimizer.name) or _BASE_FIELDS[optimizer.name]
            name = path.split(".")[-1]
            on = "" if optimizer.name in PLAIN else f" on {optimizer.base}"
            raise UserError(
                f"{path} is {values[path]} but {optimizer.name}{on} has no {name}, so it would have no effect: leave "
                f"it out. {optimizer.name} has {', '.join(has)}."
            )
    if optimizer.ascent_between != "skip" and optimizer.ascent_interval == 1:
        raise UserError(
            f"optimizer.ascent_between is {optimizer.ascent_between} but optimizer.ascent_interval is 1: there is no "
            "step between. Set ascent_interval above 1, or leave it out."
        )
    if optimizer.name != "lesam":
        return
    if optimizer.plus_form != "paper" and not optimizer.alpha:
        raise UserError(
            f"optimizer.plus_form is {optimizer.plus_form} but optimizer.alpha is {optimizer.alpha or 0}: it is a form "
            "of LE-SAM+. Set alpha above 0, or leave it out."
        )
    if optimizer.eta is not None and not optimizer.adaptive:
        raise UserError(
            f"optimizer.eta is {optimizer.eta} but optimizer.adaptive is false: eta is added to the weights' size, "
            "which only adaptive looks at. Set adaptive to true, or leave it out."
        )

"""What a config must not say of the optimizer."""

from __future__ import annotations

from lesam_dist.config.methods import OPTIONS, PLAIN, method_of, paths_of_some, paths_read
from lesam_dist.config.schema import Config, OptimizerConfig
from lesam_dist.config.values import default_values, flatten
from lesam_dist.errors import UserError
from lesam_dist.optim.engine.options import Options


def check_optimizer(config: Config) -> None:
    optimizer, strategy = config.optimizer, config.parallel.strategy
    _check_unread(config)
    _check_base(config)
    try:
        Options(**{name: getattr(optimizer, name) for name in OPTIONS})
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from error
    _check_window(config)
    if optimizer.scope == "local" and config.parallel.is_sharded:
        raise UserError(
            f"optimizer.scope is local but parallel.strategy is {strategy}: the shards of all processes are one "
            "copy of the weights, which cannot be perturbed in several ways at once. Choose ddp, or global."
        )
    if optimizer.scope == "replica" and strategy != "hsdp":
        raise UserError(
            f"optimizer.scope is replica but parallel.strategy is {strategy}: only hsdp has replicas of shards. "
            "Choose hsdp, or global."
        )
    if config.data.accumulation_mode == "micro" and optimizer.name in PLAIN:
        raise UserError(
            f"data.accumulation_mode is micro but optimizer.name is {optimizer.name}, which perturbs nothing: choose "
            "batch."
        )


def _check_unread(config: Config) -> None:
    """Refuse what was set for a method that does not read it: it would have no effect."""
    optimizer, defaults = config.optimizer, default_values()
    unread = paths_of_some() - paths_read(optimizer.name, optimizer.base)
    for path, value in flatten(config).items():
        if path in unread and value not in (defaults[path], None):
            on = "" if optimizer.name in PLAIN else f" on {optimizer.base}"
            raise UserError(
                f"{path} is {value} but {optimizer.name}{on} has no {path.split('.')[-1]}, so it would have no effect: "
                "leave it out."
            )
    if optimizer.ascent_between != "skip" and optimizer.ascent_interval == 1:
        raise UserError(
            f"optimizer.ascent_between is {optimizer.ascent_between} but optimizer.ascent_interval is 1: there is no "
            "step between. Set ascent_interval above 1, or leave it out."
        )
    method, args = method_of(optimizer.name), optimizer.args
    if method is None or method.name != "lesam":
        return
    if args.get("plus_form", "paper") != "paper" and not args.get("alpha"):
        raise UserError(
            f"optimizer.args.plus_form is {args['plus_form']} but optimizer.args.alpha is 0: it is a form of LE-SAM+. "
            "Set alpha above 0, or leave it out."
        )
    if args.get("eta") and not args.get("adaptive"):
        raise UserError(
            f"optimizer.args.eta is {args['eta']} but optimizer.args.adaptive is false: eta is added to the weights' "
            "size, which only adaptive looks at. Set adaptive to true, or leave it out."
        )


def _check_base(config: Config) -> None:
    optimizer = config.optimizer
    if not optimizer.momentum < 1:
        raise UserError(f"optimizer.momentum is {optimizer.momentum}: it must be below 1.")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise UserError(f"optimizer.betas is {list(optimizer.betas)}: both must be in [0, 1).")
    if optimizer.nesterov and optimizer.momentum == 0:
        raise UserError("optimizer.nesterov is true but optimizer.momentum is 0: set momentum above 0, e.g. 0.9.")
    if not optimizer.trust_coefficient > 0:
        raise UserError(
            f"optimizer.trust_coefficient is {optimizer.trust_coefficient}: it must be above 0, e.g. 0.001."
        )
    if optimizer.lr_scaling == "none" and optimizer.lr_reference_batch != OptimizerConfig().lr_reference_batch:
        raise UserError(
            f"optimizer.lr_reference_batch is {optimizer.lr_reference_batch} but optimizer.lr_scaling is none, so it "
            "would have no effect: set lr_scaling to linear or sqrt, or leave it out."
        )


def _check_window(config: Config) -> None:
    """Refuse a late switch or an annealing that would never happen."""
    start, stop = config.optimizer.start_epoch, config.optimizer.stop_epoch
    if (start, stop) == (0.0, None):
        return
    if config.optimizer.name in PLAIN:
        raise UserError(
            f"optimizer.start_epoch and stop_epoch say when a sharpness-aware method works, but optimizer.name is "
            f"{config.optimizer.name}: leave them at 0 and null."
        )
    end = config.epochs if stop is None else min(stop, config.epochs)
    if start >= end:
        raise UserError(
            f"optimizer.start_epoch is {start} but the method stops at epoch {end} of {config.epochs}: it would "
            "never work. Start earlier, or stop later."
        )
    anneal = config.schedule.anneal_start_epoch
    if anneal is not None and stop is not None and anneal >= stop:
        raise UserError(
            f"schedule.anneal_start_epoch is {anneal} but optimizer.stop_epoch is {stop}: the annealing would "
            "never start. Anneal earlier, or set it to null."
        )

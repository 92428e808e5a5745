"""What a config must not say of adversarial training, and what it costs."""

from __future__ import annotations

import math

from lesam_dist.config.changes import changes
from lesam_dist.config.schema import AdversarialConfig, Config
from lesam_dist.errors import UserError

_MOST_STEPS = 10_000


def check_adversarial(config: Config) -> None:
    """Refuse what is missing, out of range, or would have no effect.

    Raises:
        UserError: for the first such field of ``adversarial``, with the remedy.
    """
    own, default = config.adversarial, AdversarialConfig()
    if own.norm is None:
        for name, value, usual in changes(own):
            raise UserError(
                f"adversarial.{name} is {value} but adversarial.norm is null, so that no image is attacked: choose "
                f"linf or l2, or leave it at {usual}."
            )
        return
    _check_elsewhere(config)
    if own.epsilon is None:
        raise UserError(
            f"adversarial.norm is {own.norm} but adversarial.epsilon is null: give the radius in pixels from 0 to 1, "
            "e.g. 0.031373, which is 8/255."
        )
    if not (own.epsilon >= 0 and (own.epsilon <= 1 or (own.norm == "l2" and math.isfinite(own.epsilon)))):
        limits = "from 0 to 1" if own.norm == "linf" else "finite and at least 0"
        raise UserError(
            f"adversarial.epsilon is {own.epsilon}: it must be {limits}, for pixels from 0 to 1; 8/255 is 0.031373."
        )
    if own.step_size is not None and not own.step_size > 0:
        raise UserError(f"adversarial.step_size is {own.step_size}: it must be above 0, or null.")
    for name in ("steps", "eval_steps"):
        if not 1 <= getattr(own, name) <= _MOST_STEPS:
            raise UserError(f"adversarial.{name} is {getattr(own, name)}: it must be 1 to {_MOST_STEPS}.")
    if not own.evaluate and own.eval_steps != default.eval_steps:
        raise UserError(
            f"adversarial.eval_steps is {own.eval_steps} but adversarial.evaluate is false, so that no validation "
            f"image is attacked: set it to true, or leave eval_steps at {default.eval_steps}."
        )


def _check_elsewhere(config: Config) -> None:
    """What the rest of the config must not say."""
    norm, data = config.adversarial.norm, config.data
    if config.task != "classification":
        raise UserError(
            f"adversarial.norm is {norm} but task is {config.task}: only classification is trained on attacked images. "
            "Leave it null."
        )
    for name in ("mixup", "cutmix"):
        if getattr(data, name):
            raise UserError(
                f"adversarial.norm is {norm} and data.{name} is {getattr(data, name)}, but an image is attacked by its "
                "own label, and a mixed one has two: leave one of them out."
            )
    if config.loss.name != "cross_entropy":
        raise UserError(
            f"adversarial.norm is {norm} but loss.name is {config.loss.name}: the attack raises the cross entropy. "
            "Choose cross_entropy, or leave norm null."
        )


def attack_steps(config: Config) -> int:
    """Steps of the attack in each training step: each is a forward, and a backward that leaves the weights out."""
    return 0 if config.adversarial.norm is None else config.adversarial.steps

"""Whether two configs are of one run: what must be equal to resume it."""

from __future__ import annotations

from typing import Any

from lesam_dist.config.methods import canonical, defaults, known_method
from lesam_dist.config.schema import Config
from lesam_dist.config.values import default_values, flatten
from lesam_dist.errors import UserError

# A resumed run may differ in these: they change where things go and how fast, not what is computed.
_FREE_ON_RESUME = (
    "run_dir",
    "resume",
    "init_from",  # and init_from_ema: the weights are the checkpoint's
    "dry_run",
    "profile",
    "max_nonfinite_steps",
    "checkpoint",
    "logging",
    "guard.max_rollbacks",
    "checks",
    "analysis",
    "data.root",
    "data.workers",
    "data.dali_",
    "data.eval_batch_size",
    "data.skip_list",  # what it leaves out is compared with the images
    "data.label_noise.file",  # as its labels are
    "data.max_bad_files",
    "parallel.timeout_s",
    "parallel.shard_size",
    "parallel.replicate_size",
    "model.compile",
    "model.activation_checkpointing",
)
# What the length of a run may change when it has finished and is trained for longer.
_OF_LENGTH = (
    "epochs",
    *("schedule.lr_warmup_epochs", "schedule.sigma_warmup_epochs", "schedule.anneal_start_epoch"),
)
_NAME, _ARGS = "optimizer.name", "optimizer.args."
# Version 0.1 wrote the arguments of all methods into every config; these were LE-SAM's alone, null never its default.
_ONCE_OF_LESAM = ("sigma", "rho_max", "eps", "plus_form", "adaptive")


def differences(now: Config, saved: dict[str, Any], when: str) -> list[str]:
    """Every field that changes what a run computes and that differs, with both values; ``when`` is the saved one's."""
    values, then = flatten(now), _with_all(saved)
    is_whole = values["data.accumulation_mode"] == "batch"  # else each part of a batch has its own perturbation
    free = (*_FREE_ON_RESUME, *(["data.micro_batches"] if is_whole else []))
    if _is_same_method(values[_NAME], then[_NAME]):
        then[_NAME] = values[_NAME]
    return [
        f"{path}: {then[path]!r} {when}, {value!r} now"
        for path, value in values.items()
        if path in then and then[path] != value and not path.startswith(free)
    ]


def _is_same_method(name: object, other: object) -> bool:
    """Whether two names are of one method: one may be an alias, or an import path."""
    first, second = known_method(name), known_method(other)
    return bool(first and second and (first.module, first.class_name) == (second.module, second.class_name))


def _with_all(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the fields that it was made without, which had what is their default now."""
    then = default_values() | saved
    method = known_method(then[_NAME])
    own = {} if method is None else {_ARGS + name: value for name, value in defaults(method).items()}
    for path, value in saved.items():
        name = canonical(path).removeprefix(_ARGS)
        if method is None or canonical(path) not in own:
            continue
        once_of_lesam = path != canonical(path) and name in _ONCE_OF_LESAM
        if (method.name == "lesam" or not once_of_lesam) and method.arguments[name].accepts(value):
            own[canonical(path)] = method.arguments[name].typed(value)
    return {path: value for path, value in then.items() if not path.startswith(_ARGS)} | own


def is_longer(now: Config, saved: dict[str, Any], epochs: int) -> bool:
    """Whether a run that has finished is to be trained for more epochs.

    Args:
        now: the config of this start.
        saved: `flatten` of the config that the checkpoint was made with.
        epochs: that the checkpoint has behind it.
    """
    then: int = saved.get("epochs", now.epochs)
    return now.epochs > then <= epochs


def require_longer(now: Config, saved: dict[str, Any], when: str) -> None:
    """Refuse to train a finished run for longer where more than its length would change.

    Its learning rate and sigma then follow the schedules of the longer run from here on. `--epochs` stretches a
    recipe's schedules, so their warm-ups may differ if they are over by now, and so may the start of the annealing.

    Raises:
        UserError: with each field that differs otherwise, or a warm-up that is not over.
    """
    then = saved["epochs"]
    for name in ("lr_warmup_epochs", "sigma_warmup_epochs"):
        value = getattr(now.schedule, name)
        if value > then:
            raise UserError(
                f"cannot train for {now.epochs} epochs: schedule.{name} is {value:g}, and the run has made {then} "
                f"without. Set --schedule.{name} 0, or start anew in another --run_dir."
            )
    differing = [line for line in differences(now, saved, when) if line.partition(":")[0] not in _OF_LENGTH]
    if differing:
        raise UserError(
            f"cannot train for {now.epochs} epochs: more than the number of epochs differs:\n  "
            + "\n  ".join(differing)
            + "\nUse the saved values (RUN_DIR/config.yaml), or start anew in another --run_dir."
        )


def check_same_run(now: Config, saved: dict[str, Any]) -> None:
    """Refuse to resume where the config would change what the run computes.

    Args:
        now: the config of this start.
        saved: `flatten` of the config that the checkpoint was made with.

    Raises:
        UserError: naming every field that differs, with both values.
    """
    differing = differences(now, saved, "then")
    if differing:
        raise UserError(
            "cannot resume: the config differs from the checkpoint's in what the run computes:\n  "
            + "\n  ".join(differing)
            + "\nUse the saved values (RUN_DIR/config.yaml), or start anew in another --run_dir."
        )

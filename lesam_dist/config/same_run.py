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

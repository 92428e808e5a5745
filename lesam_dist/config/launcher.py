"""What `accelerate launch` was told, as fields of the config.

It starts processes as torchrun does and says the rest in environment variables. Order of precedence: flags on the
command line, then the launcher, then the recipe. The launcher's ``mixed_precision: no`` is its default and leaves the
recipe's choice alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from lesam_dist.errors import UserError


def accelerate_flags(environ: Mapping[str, str]) -> list[str]:
    """The launcher's settings as flags of the trainer; empty without `accelerate launch`.

    Raises:
        UserError: for a setting that the trainer cannot honour.
    """
    flags: dict[str, str] = {}
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"accelerate's mixed_precision is '{precision}': the trainer knows no, fp16 and bf16.")
    if precision != "no":
        flags["precision.compute"] = precision
    if _true(environ, "ACCELERATE_USE_CPU"):
        flags["parallel.device"] = "cpu"
    if _true(environ, "ACCELERATE_USE_FSDP"):
        flags |= _fsdp_flags(environ)
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def _fsdp_flags(environ: Mapping[str, str]) -> dict[str, str]:
    version = environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"accelerate's fsdp_version is {version}: the trainer uses FSDP2, set fsdp_version: 2.")
    if _true(environ, "FSDP_OFFLOAD_PARAMS"):
        raise UserError("accelerate's fsdp_offload_params is true: the trainer does not offload, set it to false.")
    for axis in ("TP", "CP", "SP"):
        size = environ.get(f"PARALLELISM_CONFIG_{axis}_SIZE", "1")
        if size != "1":
            raise UserError(f"accelerate's {axis.lower()}_size is {size}: the trainer knows none of it, set it to 1.")
    flags = {"parallel.strategy": "fsdp"}
    if "FSDP_RESHARD_AFTER_FORWARD" in environ:
        flags["parallel.reshard_after_forward"] = str(_true(environ, "FSDP_RESHARD_AFTER_FORWARD")).lower()
    if _true(environ, "FSDP_ACTIVATION_CHECKPOINTING"):
        flags["model.activation_checkpointing"] = "true"
    if classes := environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        flags["parallel.wrap_classes"] = f"[{classes}]"
    replicate = environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1")
    if replicate != "1":
        flags |= {"parallel.strategy": "hsdp", "parallel.replicate_size": replicate}
        if shard := environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE"):
            flags["parallel.shard_size"] = shard
    return flags


def _true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("true", "1", "yes")

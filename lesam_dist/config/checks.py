"""What a config must not say, checked where it is read and where a run begins."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from lesam_dist.config.adversarial_checks import check_adversarial
from lesam_dist.config.augmentation import check_augmentation
from lesam_dist.config.changes import changes
from lesam_dist.config.data_checks import check_data, check_loss
from lesam_dist.config.domain_checks import check_domains
from lesam_dist.config.explain import expected, is_optional
from lesam_dist.config.label_noise_checks import check_label_noise
from lesam_dist.config.long_tail_checks import check_long_tail
from lesam_dist.config.methods import settle
from lesam_dist.config.optimizer_checks import check_optimizer
from lesam_dist.config.schema import (
    Config,
    DataBackend,
    DataConfig,
    EmaConfig,
)
from lesam_dist.config.tasks import check_task
from lesam_dist.config.values import flatten
from lesam_dist.errors import UserError

# Larger ones are typing errors that would end in hours of nothing, or in no memory.
_AT_MOST = {
    "epochs": 1_000_000,
    "seed": 2**32 - 1,  # torch's generator on the CPU drops higher bits: other seeds, the same numbers
    "model.num_classes": 10**6,
    "data.batch_size": 1 << 24,
    "data.eval_batch_size": 1 << 20,
    "data.image_size": 1 << 14,
    "data.val_resize": 1 << 14,
    "data.val_crop": 1 << 14,
    "data.randaugment_ops": 100,
    "data.randaugment_magnitude": 30,
    "data.mixup": 1000,
    "data.cutmix": 1000,
    "data.mix_probability": 1,
    "data.grayscale": 1,
    "data.random_erasing": 1,
    "data.repeats": 1 << 14,
    "data.crop_padding": 1 << 14,
    "data.cutout": 1 << 14,
    "data.workers": 1024,
    "data.shuffle_window": 10**9,
    "domains.steps_per_epoch": 10**9,
    "domains.head_steps": 10**9,
    "data.dali_device_padding": 1 << 20,
    "data.dali_host_padding": 1 << 20,
    "data.dali_prefetch": 1000,
    "data.max_bad_files": 10**9,
    "optimizer.ascent_interval": 1_000_000,
    "optimizer.lr_reference_batch": 1 << 24,
    "ema.uniform_from": 10**9,
    "ema.swad_converge": 100,
    "ema.swad_tolerance": 10_000,
    "ema.swad_tolerance_ratio": 1000,
    "parallel.timeout_s": 10_000_000,
    "checkpoint.every_minutes": 10_000_000,
    "checkpoint.grace_seconds": 10_000_000,
    "profile": 1000,  # each is some MB of a trace
}

_AT_LEAST = {
    "epochs": 1,
    "seed": 0,
    "model.num_classes": 2,
    "data.batch_size": 1,
    "data.eval_batch_size": 1,
    "data.micro_batches": 1,
    "data.image_size": 1,
    "data.val_resize": 1,
    "data.val_crop": 1,
    "data.randaugment_ops": 1,
    "data.randaugment_magnitude": 0,
    "data.mixup": 0,
    "data.cutmix": 0,
    "data.grayscale": 0,
    "data.random_erasing": 0,
    "data.repeats": 1,
    "data.workers": 1,
    "data.shuffle_window": 1,
    "domains.steps_per_epoch": 1,
    "domains.head_steps": 0,
    "data.dali_device_padding": 0,
    "data.dali_host_padding": 0,
    "data.dali_prefetch": 1,
    "data.max_bad_files": 0,
    "optimizer.lr": 0,
    "optimizer.lr_reference_batch": 1,
    "optimizer.momentum": 0,
    "optimizer.weight_decay": 0,
    "optimizer.start_epoch": 0,
    "ema.uniform_from": 1,
    "ema.swad_converge": 1,
    "ema.swad_tolerance": 1,
    "ema.swad_tolerance_ratio": 0,
    "schedule.lr_warmup_epochs": 0,
    "schedule.sigma_warmup_epochs": 0,
    "schedule.anneal_start_epoch": 0,
    "parallel.shard_size": 1,
    "parallel.replicate_size": 1,
    "parallel.timeout_s": 1,
    "checkpoint.every_epochs": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.every_minutes": 0.01,
    "checkpoint.keep": 1,
    "checkpoint.keep_every_epochs": 1,
    "checkpoint.grace_seconds": 1,
    "guard.max_loss_increase": 0,
    "guard.max_rollbacks": 0,
    "checks.every_steps": 1,
    "analysis.every_epochs": 1,
    "analysis.samples": 1,
    "logging.every_steps": 1,
    "max_nonfinite_steps": 1,
    "profile": 1,
}


def checked(config: Config) -> Config:
    """The config with all arguments of its method, the data backend, and the home folder in place of ``~``.

    Raises:
        UserError: for the first value that is out of range, or contradicts another, with the value and the remedy.
    """
    _check_values(flatten(replace(config, optimizer=replace(config.optimizer, args={}))))
    optimizer = replace(config.optimizer, args=settle(config.optimizer.name, config.optimizer.args))
    root, skip_list = config.data.root, config.data.skip_list
    noise = config.data.label_noise
    initial = None if config.init_from is None else folder("init_from", config.init_from, "checkpoint, a run or a file")
    labels = None if noise.file is None else folder("data.label_noise.file", noise.file, "file")
    config = replace(
        config,
        optimizer=optimizer,
        run_dir=folder("run_dir", config.run_dir),
        init_from=initial,
        data=replace(
            config.data,
            root=None if root is None else folder("data.root", root),
            backend=_data_backend(config.data),
            skip_list=None if skip_list is None else folder("data.skip_list", skip_list, "file"),
            label_noise=replace(noise, file=labels),
        ),
    )
    _check(config)
    return config


def _data_backend(data: DataConfig) -> DataBackend:
    """What "auto" is on this host, so that the run's config says it; both backends read the same images."""
    if data.backend != "auto" or data.builtin in ("cifar10", "cifar100"):
        return data.backend
    try:
        return "dali" if find_spec("nvidia.dali") else "torchvision"
    except ModuleNotFoundError:  # no package of NVIDIA at all
        return "torchvision"


def _check(config: Config) -> None:
    values = flatten(config)
    if config.resume not in (None, "auto"):
        raise UserError(f"resume is '{config.resume}': it is 'auto' or null.")
    if config.init_from is None and config.init_from_ema:
        raise UserError("init_from_ema is true but init_from is null: say whose averaged weights, or leave it out.")
    if config.init_from is not None and config.model.pretrained:
        raise UserError(
            f"init_from is '{config.init_from}' and model.pretrained is true, and the weights come from one place: "
            "leave one of them out."
        )
    for path, low in _AT_LEAST.items():
        if values[path] is not None and not values[path] >= low:
            raise UserError(f"{path} is {values[path]}: it must be at least {low}.")
    for path, high in _AT_MOST.items():
        if values[path] is not None and values[path] > high:
            raise UserError(f"{path} is {values[path]}: it must be at most {high}.")
    if config.model.drop_path is not None and not 0 <= config.model.drop_path < 1:
        raise UserError(f"model.drop_path is {config.model.drop_path}: it must be in [0, 1).")
    check_task(config)
    check_long_tail(config)
    check_loss(config.loss)
    check_data(config)
    check_domains(config)
    check_label_noise(config.data)
    check_adversarial(config)
    check_augmentation(config)
    check_optimizer(config)
    _check_parallel(config)
    if config.ema.decay is not None and not 0 <= config.ema.decay < 1:
        raise UserError(f"ema.decay is {config.ema.decay}: it must be in [0, 1).")
    _check_average(config.ema)
    _check_precision(config)
    _check_schedule(config)
    _check_measuring(config)


def _check_average(ema: EmaConfig) -> None:
    chosen = {name: getattr(ema, name) for name in ("decay", "uniform_from", "swad")}
    chosen = {name: value for name, value in chosen.items() if value not in (None, False)}
    if len(chosen) > 1:
        values = " and ".join(f"ema.{name} is {value}" for name, value in chosen.items())
        raise UserError(f"{values}: there is one average, exponential, uniform or SWAD's. Leave the others out.")
    only_of_swad = () if ema.swad else ("swad_converge", "swad_tolerance", "swad_tolerance_ratio")
    for name, value, usual in changes(ema, only_of_swad):
        raise UserError(f"ema.{name} is {value} but ema.swad is false: set it to true, or leave {name} at {usual}.")


def _check_measuring(config: Config) -> None:
    precision = config.precision
    if not config.analysis.lpf_sigma > 0:
        raise UserError(f"analysis.lpf_sigma is {config.analysis.lpf_sigma}: it must be above 0.")
    for name in ("weights", "gather_dtype") if config.analysis.every_epochs else ():
        if getattr(precision, name) != "fp32":
            raise UserError(
                f"analysis.every_epochs is {config.analysis.every_epochs} but precision.{name} is "
                f"{getattr(precision, name)}, which rounds the noise: leave every_epochs null, and give "
                "`lesam-dist analyze lpf` the checkpoints."
            )
    peak = config.logging.peak_tflops
    if peak is not None and not peak > 0:
        raise UserError(f"logging.peak_tflops is {peak}: it must be above 0.")
    if config.profile is not None and config.dry_run:
        raise UserError(
            f"profile is {config.profile} but dry_run is true, which makes two steps and writes nothing: leave one out."
        )


def _check_values(values: dict[str, Any]) -> None:
    """Refuse what no field holds: null where it means nothing, numbers that are not finite."""
    for path, value in values.items():
        if path.startswith("optimizer.args."):
            continue
        if value is None and not is_optional(path):
            raise UserError(f"{path} is null: it must be {expected(path)}.")
        if isinstance(value, str) and _has_no_text(value):
            raise UserError(f"{path} is {value!r}: it must be one line of text in UTF-8.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{path} is {value}: it must be {expected(path)}, and finite.")


def _has_no_text(value: str) -> bool:
    """Whether it has control characters, or bytes of another encoding."""
    return any(c < " " or "\ud800" <= c <= "\udfff" for c in value)


def folder(field: str, text: str, kind: str = "folder") -> str:
    """A folder, or another kind of path, as it was given, with the home folder in place of ``~``.

    Raises:
        UserError: for what is no folder's name, or would make one that nobody meant.
    """
    if text.strip() in ("", "null", "None"):
        raise UserError(f"{field} is '{text}': give a {kind}.")
    if _has_no_text(text):  # neither TensorBoard nor DALI can have it
        raise UserError(
            f"{field} is {text!a}: it has control characters, or bytes that are no text in the encoding "
            f"{sys.getfilesystemencoding()}. Set the environment variable PYTHONUTF8=1, or choose another name."
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"{field} is '{text}': there is no user of that name. Write ./{text} for a {kind} of that name."
        )
    return expanded


def _check_parallel(config: Config) -> None:
    """Refuse what this strategy would not look at."""
    parallel, model = config.parallel, config.model
    if not parallel.is_sharded and not parallel.reshard_after_forward:
        raise UserError(
            f"parallel.reshard_after_forward is false but parallel.strategy is {parallel.strategy}, which gathers no "
            "parameters: choose fsdp or hsdp, or leave it at true."
        )
    for name in ("shard_size", "replicate_size"):
        if parallel.strategy != "hsdp" and getattr(parallel, name) is not None:
            raise UserError(
                f"parallel.{name} is {getattr(parallel, name)} but parallel.strategy is {parallel.strategy}: it is for "
                "hsdp. Choose hsdp, or leave it at null."
            )
    if parallel.sync_batchnorm and parallel.strategy == "none":
        raise UserError(
            "parallel.sync_batchnorm is true but parallel.strategy is none, which is one process: choose another, or "
            "leave it at false."
        )
    if parallel.wrap_classes and not parallel.is_sharded and not model.activation_checkpointing:
        raise UserError(
            f"parallel.wrap_classes is {parallel.wrap_classes} but parallel.strategy is {parallel.strategy}, which "
            "gathers no blocks, and model.activation_checkpointing is false: leave it empty."
        )
    if parallel.reduce_dtype != "fp32" and parallel.strategy != "ddp":
        reason = "which reduces in float32" if parallel.is_sharded else "where nothing is reduced"
        raise UserError(
            f"parallel.reduce_dtype is {parallel.reduce_dtype} but parallel.strategy is {parallel.strategy}, {reason}: "
            "choose ddp, or leave it at fp32."
        )
    if parallel.reduce_dtype != "fp32" and config.precision.weights != "fp32":
        raise UserError(
            f"parallel.reduce_dtype is {parallel.reduce_dtype} but precision.weights is {config.precision.weights}, "
            "whose gradients are reduced in that already: leave reduce_dtype at fp32."
        )


def _check_precision(config: Config) -> None:
    precision, strategy = config.precision, config.parallel.strategy
    if precision.cudnn_benchmark and precision.deterministic:
        raise UserError(
            "precision.cudnn_benchmark and precision.deterministic are both true, but what cuDNN finds to be fastest "
            "differs from run to run: choose one of them."
        )
    if precision.weights == "bf16" and (config.parallel.is_sharded or precision.compute != "bf16"):
        raise UserError(
            f"precision.weights is bf16 but precision.compute is {precision.compute} and parallel.strategy is "
            f"{strategy}: it needs compute bf16, and none or ddp. To save memory when sharding, set "
            "precision.gather_dtype to bf16."
        )
    if precision.gather_dtype == "fp32":
        return
    if not config.parallel.is_sharded:
        raise UserError(
            f"precision.gather_dtype is {precision.gather_dtype} but parallel.strategy is {strategy}, which "
            "gathers no parameters: choose fsdp or hsdp, or fp32."
        )
    if precision.compute != precision.gather_dtype:
        raise UserError(
            f"precision.gather_dtype is {precision.gather_dtype} but precision.compute is {precision.compute}: "
            f"products of parameters gathered in {precision.gather_dtype} are {precision.gather_dtype}. Set both "
            f"to {precision.gather_dtype}, or gather_dtype to fp32."
        )


def _check_schedule(config: Config) -> None:
    schedule, epochs = config.schedule, config.epochs
    start = epochs if schedule.anneal_start_epoch is None else schedule.anneal_start_epoch
    if schedule.anneal_start_epoch is not None and start >= epochs:
        raise UserError(
            f"schedule.anneal_start_epoch is {start} but the run has {epochs} epochs: the annealing would never "
            "start. Choose an earlier epoch, or null for a constant sigma."
        )
    if schedule.sigma_warmup_epochs > start:
        raise UserError(
            f"schedule.sigma_warmup_epochs is {schedule.sigma_warmup_epochs}, past the start of the annealing at "
            f"epoch {start}: shorten it."
        )
    if schedule.lr_warmup_epochs > epochs:
        raise UserError(
            f"schedule.lr_warmup_epochs is {schedule.lr_warmup_epochs}, longer than the run of {epochs} epochs."
        )

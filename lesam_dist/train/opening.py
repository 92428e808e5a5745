"""What a run uses, in a few aligned lines at its start: its samples, and each value of its method and schedules.

What is not given has its default, and stands here too: this is what is trained with. A field that the method does not
read needs no line, as it is refused.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from lesam_dist.config.changes import changes
from lesam_dist.config.learning_rate import peak_lr
from lesam_dist.config.methods import OF_BASE, OPTIONS, PLAIN, complete, method_of, shown
from lesam_dist.config.schema import Config
from lesam_dist.data.sampling import Samples
from lesam_dist.tasks.task import Task

_WIDTH = 100


def describe_settings(task: Task) -> str:
    """One line for the samples (not in a dry run, which reads none), the method, what steps, and what changes them."""
    rows = [*([] if task.config.dry_run else _data(task)), *_learning(task.config)]
    most = max(len(name) for name, _ in rows)
    return "\n".join(_row(name, text, most) for name, text in rows)


def describe_longer(then: int, now: int, values: Mapping[str, float]) -> str:
    """What a run that has finished, and is trained for longer, goes on with."""
    told = ", ".join(f"{name} {values[name]:.4g}" for name in ("lr", "sigma") if name in values)
    return f"trained for longer, from {then} to {now} epochs: it goes on with {told}, as a run of {now} epochs has here"


def _row(name: str, text: str, most: int) -> str:
    begin = f"  {name:{most}s}  "
    wrapper = textwrap.TextWrapper(_WIDTH, break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent, wrapper.subsequent_indent = begin, " " * len(begin)
    return wrapper.fill(text).replace("\0", " ")


def _data(task: Task) -> Iterator[tuple[str, str]]:
    train, val = task.splits
    classes = getattr(train, "classes", None)
    of = f" of {len(classes):,} classes" if classes else ""
    samples = f"{len(train):,} training and {len(val):,} validation {task.metric.samples}"
    yield "data", f"{samples}{of}, from {_whole(str(train.root))}"
    if left_out := [*_left_out(train, "training"), *_left_out(val, "validation")]:
        yield "left out", ", ".join(left_out)


def _left_out(samples: Samples, split: str) -> Iterator[str]:
    """What lies in a folder and is not read: by the skip list, or as it is no image of a class."""
    if skipped := getattr(samples, "skipped", 0):
        yield f"{skipped:,} {split} images (data.skip_list)"
    passed_over: Mapping[str, int] = getattr(samples, "passed_over", {})
    yield from (f"{count:,} {kind} ({split})" for kind, count in sorted(passed_over.items()))


def _learning(config: Config) -> Iterator[tuple[str, str]]:
    optimizer, schedule = config.optimizer, config.schedule
    method = method_of(optimizer.name)
    base = optimizer.name if method is None else optimizer.base
    if method is not None:
        options = dict.fromkeys(name for name in OPTIONS if name not in method.registration.without)
        changed = {name: value for name, value, _ in changes(optimizer, options) if name != "scope"}
        yield optimizer.name, _values(complete(optimizer) | changed)
    steps = {"lr": peak_lr(config)} | {name: getattr(optimizer, name) for name in OF_BASE[base]}
    steps["weight_decay"] = optimizer.weight_decay
    if not optimizer.decay_norm_and_bias:
        steps["decay_norm_and_bias"] = False
    if optimizer.name in PLAIN and optimizer.max_grad_norm is not None:
        steps["max_grad_norm"] = optimizer.max_grad_norm
    yield base, _values(steps)
    yield "lr", _lr_schedule(config)
    if method is not None and method.registration.budget:
        yield method.registration.budget, _budget_schedule(config)
    if config.ema.is_on:
        yield "average", _values({name: value for name, value, _ in changes(config.ema)})
    if schedule.image_size is not None:
        yield "image size", ", ".join(f"{side}\0from\0epoch\0{epoch}" for epoch, side in schedule.image_size)


def _values(values: Mapping[str, Any]) -> str:
    """Names and values; a line breaks between two of them alone."""
    return "  ".join(f"{name}\0{_shown(value)}" for name, value in values.items()) or "no arguments"


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else shown(list(value) if isinstance(value, tuple) else value)
    return _whole(text)


def _whole(text: str) -> str:
    """A text in which no line breaks."""
    return text.replace(" ", "\0")


def _lr_schedule(config: Config) -> str:
    schedule = config.schedule
    then = f"a cosine to 0 at epoch {config.epochs}" if schedule.lr_decay == "cosine" else "the same to the end"
    warm_up = f"{schedule.lr_warmup_epochs:g} epochs of warm-up, " if schedule.lr_warmup_epochs else ""
    return f"{warm_up}then {then}" if warm_up else then


def _budget_schedule(config: Config) -> str:
    schedule = config.schedule
    parts = [f"{schedule.sigma_warmup_epochs:g} epochs of warm-up"] if schedule.sigma_warmup_epochs else []
    start = schedule.anneal_start_epoch
    parts.append("constant" if start is None else f"a cosine from epoch {start:g} to 0 at epoch {config.epochs}")
    return ", then ".join(parts)

"""What a profile says, on one screen: where the time goes, the dearest operations, and what to change first."""

from __future__ import annotations

from typing import NamedTuple

from lesam_dist.config.methods import PLAIN
from lesam_dist.config.schema import Config
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.input_bound import remedy
from lesam_dist.train.phases import COMMUNICATION, DATA, OPTIMIZER, PASS_1, PASS_2, PHASES

_DEAREST = 10
_WIDTH = 60  # characters of an operation's name
_LARGE = 0.1  # share of the time from which on a phase beside the passes comes first


class Operation(NamedTuple):
    """A kernel or an operation of torch, with all its calls."""

    name: str
    calls: int
    seconds: float


class Profiled(NamedTuple):
    """``steps`` that were traced, the seconds of their phases, what was computed, and where the traces are."""

    steps: int
    seconds: dict[str, float]
    operations: list[Operation]
    traces: str


def summarize(found: Profiled, config: Config, world: Distributed) -> str:
    """The text for the terminal, of this process."""
    total = sum(found.seconds.values())
    rate = found.steps * config.data.batch_size / total
    lines = [
        f"profile of {found.steps} steps of {1e3 * total / found.steps:.1f} ms ({rate:.4g} images/s while traced):"
    ]
    for phase in PHASES:
        if phase in found.seconds:
            seconds = found.seconds[phase]
            lines.append(f"  {phase:<14}{1e3 * seconds / found.steps:10.2f} ms a step {seconds / total:7.1%}")
    computed = sum(each.seconds for each in found.operations)
    lines.append(f"  {'the dearest operations':<{_WIDTH}} {'calls':>7} {'ms':>9}   share of all")
    for name, calls, seconds in found.operations[:_DEAREST]:
        short = name if len(name) <= _WIDTH else name[: _WIDTH - 3] + "..."
        each = f"{calls / found.steps:7.4g} {1e3 * seconds / found.steps:9.3f} {seconds / computed:9.1%}"
        lines.append(f"  {short:<{_WIDTH}} {each}")
    shares = {phase: seconds / total for phase, seconds in found.seconds.items()}
    lines.append(f"the biggest lever: {lever(shares, config, world)}")
    lines.append(f"traces: {found.traces} (for https://ui.perfetto.dev)")
    return "\n".join(lines)


def lever(shares: dict[str, float], config: Config, world: Distributed) -> str:
    """What to change first, from the phases' shares of the time."""
    beside = {phase: shares.get(phase, 0.0) for phase in (DATA, COMMUNICATION, OPTIMIZER)}
    phase, share = max(beside.items(), key=lambda item: item[1])
    if share < _LARGE:
        passes = shares.get(PASS_1, 0.0) + shares.get(PASS_2, 0.0)
        return f"the passes, {passes:.0%} of the time. {_for_passes(config, world)}"
    if phase == DATA:
        return f"the input, {share:.0%} of the time. {remedy(config, world, share)}"
    if phase == COMMUNICATION:
        scope = "optimizer.scope local reduces one gradient a step and not two, and " if _can_be_local(config) else ""
        return (
            f"the reduction of gradients that no backward hides, {share:.0%} of the time: {scope}"
            "a larger data.batch_size or data.micro_batches reduces less often."
        )
    return (
        f"the optimizer, {share:.0%} of the time: it costs the same for any batch, so a larger data.batch_size makes "
        "it rarer; parallel.strategy fsdp splits it."
    )


def _can_be_local(config: Config) -> bool:
    optimizer = config.optimizer
    return optimizer.name not in PLAIN and optimizer.scope == "global" and config.parallel.strategy == "ddp"


def _for_passes(config: Config, world: Distributed) -> str:
    """What makes forward and backward faster, of what the run does not have."""
    precision, optimizer = config.precision, config.optimizer
    changes = []
    if world.device.type == "cuda":
        if precision.compute == "fp32":
            changes.append("precision.compute bf16")
        if not precision.channels_last:
            changes.append("precision.channels_last true for convolutions")
        if not precision.cudnn_benchmark and not precision.deterministic:
            changes.append("precision.cudnn_benchmark true")
    if not config.model.compile:
        changes.append("model.compile true")
    if optimizer.name not in PLAIN and optimizer.ascent_fraction == 1 and optimizer.ascent_interval == 1:
        changes.append("a cheaper first pass, which is another method: optimizer.ascent_fraction or ascent_interval")
    return f"Try {'; '.join(changes)}." if changes else "They have every setting that makes them faster."

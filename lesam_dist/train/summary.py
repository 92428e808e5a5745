"""What a run is about to do, in a line or two."""

from __future__ import annotations

from torch import nn

from lesam_dist.config.adversarial_checks import attack_steps
from lesam_dist.config.learning_rate import peak_lr
from lesam_dist.config.methods import PLAIN
from lesam_dist.config.schema import Config
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.task import ImageTask
from lesam_dist.tasks.task import Task
from lesam_dist.train.perturbed_samples import samples_per_perturbation
from lesam_dist.train.phases import COMMUNICATION, DRAW, OPTIMIZER, PASS_1, PASS_2

_REPLAY = "\ndata.replay: every step trains on one and the same batch. This measures speed; the network is of no use."


def describe_run(task: Task, model: nn.Module, steps_per_epoch: int, step: int) -> str:
    """Model, method, precision, processes and length of a run that goes on after ``step`` steps; and its plan."""
    config, world = task.config, task.world
    params = sum(p.numel() for p in model.parameters())
    method = config.optimizer.name
    if method not in PLAIN:
        method += f" on {config.optimizer.base}, {config.optimizer.scope} scope"
        samples = samples_per_perturbation(config, world)
        method += "" if samples is None else f", m = {samples} samples per perturbation"
    if (attack := config.adversarial).norm is not None:
        method += f", images attacked ({attack.norm} {attack.epsilon:g}, {attack.steps} steps)"
    processes = f"{world.world_size} x {world.device.type}"
    if world.world_size > 1:
        processes += f", {config.parallel.strategy}"
    name = config.model.name if isinstance(task, ImageTask) else type(model).__name__
    epoch, rest = divmod(step, steps_per_epoch)
    start = f", from step {step} (epoch {step / steps_per_epoch:.2f})" if rest else f", from epoch {epoch}" * (step > 0)
    return (
        f"{name} ({params / 1e6:.2f} M parameters), {method}, {config.precision.compute}, {processes}, "
        f"batch {config.data.batch_size}{_lr(config)}, {config.epochs} epochs of {steps_per_epoch} steps{start}"
        f"{_plan(config)}{_REPLAY * config.data.replay}"
    )


def _lr(config: Config) -> str:
    """The peak learning rate, where it is not as given."""
    optimizer = config.optimizer
    if optimizer.lr_scaling == "none":
        return ""
    return f" (lr {optimizer.lr:g} for {optimizer.lr_reference_batch}, {optimizer.lr_scaling}: {peak_lr(config):g})"


def shares_of(config: Config, world: Distributed) -> tuple[str, ...]:
    """The phases of a run's steps whose share of the time is known and logged.

    Of communication it is what DDP's reduction takes when a process has all gradients of its own. What FSDP2 waits for
    in the middle of a pass cannot be told from what it computes there.
    """
    passes = (PASS_1,) if config.optimizer.name in PLAIN else (PASS_1, PASS_2)
    reduces = world.world_size > 1 and config.parallel.strategy == "ddp"
    draws = (DRAW,) if attack_steps(config) else ()
    return (*draws, *passes, OPTIMIZER, *([COMMUNICATION] if reduces else []))


def _plan(config: Config) -> str:
    """Which method works in which epochs, and when sigma is annealed; empty where nothing changes during the run."""
    optimizer, schedule, epochs = config.optimizer, config.schedule, config.epochs
    start = optimizer.start_epoch
    stop = epochs if optimizer.stop_epoch is None else min(optimizer.stop_epoch, epochs)
    parts = [(0.0, start, optimizer.base), (start, stop, optimizer.name), (stop, epochs, optimizer.base)]
    windows = [f"{name} from epoch {first:g} to {last:g}" for first, last, name in parts if first < last]
    if schedule.anneal_start_epoch is not None:
        windows.append(f"sigma goes to 0 from epoch {schedule.anneal_start_epoch:g}")
    return "\nplan: " + ", ".join(windows) if len(windows) > 1 else ""

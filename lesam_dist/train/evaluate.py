"""Evaluation that counts every sample once, at any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice, repeat
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lesam_dist.errors import UserError
from lesam_dist.parallel.batch import Batch, empty_like, transform
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import is_sharded
from lesam_dist.tasks.classification.metrics import ClassifierMetrics


class Measured(Protocol):
    """What is evaluated: a `Task`, or a part of one."""

    def measure(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor | float]:
        """See `Task.measure`."""
        ...

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """See `Task.report`."""
        ...


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: Distributed,
    autocast: torch.dtype | None = None,
    *,
    task: Measured | None = None,
    count: int | None = None,
    leave: Callable[[], bool] | None = None,
) -> dict[str, float] | None:
    """What a task reports of the samples of all ranks.

    Sums are reduced, not means: ranks may hold different numbers of samples, or none. The host waits for the device
    once, at the end.

    Args:
        model: not wrapped by DDP. Where FSDP2 shards it, its forwards are collective: a rank that runs out of batches
            goes on with empty ones until all have. Its mode (training or not) is the same afterwards.
        batches: this rank's share.
        world: this process among all.
        autocast: dtype of the forward, or None.
        task: what to measure; None takes `ClassifierMetrics`, of images (B, C, H, W) and labels (B,).
        count: number of this rank's batches; needed where the model is sharded, and not used elsewhere.
        leave: asked before each batch; where it is true on any process, all leave without a result, each as soon as
            it can. Not asked for a sharded model, whose forwards nobody may leave alone.

    Returns:
        None where a process has left, else what the task reports, and the ``samples`` counted.

    Raises:
        ValueError: for a sharded model without ``count``.
        UserError: the task's sums do not have ``loss`` and ``samples``, or are not the same for each batch.
    """
    task = ClassifierMetrics() if task is None else task
    if is_sharded(model):
        if count is None:
            raise ValueError("the forwards of a sharded model are collective: pass count, the number of batches")
        batches, leave = _in_step(batches, count, world), None
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor | float] = {}
    left = False
    for batch in batches:
        if left := leave is not None and leave():
            break
        with torch.autocast(world.device.type, autocast, enabled=autocast is not None):
            found = task.measure(model, batch)
        _add(sums, found, type(task).__name__)
    model.train(was_training)
    world.move("at the end of an evaluation")
    total = _over_processes(sums, left, world)
    if total is None:
        return None
    samples = float(total["samples"])
    return task.report(total) | {"samples": samples}


def _add(sums: dict[str, Tensor | float], found: Mapping[str, Tensor | float], task: str) -> None:
    """Numbers stay on the host, and tensors on their device: nothing waits."""
    where = f"the task {task}: measure(model, batch)"
    if missing := [name for name in ("loss", "samples") if name not in found]:
        raise UserError(f"{where} gives no {missing[0]}: return it with the other sums.")
    if sums and sums.keys() != found.keys():
        raise UserError(
            f"{where} gave {', '.join(sums)} of one batch, and {', '.join(found)} of another: give the same of each, 0 "
            "where there is nothing."
        )
    for name, value in found.items():
        more = value.double() if isinstance(value, Tensor) else value
        if name not in sums:
            sums[name] = more
        elif _shape(sums[name]) == _shape(more):
            sums[name] = sums[name] + more
        else:
            raise UserError(
                f"{where} gave {name} of shape {list(_shape(sums[name]))} for one batch, and {list(_shape(more))} for "
                "another: sum over the samples."
            )


def _shape(value: Tensor | float) -> torch.Size:
    return value.shape if isinstance(value, Tensor) else torch.Size()


def _over_processes(sums: dict[str, Tensor | float], left: bool, world: Distributed) -> dict[str, Tensor] | None:
    """The sums of all processes, on the host, of which some may have had no batch; None where one has left."""
    shapes = {name: _shape(value) for name, value in sums.items()}
    if world.world_size > 1:
        found: list[tuple[bool, dict[str, torch.Size]]] = world.gather((left, shapes))
        left = any(has_left for has_left, _ in found)
        shapes = next((theirs for _, theirs in found if theirs), {})
    if left:
        return None
    if not shapes:
        raise RuntimeError("there is nothing to evaluate")
    own = [torch.as_tensor(sums[name] if sums else torch.zeros(shape)) for name, shape in shapes.items()]
    flat = torch.cat([value.to(world.device, torch.float64).flatten() for value in own])
    if world.world_size > 1:
        dist.all_reduce(flat)
    parts = flat.cpu().split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _in_step(batches: Iterable[Batch], count: int, world: Distributed) -> Iterator[Batch]:
    """The batches, then empty ones until every rank has had as many as the one with the most."""
    source = iter(batches)
    first = list(islice(source, 1))
    # What a batch looks like comes from a rank that has one: another may have none at all.
    ranks: list[tuple[int, list[Batch]]]
    ranks = world.gather((count, [empty_like(batch, torch.device("cpu")) for batch in first]))
    most = max(count for count, _ in ranks)
    if most == 0:
        return
    empty = transform(next(chain.from_iterable(found for _, found in ranks)), lambda t: t.to(world.device))
    yield from islice(chain(first, source, repeat(empty)), most)

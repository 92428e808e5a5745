"""Whether the replicas of a run still hold the same bits: memory or a device that flips some says nothing by itself.

Replicas stay equal because all make the same update. What has changed on one alone, a weight, a momentum or an average,
stays so, and nothing fails: that process only computes the gradients of another model from then on. So all that must be
equal is hashed where it lies (`lesam_dist.parallel.hashes`), and one number of each process is compared.
"""

from __future__ import annotations

import hashlib
import re
import socket
from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lesam_dist.errors import SharedError
from lesam_dist.optim import SharpnessAware
from lesam_dist.parallel.hashes import Hasher
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.report import name_of
from lesam_dist.parallel.scope import Scope
from lesam_dist.parallel.shards import shard_axes
from lesam_dist.train.batchnorm import batchnorms
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.ema import WeightAverage

Place = tuple[tuple[int, int], ...]
"""Which part of a tensor a process holds: (index, of how many) along each axis that splits it; () for all of it."""

Key = tuple[str, str]
"""What of a parameter, and the parameter's name: ("momentum_buffer", "layer1.0.conv1.weight")."""

_SHOWN = 3  # tensors that an error names


class Difference(NamedTuple):
    """A tensor that is not equal on all ``holders``; ``suspects`` are fewer than half of them, or else all."""

    key: Key
    suspects: tuple[int, ...]
    holders: tuple[int, ...]


class ReplicaCheck:
    """Compares weights, optimizer state and averages over the processes that hold the same of them.

    DDP: all processes, all tensors. HSDP: those with the same shard, in either form of `lesam_dist.parallel.wrap`.
    FSDP2: what is not split, such as Adam's step counts, since each shard exists once. Left out are buffers, which are
    each process's own within an epoch, and what a method keeps from step to step where ``scope`` makes it so too.

    Costs two launches and seven times the bytes of each tensor (see `Hasher`), an all-gather of 8 bytes for each kind
    of tensor (whole, split), and one host sync. Every process makes it, and calls it alike.

    Args:
        model: not wrapped by DDP; sharded already where it is.
        optimizer, ema: of that model; None for no average.
        world: this process among all.
        scope: of the optimizer's perturbation.
    """

    def __init__(
        self, model: nn.Module, optimizer: SharpnessAware, ema: WeightAverage | None, world: Distributed, scope: Scope
    ) -> None:
        self._model, self._optimizer, self._ema, self._world = model, optimizer, ema, world
        self._params: dict[str, Tensor] = dict(model.named_parameters())  # gathered by FSDP2 they are others
        self._names = {p: name for name, p in self._params.items()}
        self._own = () if scope == "global" else optimizer.memory_names
        self._hasher = Hasher()
        self._equal_at: int | None = None
        own: list[Place] = [()]
        own += dict.fromkeys(place for p in self._params.values() if (place := _place(p)))
        self._places: list[list[Place]] = world.gather(own)
        self._holders = [self._holders_of(kind, place) for kind, place in enumerate(own)]

    def remark(self) -> str | None:
        """What a user who asked for the check should know before the first step; None for nothing."""
        if self._world.world_size == 1:
            return "checks.every_steps compares processes, and there is one: nothing is checked."
        if len(self._holders) > 1 and all(len(holders) == 1 for holders in self._holders[1:]):
            return (
                "checks.every_steps: no two processes hold the same shard, so what is sharded is not checked; hsdp has "
                "replicas."
            )
        return None

    def compare(self, step: int, checkpoints: Checkpointer | None = None, *, buffers: bool = False) -> None:
        """Compare now, between two steps; every process calls it after the same ones.

        Args:
            step: updates made so far.
            checkpoints: where an error is to say what to go back to.
            buffers: compare BatchNorm's statistics too; only right after they have been averaged.

        Raises:
            SharedError: naming the processes in the minority (all of them where there is none), what differs, and
                since when all was well. Nothing may be saved after it.
        """
        if self._world.world_size == 1:
            return
        kinds = self._tensors(buffers)
        device = self._world.device
        hashes = [self._hasher.each(list(tensors.values()), device) for tensors in kinds]
        pairs = zip(kinds, hashes, strict=True)
        own = torch.stack([self._hasher.of(values) + _digest(tensors) for tensors, values in pairs])
        width = max(map(len, self._places))
        own = nn.functional.pad(own, (0, width - len(own)))
        every = own.new_empty(self._world.world_size, width)
        dist.all_gather(list(every), own)
        rows = every.tolist()
        if any(len({rows[rank][kind] for rank in ranks}) > 1 for kind, ranks in self._classes()):
            raise self._error(step, kinds, hashes, checkpoints)
        self._equal_at = step

    def _tensors(self, buffers: bool) -> list[dict[Key, Tensor]]:
        """All that is compared, by kind: what is whole here, then by the part that this process holds."""
        found: dict[Key, Tensor] = {("weights", name): p for name, p in self._params.items()}
        optimizer = self._optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, state in optimizer.state_dict()["state"].items():
            name = self._names.get(params[index], f"parameter {index} of the optimizer")
            found |= {(part, name): value for part, value in state.items() if part not in self._own}
        averages = self._ema.state_dict() if self._ema else {}
        found |= {("ema", name): value for name, value in averages.items() if name in self._params}
        if "n_averaged" in averages:
            found["ema", "n_averaged"] = averages["n_averaged"]
        if buffers:
            alike = {id(buffer) for layer in batchnorms(self._model) for buffer in layer.buffers()}
            own = {name: buffer for name, buffer in self._model.named_buffers() if id(buffer) in alike}
            found |= {("buffer", name): buffer for name, buffer in own.items()}
            found |= {("ema", name): averages[name] for name in own if name in averages}
        kinds: list[dict[Key, Tensor]] = [{} for _ in self._holders]
        places = self._places[self._world.rank]
        for key, value in found.items():
            if isinstance(value, Tensor) and (place := _place(value)) in places:
                kind = places.index(place)
                if len(self._holders[kind]) > 1:
                    kinds[kind][key] = value
        return kinds

    def _holders_of(self, kind: int, place: Place) -> tuple[int, ...]:
        places = enumerate(self._places)
        return tuple(rank for rank, its in places if kind < len(its) and its[kind] == place)

    def _classes(self) -> list[tuple[int, tuple[int, ...]]]:
        """Each kind of tensor, with ranks that hold the same of it."""
        pairs = dict.fromkeys(pair for places in self._places for pair in enumerate(places))
        return [(kind, self._holders_of(kind, place)) for kind, place in pairs]

    def _error(
        self, step: int, kinds: list[dict[Key, Tensor]], hashes: list[Tensor], checkpoints: Checkpointer | None
    ) -> SharedError:
        own = [dict(zip(tensors, values.tolist(), strict=True)) for tensors, values in zip(kinds, hashes, strict=True)]
        every = self._world.gather((socket.gethostname(), own))
        hosts = [host for host, _ in every]
        found: list[Difference] = []
        for kind, ranks in self._classes():
            found += _differences({rank: every[rank][1][kind] for rank in ranks})
        saved = self._world.share(checkpoints.last_finite() if checkpoints and self._world.is_main else None)
        path, known = (None if saved is None else str(saved)), self._equal_at
        since = "They had not been compared before." if known is None else f"All were equal at step {known}."
        return SharedError(
            f"the replicas are no longer equal at step {step}: {_describe(found, hosts)}. Memory or a device has "
            f"changed bits there. {since} {_remedy(path, known)} If it happens again on the same host, take that out."
        )


def _place(tensor: Tensor) -> Place:
    axes = shard_axes(tensor)
    if axes is None:
        return ()
    mesh, split = axes
    return tuple((mesh.get_local_rank(axis), mesh.size(axis)) for axis in split)


def _digest(tensors: dict[Key, Tensor]) -> int:
    """Of the tensors' names and shapes: processes that do not have the same ones differ too. Signed, 64 bits."""
    text = repr([(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _differences(hashes: dict[int, dict[Key, int]]) -> list[Difference]:
    """By rank and tensor; one that a rank does not have counts as different there."""
    holders = tuple(hashes)
    found = []
    for key in dict.fromkeys(key for own in hashes.values() for key in own):
        values = {rank: own.get(key) for rank, own in hashes.items()}
        (common, count), *others = Counter(values.values()).most_common()
        if others:
            suspects = (
                tuple(rank for rank in holders if values[rank] != common) if 2 * count > len(holders) else holders
            )
            found.append(Difference(key, suspects, holders))
    return found


def _describe(found: list[Difference], hosts: list[str]) -> str:
    if not found:
        return "the hashes of all tensors together differ, but those of each do not, so one was computed wrongly"
    first = found[0]
    names = " and ".join(name_of(rank, hosts[rank], several_hosts=True) for rank in first.suspects)
    alike = [difference for difference in found if difference.suspects == first.suspects]
    tensors = ", ".join(f"{part} of '{name}'" for (part, name), _, _ in alike[:_SHOWN])
    tensors += f" and {len(alike) - _SHOWN} more tensors" if len(alike) > _SHOWN else ""
    rest = len(first.holders) - len(first.suspects)
    if rest == 0:
        text = f"{names} do not agree, and none has a majority, in {tensors}"
    else:
        text = f"{names} {'differs' if len(first.suspects) == 1 else 'differ'} from the {rest} others in {tensors}"
    if len(alike) < len(found):
        ranks = sorted({rank for difference in found for rank in difference.suspects} - set(first.suspects))
        more = " and ".join(name_of(rank, hosts[rank], several_hosts=True) for rank in ranks)
        text += f"; {len(found) - len(alike)} more tensors differ" + (f", also on {more}" if more else "")
    return text


def _remedy(saved: str | None, known: int | None) -> str:
    """What to go back to, given the last checkpoint and the last step at which all processes were equal."""
    if saved is None:
        return "Go on from a checkpoint up to that step, or start anew."
    number = re.search(r"\d+$", saved)
    if known is not None and number and int(number[0]) <= known:
        return f"The last checkpoint, {saved}, is not of later: go on with --resume auto."
    return (
        f"The last checkpoint, {saved}, may have it already: move those aside that are of later steps than the last at "
        "which all were equal, then go on with --resume auto."
    )

"""What a step communicates: each collective that a process takes part in, from the shapes of the parameters.

    DDP     pass: an all-reduce for each bucket of gradients (1 MiB, then 25 MiB each, in the order of the backward). On
            gloo, of three processes or more: for each parameter of a full one (`lesam_dist.parallel.bucket_average`)
    FSDP2   pass: for each unit an all-gather in the forward, one more in the backward where it was freed, and a
            reduce-scatter. Units are the blocks and the root, which is what is in none of them; with bf16 gathering all
            BatchNorms are one more
    HSDP    the same within a shard, and an all-reduce of each unit's shard of the gradients over the replicas
    step    sharded: one scalar all-reduce for the norm of each pass (the check of the second gradient included).
            Scope local: one flag. Scope replica: one flag more than the scalars

A pass of scope local or replica leaves its reduction over all processes, or over the replicas, out. None of it depends
on the number of processes, but for padding: FSDP2 cuts each tensor by rows, so that n ceil(rows / n) rows travel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lesam_dist.parallel.replicas import Sync
from lesam_dist.planning.collectives import Operation, sent
from lesam_dist.planning.memory import Shape

Over = Literal["all", "shard", "replicas"]
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # of torch's DDP


class Call(NamedTuple):
    """A collective, over which processes, and the bytes of its whole tensor."""

    operation: Operation
    nbytes: int
    over: Over


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers at once: the places of its parameters in `Layout.shapes`; which block it is, None for the root
    and the BatchNorms; bytes of an element as it is gathered, and whether it is freed after the forward."""

    members: tuple[int, ...]
    block: int | None
    itemsize: int
    freed: bool


@dataclass(frozen=True)
class Layout:
    """How a network is spread over processes.

    Attributes:
        shapes: of the parameters, in their order.
        order: the parameters as their gradients become final.
        units: see `Unit`; in the order of the forward, the root first.
        strategy: none, ddp, fsdp or hsdp.
        shard: processes that share one copy of the parameters.
        replicas: such copies.
        itemsize: bytes of an element of parameters and gradients.
        backend: of torch.distributed.
    """

    shapes: tuple[Shape, ...]
    order: tuple[int, ...]
    units: tuple[Unit, ...]
    strategy: str
    shard: int
    replicas: int
    itemsize: int = 4
    backend: str = "nccl"

    @property
    def processes(self) -> int:
        return self.shard * self.replicas

    def padded(self, members: Sequence[int]) -> int:
        """Elements of these parameters on all processes of a shard together."""
        rows = ((-(-self.shapes[i][0] // self.shard), math.prod(self.shapes[i][1:])) for i in members)
        return self.shard * sum(own * row for own, row in rows)

    @property
    def own_bytes(self) -> float:
        """Of the parameters that a process stores."""
        return self.itemsize * self.padded(range(len(self.shapes))) / self.shard

    def buckets(self) -> list[tuple[int, ...]]:
        """The parameters whose gradients DDP reduces when the last of them is final, in the order in which it does."""
        buckets: list[tuple[int, ...]] = []
        current: list[int] = []
        for i in self.order:
            current.append(i)
            limit = _BUCKET if buckets else _FIRST_BUCKET
            if self.nbytes(current) >= limit:
                buckets.append(tuple(current))
                current = []
        return [*buckets, tuple(current)] if current else buckets

    def reductions(self, bucket: Sequence[int]) -> list[Call]:
        """What a full bucket is reduced by: one collective, or on gloo, of three processes or more, one for each."""
        each = self.backend == "gloo" and self.processes > 2
        return [Call("all_reduce", self.nbytes(part), "all") for part in ([(i,) for i in bucket] if each else [bucket])]

    def nbytes(self, members: Sequence[int]) -> int:
        return self.itemsize * sum(math.prod(self.shapes[i]) for i in members)

    def gather(self, unit: Unit) -> Call:
        return Call("all_gather", unit.itemsize * self.padded(unit.members), "shard")

    def reduce(self, unit: Unit, sync: Sync) -> list[Call]:
        """The reductions of a unit's gradients; none where a pass leaves them on each process."""
        if not sync:
            return []
        whole = self.itemsize * self.padded(unit.members)
        calls = [Call("reduce_scatter", whole, "shard")]
        if self.strategy == "hsdp" and sync is True:
            calls.append(Call("all_reduce", whole // self.shard, "replicas"))
        return calls

    def of_pass(self, sync: Sync) -> list[Call]:
        """The collectives of one forward and backward pass."""
        if self.processes == 1:
            return []
        if self.strategy == "ddp":
            return [call for bucket in self.buckets() for call in self.reductions(bucket)] if sync else []
        gathers = [self.gather(unit) for unit in self.units for _ in range(1 + unit.freed)]
        return [*gathers, *(call for unit in self.units for call in self.reduce(unit, sync))]

    def of_scalars(self, passes: Sequence[Sync]) -> list[Call]:
        """The optimizer's own collectives in a step whose passes reduce their gradients so."""
        if self.processes == 1:
            return []
        flag = [Call("all_reduce", 4, "all")] if any(sync is not True for sync in passes) else []
        if self.strategy == "ddp":
            return flag
        return [*(Call("all_reduce", 8, "shard") for _ in passes), *flag]

    def of_step(self, passes: Sequence[Sync]) -> list[Call]:
        """All collectives of a step."""
        return [*(call for sync in passes for call in self.of_pass(sync)), *self.of_scalars(passes)]

    def size(self, over: Over) -> int:
        return {"all": self.processes, "shard": self.shard, "replicas": self.replicas}[over]

    def sent(self, calls: Sequence[Call]) -> float:
        """Bytes that a process sends for them."""
        return sum(sent(self._real(call.operation), call.nbytes, self.size(call.over)) for call in calls)

    def _real(self, operation: Operation) -> Operation:
        """Torch makes gloo's reduce-scatter of its all-reduce, which sends twice as much."""
        return "all_reduce" if self.backend == "gloo" and operation == "reduce_scatter" else operation

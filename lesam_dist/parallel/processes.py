"""The processes of a run: who this one is, how they meet and part, and what they tell each other."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from lesam_dist.errors import PreemptedError, SharedError, UserError
from lesam_dist.parallel.agreed import Agreed, AgreedByAll
from lesam_dist.parallel.meeting import meet
from lesam_dist.parallel.peers import PeerError, Peers
from lesam_dist.parallel.place import Place, find_place
from lesam_dist.parallel.progress import Progress


@dataclass(frozen=True)
class Distributed:
    """This process among all of them. Alone, it is rank 0 of 1 and no process group exists."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1  # processes on this node
    progress: Progress = field(default_factory=Progress)  # what this process is doing, which the others are told
    agreed: Agreed = field(default_factory=Agreed)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the terminal."""
        return self.rank == 0

    def move(self, what: str = "", step: int | None = None) -> None:
        """At each part of a step: see `Progress.move`."""
        self.progress.move(what, step)

    def alone(self) -> Distributed:
        """This process as rank 0 of 1, on the same device, for what it does without the others.

        They are still told of its progress.
        """
        return replace(self, rank=0, local_rank=0, world_size=1, local_world_size=1, agreed=Agreed())

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def mean(self, values: Sequence[Tensor]) -> list[float]:
        """Average 0-d tensors over the processes and read them; one collective, one host sync."""
        stacked = torch.stack([value.detach().double() for value in values])
        if self.world_size > 1:
            dist.all_reduce(stacked)
            stacked /= self.world_size
        return [float(value) for value in stacked.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, which can be pickled, by rank, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value, which can be pickled, on every rank; the values of the others are ignored."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]


@contextmanager
def process_group(
    device: str | None = None, timeout_s: float = 600.0, progress: Progress | None = None
) -> Iterator[Distributed]:
    """Join the processes that torchrun, accelerate launch, srun or mpirun started, and leave them at the end.

    The launcher's environment decides, see `lesam_dist.parallel.place`. Without one this is a single process. Each
    process takes one GPU (NCCL), or the CPU where there is none (gloo).

    Args:
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        timeout_s: seconds that a process may keep the others waiting.
        progress: where this process says what it does; None makes one.

    Raises:
        UserError: for more local processes than GPUs, "cuda" on a host without one.
        SharedError: for processes on GPUs beside processes on CPUs.
        PeerError: another process failed, or is lost.
        PreemptedError: the same, where all are to stop anyway.
    """
    place = find_place(os.environ)
    target = _choose_device(device, place)
    progress = Progress() if progress is None else progress
    world = Distributed(place.rank, place.local_rank, place.world_size, target, place.local_world_size, progress)
    if place.world_size == 1:
        yield world
        return
    use_cuda = target.type == "cuda"
    store, members = meet(place, timeout_s)
    peers = Peers(store, members, place, world.progress, timeout_s)
    agreed = AgreedByAll(store, place.rank, place.world_size, timeout_s, peers.is_over)
    failed = True
    peers.start()
    try:
        _agree_on_device(store, place, target)
        # The group's own limit comes after that of `peers`, who can say which process is silent.
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            store=PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout_s + 30),
            device_id=target if use_cuda else None,
        )
        agreed.start()
        with _no_early_exit():
            yield replace(world, agreed=agreed)
        dist.barrier()
        agreed.close()
        peers.stop()  # before rank 0, which may have the store, can leave
        dist.barrier()  # a rank that leaves early breaks the others' connections
        failed = False
    except PreemptedError as error:
        peers.publish(error)  # so that nobody takes for a loss that this process is gone
        agreed.part()
        raise
    except Exception as error:
        explained = peers.explain(error)
        if agreed.stopping and isinstance(explained, PeerError):  # it left a little earlier
            reason = agreed.reason or "a request"
            raise PreemptedError(
                f"stopped by {reason}, and other processes had left before: go on with --resume auto."
            ) from error
        peers.part()
        if explained is error:
            raise
        raise explained from error
    finally:
        agreed.close()
        peers.stop()
        if not use_cuda:
            # Gloo's threads drop the tensors of their last collective a little after it is done, and need the
            # interpreter for that. DTensor's caches keep the group alive, so nothing joins them, and one that comes
            # while the interpreter shuts down aborts the process ("terminate called without an active exception"):
            # 7 of 50 exits under FSDP2 with torch 2.14, 0 of 80 after this wait.
            time.sleep(0.2)
        # NCCL would wait for operations that another process will never take part in.
        if dist.is_initialized() and not (failed and use_cuda):
            dist.destroy_process_group()


@contextmanager
def _no_early_exit() -> Iterator[None]:
    """`sys.exit` of one process is a failure like any other: the rest would wait for it."""
    try:
        yield
    except SystemExit as stop:
        raise RuntimeError(f"sys.exit({stop.code!r}) was called in the middle of a run of several processes") from stop


def _choose_device(device: str | None, place: Place) -> torch.device:
    use_cuda = torch.cuda.is_available() if device is None else device == "cuda"
    if not use_cuda:
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), place.local_rank
    if count and place.launcher in ("srun", "mpirun"):
        index %= count  # these can show each process GPUs of its own; NCCL refuses one that two share
    if index >= count:
        remedy = f"Start at most {count} processes per node, or train" if count else "Train"
        raise UserError(
            f"local rank {place.local_rank} has no GPU: this host shows {count}. {remedy} on the CPU with "
            "--parallel.device cpu."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _agree_on_device(store: Store, place: Place, target: torch.device) -> None:
    """Refuse processes on GPUs beside processes on CPUs, who would wait for each other for ever."""
    keys = [f"device/{rank}" for rank in range(place.world_size)]
    store.set(keys[place.rank], f"{target.type} on {socket.gethostname()}")
    devices = [text.decode() for text in store.multi_get(keys)]
    for rank, device in enumerate(devices):
        if device.split()[0] != devices[0].split()[0]:
            raise SharedError(
                f"the device of rank {rank} is {device}, that of rank 0 is {devices[0]}: all processes train on GPUs, "
                "or all on the CPU, with --parallel.device cpu."
            )

"""Runs a function on several gloo processes and returns what each returned."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lesam_dist.parallel.agreed import Agreed, AgreedByAll
from lesam_dist.parallel.processes import Distributed
from tests.interpreter import language_patched_once

# What every test's processes import; the server that they are forked from has it, once for the whole run of pytest.
# It has no threads and has computed nothing: none of these modules starts any.
PRELOAD = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "lesam_dist",
    "lesam_dist.parallel.wrapping",
    "tests.methods",
]


def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``function(world, *args)`` on every rank; its results by rank. The function must be a module's own."""
    # They compute on the CPU, also where there is a GPU. Read by the server, of which they are forks, when it starts.
    interpreted = mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"})
    with tempfile.TemporaryDirectory() as folder, interpreted:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)  # before the first process starts; later calls change nothing
        arguments = (function, world_size, Path(folder), args)
        mp.start_processes(_worker, arguments, nprocs=world_size, start_method="forkserver")  # type: ignore[no-untyped-call]
        return [pickle.loads((Path(folder) / f"rank{rank}").read_bytes()) for rank in range(world_size)]


def free_port() -> int:
    """A port for a launcher whose own choice is always the same: two tests may run at one time."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
    return port


def _worker(rank: int, function: Callable[..., Any], world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world_size)
    agreed = AgreedByAll(store, rank, world_size, 60) if world_size > 1 else Agreed()
    world = Distributed(rank, rank, world_size, torch.device("cpu"), agreed=agreed)
    if isinstance(agreed, AgreedByAll):
        agreed.start()
    with language_patched_once():
        result = function(world, *args)
    (folder / f"rank{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()  # a rank that leaves early can break the others' connecting
    dist.destroy_process_group()
    # With FSDP2 on gloo, torch 2.14 aborts in one of ten exits ("terminate called without an active exception").
    os._exit(0)

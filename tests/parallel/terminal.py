"""Commands of `lesam-dist` on several processes, as a user's terminal shows them: exit statuses and stderr."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.multiprocessing as mp

from lesam_dist import cli
from lesam_dist.parallel.signals import STOP_SIGNALS
from tests.parallel import processes

Environ = dict[str, str]
Command = Callable[[int], None]  # what a rank runs


def torchrun_like(rank: int, world_size: int, port: int) -> Environ:
    size = str(world_size)
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size} | {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def srun_like(rank: int, world_size: int, port: int) -> Environ:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(world_size),
        "SLURM_STEP_ID": "0",
    } | {
        "SLURM_STEP_TASKS_PER_NODE": str(world_size),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }


def launch(
    command: Command,
    folder: Path,
    environ: Callable[[int, int, int], Environ],
    world_size: int = 2,
    first: float = 600,
    others: float = 20,
) -> tuple[list[int | None], str]:
    """Run a command on so many processes; their exit statuses by rank, and all they wrote to stderr.

    Args:
        first: seconds for the first one to end.
        others: seconds for the others from then on; who has not ended then is killed.
    """
    port = processes.free_port()
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(processes.PRELOAD)
    err = folder / "stderr"
    err.write_bytes(b"")
    ranks = [
        context.Process(target=_run, args=(command, rank, err, environ(rank, world_size, port)))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    wait([process.sentinel for process in ranks], first)
    deadline = time.monotonic() + others
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in ranks:
        process.kill()
        process.join()
    return [process.exitcode for process in ranks], err.read_text(errors="replace")


def see_signals() -> None:
    """In a process of the fork server: a reader of images may have started that one blind to what stops a run."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _run(command: Command, rank: int, err: Path, environ: Environ) -> None:
    see_signals()
    os.environ.update(environ)
    descriptor = os.open(err, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    cli._COMMANDS["run"] = (lambda _: command(rank), "")
    cli.run("run")

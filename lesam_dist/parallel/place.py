"""Which of all processes this one is, as its launcher says in environment variables.

torchrun, accelerate launch and Kubernetes' operators set RANK and WORLD_SIZE; srun and mpirun have names of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lesam_dist.errors import UserError

# rank, number of processes, rank among those of this node, number of those. A daemon that mpirun starts by srun passes
# srun's variables on, so srun comes last; Hydra's are all there only under its mpirun, while srun sets PMI_RANK too.
_LAUNCHERS = {
    "mpirun": (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ),
    "srun": (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_ID"),),
}
_STEPS_OF_SRUN = 0xFFFFFFF0  # what a batch script or an interactive shell has as SLURM_STEP_ID is no less than this
_PORT = "29500"


@dataclass(frozen=True)
class Place:
    """This process among all.

    Attributes:
        launcher: what started it: "torchrun" (accelerate's too), "srun", "mpirun"; "hand" where something else set
            torchrun's variables; "" if nothing did.
        address: host and port where rank 0 (or torchrun) waits for the others; "" for one process.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = ""
    address: str = ""


def usable_cores() -> int:
    """Of this machine, as far as this process may use them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_place(environ: Mapping[str, str]) -> Place:
    """Read the launcher's variables.

    Raises:
        UserError: they are incomplete, no numbers, or contradict each other.
    """
    found = _find_launcher(environ)
    if found is None or {"RANK", "WORLD_SIZE"} <= environ.keys():
        return _from_torchrun(environ)
    launcher, names = found
    rank, world_size, local_rank, last = (_number(environ, name) for name in names)
    local_world_size = _tasks_of_node(environ) if launcher == "srun" else last
    if "WORLD_SIZE" in environ and _number(environ, "WORLD_SIZE") != world_size:
        raise UserError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']} but {launcher} started {world_size} processes: unset it."
        )
    if world_size == 1:
        return Place(launcher=launcher)
    _check_rank(names[0], rank, names[1], world_size)
    if "SLURM_PTY_PORT" in environ and launcher == "srun":
        raise UserError(
            f"this is one of {world_size} tasks of srun --pty, which gives a terminal to the first alone. Start all of "
            "them with srun and no --pty, or one process with RANK=0 WORLD_SIZE=1."
        )
    return Place(rank, local_rank, world_size, local_world_size, launcher, _address(environ, launcher, names))


def _find_launcher(environ: Mapping[str, str]) -> tuple[str, tuple[str, ...]] | None:
    for launcher, forms in _LAUNCHERS.items():
        for names in forms:
            if all(name in environ for name in names):
                is_shell = launcher == "srun" and _number(environ, "SLURM_STEP_ID") >= _STEPS_OF_SRUN
                return None if is_shell else (launcher, names)
    return None


def _from_torchrun(environ: Mapping[str, str]) -> Place:
    present = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
    if not present:
        return Place()
    if len(present) == 1:
        missing = "WORLD_SIZE" if present[0] == "RANK" else "RANK"
        raise UserError(
            f"{present[0]} is {environ[present[0]]} but {missing} is not set: start the processes with torchrun, which "
            "sets both, or unset it to train on one process."
        )
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    _check_rank("RANK", rank, "WORLD_SIZE", world_size)
    local_rank, local_world_size = _number(environ, "LOCAL_RANK", "0"), _number(environ, "LOCAL_WORLD_SIZE", "1")
    address = ""
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name):
                raise UserError(
                    f"WORLD_SIZE is {world_size} but {name} is not set: start the processes with torchrun, which sets "
                    "it, or set it to where rank 0 is."
                )
        address = f"{environ['MASTER_ADDR']}:{_number(environ, 'MASTER_PORT')}"
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "hand"
    return Place(rank, local_rank, world_size, local_world_size, launcher, address)


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ[name] if default is None else environ.get(name, default)
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{name} is '{text}', which is no whole number: it is the launcher's variable, leave it to torchrun, or "
            "unset it."
        )
    return int(text)


def _check_rank(name: str, rank: int, size_name: str, world_size: int) -> None:
    if rank >= world_size:
        raise UserError(f"{name} is {rank} but {size_name} is {world_size}: ranks go from 0 to {size_name} - 1.")


def _tasks_of_node(environ: Mapping[str, str]) -> int:
    """SLURM_STEP_TASKS_PER_NODE is like "4(x2),3": 4 tasks on each of the first two nodes, 3 on the third."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(found[1])] * int(found[2] or 1)
    node = _number(environ, "SLURM_NODEID", "0")
    return counts[node] if node < len(counts) else 1


def _address(environ: Mapping[str, str], launcher: str, names: tuple[str, ...]) -> str:
    """Where rank 0 is: MASTER_ADDR and MASTER_PORT, or what the launcher lets one know."""
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if launcher == "srun":
        host = host or _first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", ""))
        # Of its own for each step, so that two on one node do not meet; below the ports that are given to clients.
        own = _number(environ, "SLURM_JOB_ID", "0") * 31 + _number(environ, "SLURM_STEP_ID")
        port = port or str(10000 + own % 20000)
    elif environ[names[1]] == environ[names[3]]:
        host = host or "localhost"  # all processes are on this node
    if not host:
        raise UserError(f"{launcher} does not say where rank 0 is: set MASTER_ADDR to its host, the same for all.")
    return f"{host}:{_number({'MASTER_PORT': port or _PORT}, 'MASTER_PORT')}"


def _first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: "gpu[07-09,12],login1" begins with gpu07."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0]) if found else ""

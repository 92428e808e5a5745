"""Launchers' variables, and which GPU a process takes."""

from __future__ import annotations

import pytest
import torch

from lesam_dist.errors import UserError
from lesam_dist.parallel import processes
from lesam_dist.parallel.place import Place, find_place

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
# What SLURM's manual gives the third of four tasks on "gpu[07-08]": of srun, and of the shells around it.
SRUN = {
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "3",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1000",
    "SLURM_NTASKS": "4",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[07-08]"}
OPEN_MPI = dict(zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "1212", strict=True))
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in OPEN_MPI.items()}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
STEP_ADDRESS = f"gpu07:{10000 + (1000 * 31 + 3) % 20000}"

PLACES = {
    "alone": ({}, Place()),
    "torchrun": (TORCHRUN | MASTER, Place(5, 1, 8, 4, "torchrun", "node0:1234")),
    "torchrun, one process": ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "1"}, Place(launcher="torchrun")),
    "by hand": (MASTER | {"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 0, 2, 1, "hand", "node0:1234")),
    "torchrun in a task of srun": (SRUN | TORCHRUN | MASTER, Place(5, 1, 8, 4, "torchrun", "node0:1234")),
    "srun": (SRUN, Place(2, 0, 4, 2, "srun", STEP_ADDRESS)),
    "srun, with PMI": (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4"}, Place(2, 0, 4, 2, "srun", STEP_ADDRESS)),
    "srun, with the usual exports": (SRUN | MASTER | {"WORLD_SIZE": "4"}, Place(2, 0, 4, 2, "srun", "node0:1234")),
    "srun, one task, a terminal": (
        SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "1"},
        Place(launcher="srun"),
    ),
    "srun, last node with fewer": (
        SRUN | {"SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"},
        Place(2, 0, 4, 1, "srun", STEP_ADDRESS),
    ),
    "batch script": (BATCH, Place()),
    "batch script that is a step": (BATCH | SRUN | {"SLURM_STEP_ID": "4294967291"}, Place()),
    "Open MPI, one node": (OPEN_MPI, Place(1, 1, 2, 2, "mpirun", "localhost:29500")),
    "Open MPI, whose daemon srun started": (SRUN | OPEN_MPI, Place(1, 1, 2, 2, "mpirun", "localhost:29500")),
    "Hydra": (HYDRA | MASTER, Place(3, 1, 4, 2, "mpirun", "node0:1234")),
}


@pytest.mark.parametrize(("environ", "expected"), PLACES.values(), ids=PLACES)
def test_place(environ: dict[str, str], expected: Place) -> None:
    assert find_place(environ) == expected


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("gpu[3,7-9],b", "gpu3"),
        ("r[01-02]n[1-4]", "r01n1"),
        ("x-[004]-ib,x-[1]", "x-004-ib"),
    ],
)
def test_first_host_of_a_list(nodes: str, host: str) -> None:
    assert find_place({**SRUN, "SLURM_STEP_NODELIST": nodes}).address.split(":")[0] == host


REFUSED = {
    "no rank": ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set: start the processes with torchrun"),
    "no size": ({"RANK": "0"}, "RANK is 0 but WORLD_SIZE is not set"),
    "no number": ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', which is no whole number"),
    "negative": ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', which is no whole number"),
    "size no number": ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
    "local no number": (TORCHRUN | MASTER | {"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
    "rank past the end": (MASTER | {"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 but WORLD_SIZE is 2"),
    "no address": (TORCHRUN, "WORLD_SIZE is 8 but MASTER_ADDR is not set"),
    "no port": (TORCHRUN | {"MASTER_ADDR": "a"}, "WORLD_SIZE is 8 but MASTER_PORT is not set"),
    "port no number": (TORCHRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    "another size": (SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8 but srun started 4 processes"),
    "a terminal": (SRUN | {"SLURM_PTY_PORT": "1"}, "one of 4 tasks of srun --pty"),
    "nodes unknown": (SRUN | {"SLURM_STEP_NODELIST": ""}, "srun does not say where rank 0 is: set MASTER_ADDR"),
    "mpirun on several nodes": (HYDRA, "mpirun does not say where rank 0 is: set MASTER_ADDR"),
}


@pytest.mark.parametrize(("environ", "message"), REFUSED.values(), ids=REFUSED)
def test_variables_that_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        find_place(environ)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("launcher", "local_rank", "visible", "index"),
    [
        ("torchrun", 1, 2, 1),
        ("srun", 3, 1, 0),
        ("srun", 3, 4, 3),
        ("mpirun", 3, 2, 1),
        ("torchrun", 1, 1, None),
        ("hand", 1, 1, None),
    ],
)
def test_gpu_of_a_process(
    monkeypatch: pytest.MonkeyPatch, launcher: str, local_rank: int, visible: int, index: int | None
) -> None:
    """srun and mpirun can show each process its own GPUs; torchrun's processes see the same ones."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    place = Place(local_rank, local_rank, 4, 4, launcher)
    if index is None:
        with pytest.raises(UserError, match="local rank 1 has no GPU: this host shows 1"):
            processes._choose_device("cuda", place)
    else:
        assert processes._choose_device("cuda", place) == torch.device("cuda", index)
        assert chosen == [index]

"""What the terminal shows when a process fails, is killed, stops or disagrees; and that none stays behind."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lesam_dist import cli, parallel
from lesam_dist.data import epoch_order, rank_batches, scan_split
from lesam_dist.errors import UserError
from lesam_dist.train import agreement
from tests.parallel import processes
from tests.parallel.terminal import Command, launch, srun_like, torchrun_like


def both_fail(rank: int) -> None:
    raise UserError("epochs is -3")  # before any group is joined


def each_fails(rank: int) -> None:
    raise UserError(f"disk {rank} is full")


def second_fails(rank: int) -> None:
    with parallel.process_group("cpu", 60) as world:
        if rank == 1:
            raise UserError("disk 1 is full")
        world.barrier()


def first_fails(rank: int) -> None:
    with parallel.process_group("cpu", 60) as world:
        if rank == 0:
            raise UserError("disk 0 is full")
        world.barrier()


def second_has_a_bug(rank: int) -> None:
    with parallel.process_group("cpu", 60) as world:
        if rank == 1:
            raise ValueError("a bug of our own")
        world.barrier()


def second_is_killed(rank: int) -> None:
    with parallel.process_group("cpu", 60) as world:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()


def hangs_and_stops(rank: int) -> None:
    with parallel.process_group("cpu", 10) as world:
        world.progress.stacks = Path("stacks")
        world.barrier()
        while rank == 1 and not (
            "is behind" in Path("/proc/self/fd/2").read_text() and list(Path("stacks").glob("*1*"))
        ):
            time.sleep(0.1)
        world.move("pass 1", 7)
        world.barrier()
        world.move("pass 2")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        world.barrier()


def on_two_devices(rank: int) -> None:
    if rank == 1:
        from lesam_dist.parallel import processes as module

        module._choose_device = lambda device, place: torch.device("cuda", 0)  # type: ignore[assignment]
    with parallel.process_group(None, 60):
        raise AssertionError("joined")


CASES: dict[str, tuple[Command, list[int], list[str]]] = {
    "shared by all": (both_fail, [2, 2], ["epochs is -3"]),
    "one each": (each_fails, [2, 2], ["error: disk 0 is full", "rank 1: disk 1 is full"]),
    "in a group": (second_fails, [2, 2], ["lesam-dist: error: rank 1: disk 1 is full"]),
    "rank 0, who has the store": (first_fails, [2, 2], ["lesam-dist: error: disk 0 is full"]),
    "a bug": (second_has_a_bug, [2, 1], ["lesam-dist: error: rank 1: Traceback", "\nValueError: a bug of our own"]),
    "killed": (second_is_killed, [2, -signal.SIGKILL], ["as rank 1 is gone (starting): killed (out of memory?"]),
    "devices": (on_two_devices, [2, 2], ["lesam-dist: error: the device of rank 1 is cuda on", "rank 0 is cpu on"]),
}


@pytest.mark.parametrize("name", CASES)
def test_each_failure_is_said_once(tmp_path: Path, name: str) -> None:
    command, statuses, messages = CASES[name]
    for attempt in range(2 if name == "shared by all" else 1):  # the same parent may start it again
        found, err = launch(command, tmp_path, torchrun_like)
        assert found == statuses, f"attempt {attempt}: {err}"
        for message in messages:
            assert err.count(message) == 1, err
        assert err.count("lesam-dist: error") == (2 if name == "one each" else 1), err
        assert ("Traceback" in err) == (name == "a bug")
        assert "frame #" not in err, "torch's account of a lost connection"


def test_a_process_that_hangs_or_stops_is_named_and_silence_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    statuses, err = launch(hangs_and_stops, tmp_path, srun_like, others=0)
    assert statuses == [1, -signal.SIGKILL], err
    behind = "rank 1 is behind (starting); the others wait (step 7: pass 1). "
    assert f"{behind}Stacks: rank_0.txt and rank_1.txt in stacks." in err
    stacks = [Path("stacks", f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert f"stacks of rank 1 on {socket.gethostname()}" in stacks[1]
    assert " in hangs_and_stops\n" in stacks[1], "not in a collective"
    assert " in barrier\n" in stacks[0].partition(" in hangs_and_stops\n")[0], "called by it"
    last = err.strip().splitlines()[-1]
    assert last.startswith("lesam-dist: error: no step for")
    assert "parallel.timeout_s is 10: rank 1 is silent, stopped by a signal (last seen in " in last
    assert err.count("lesam-dist: error") == 1


def writes_events_on_a_full_disk(rank: int) -> None:
    """Of which TensorBoard's thread dies, and the next event raises what it died of."""
    from torch.utils.tensorboard import SummaryWriter

    with parallel.process_group("cpu", 60) as world:
        if rank == 0:
            board = SummaryWriter("board", flush_secs=1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # 200 bytes have room
            with suppress(OSError):
                while True:
                    board.add_scalar("loss", 1.0)
                    time.sleep(0.01)
            time.sleep(3)  # in which a failure that was taken for the process's own would end it
        world.barrier()


def test_a_thread_that_hands_on_its_failure_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("board").mkdir()
    statuses, err = launch(writes_events_on_a_full_disk, tmp_path, torchrun_like)
    assert (statuses, err) == ([0, 0], "")


def trains(rank: int) -> None:
    cli._train(Path("flags").read_text().split())


def test_srun_is_one_run_and_a_bad_image_of_any_rank_is_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two tasks of srun the second reads a truncated image in its first batch; the folder then holds that run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, "data")
    folder = scan_split(Path("data"), "train")
    order = epoch_order(len(folder), seed=0, epoch=0, shuffle=True)
    first = rank_batches(order, batch_size=20, rank=1, world_size=2, train=True)[0][0]
    bad = Path(folder.paths[first])
    bad.write_bytes(bad.read_bytes()[:60])
    flags = "--config digits --data.root data --data.builtin null --data.batch_size 20 --data.workers 1 "
    flags += "--epochs 1 --schedule.anneal_start_epoch null --parallel.device cpu --data.max_bad_files 0 --run_dir run"
    Path("flags").write_text(flags)
    statuses, err = launch(trains, tmp_path, srun_like)
    assert statuses == [2, 2], err
    assert "2 x cpu, ddp, batch 20" in err
    assert err.count("lesam-dist: error: rank 1: cannot decode the image") == err.count("lesam-dist: error") == 1
    assert err.count(bad.name) == 1
    statuses, err = launch(trains, tmp_path, srun_like)
    assert statuses == [2, 2], err
    assert err.strip().splitlines()[-1].startswith("lesam-dist: error: run_dir 'run' already holds a run")
    assert err.count("lesam-dist: error") == 1
    assert "Traceback" not in err


def test_processes_end_with_their_launcher() -> None:
    """A launcher that is killed outright can end nobody: its child notices, though its main thread never looks."""
    child = "import time, sys; from lesam_dist.parallel.report import end_with_launcher; end_with_launcher(); "
    child += "print('begun', flush=True); time.sleep(600)"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", launcher, child],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.kill()
        assert "is gone: stopping" in process.stdout.read()  # which ends when the child has ended too


def disagree(world: parallel.Distributed, root: str, folder: str) -> list[str]:
    """What each of these differences is refused with, each on rank 1 alone."""
    said: list[str] = []

    def note(function: Callable[..., None], *args: object) -> None:
        try:
            function(*args, world)
        except UserError as error:
            said.append(str(error))
        else:
            said.append("")

    from lesam_dist.config.command_line import parse

    config = parse(["--config", "digits", "--run_dir", f"{folder}/{world.rank}", "--data.root", f"/on/{world.rank}"])
    note(agreement.agree_on_setup, config)
    config.optimizer.lr += 0.5 * world.rank
    note(agreement.agree_on_setup, config)
    versions = agreement._versions()
    agreement._versions = lambda: versions | {"the version of torch": f"9.{world.rank}"}
    note(agreement.agree_on_setup, config)
    splits = {"train": scan_split(Path(root), "train"), "val": scan_split(Path(f"{root}{world.rank}"), "val")}
    note(agreement.agree_on_data, splits | {"val": splits["train"]})
    note(agreement.agree_on_data, splits)
    (Path(folder) / "same").mkdir(exist_ok=True)
    note(agreement.agree_on_run_dir, Path(folder) / "same")
    (Path(folder) / str(world.rank) / "own").mkdir(parents=True)
    os.chdir(Path(folder) / str(world.rank))
    note(agreement.agree_on_run_dir, Path("own"))
    return said


def test_ranks_agree_before_the_first_step(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(2):
        shutil.copytree(images, tmp_path / f"data{rank}")
    shutil.copytree(images, tmp_path / "data")
    missing = sorted((tmp_path / "data1" / "val").rglob("*.*"))[3]
    missing.unlink()
    ranks = processes.run(disagree, 2, str(tmp_path / "data"), str(tmp_path))
    assert ranks[0] == ranks[1], "all say the same, so that it is said once"
    host = socket.gethostname()
    one, zero = f"rank 1 on {host}", f"rank 0 on {host}"
    same, lr, version, same_data, data, same_folder, folder = ranks[0]
    assert (same, same_data, same_folder) == ("", "", "")
    assert lr.startswith("the processes differ in optimizer.lr: ")
    assert version.startswith(f"the processes differ in the version of torch: {one} has 9.1, {zero} has 9.0.")
    assert data.startswith(f"the processes differ in val data: {one} has 20 images (")
    assert f"{zero} has 21 images (" in data
    assert folder.startswith(f"run_dir 'own' is not one folder: {one} does not see what {zero} wrote there.")
    assert not list(tmp_path.rglob(".shared_*"))

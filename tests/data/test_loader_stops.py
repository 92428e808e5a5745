"""A loader that was stopped, left halfway or signalled goes on to the bit, and on no other data."""

from __future__ import annotations

import itertools
import multiprocessing
import subprocess

import pytest

from lesam_dist.data import ImageFolder
from lesam_dist.errors import UserError
from lesam_dist.parallel.signals import STOP_SIGNALS
from tests.data.reading import Load, read, same, take


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact(digits_train: ImageFolder, backend: str, load: Load, world: int) -> None:
    """A fresh loader, with the state of one that ran on another number of ranks, continues bit for bit."""
    folder = take(digits_train, 250)
    unbroken = [load(folder, backend, rank=rank, world_size=world) for rank in range(world)]
    for loader in unbroken:
        read(loader, 0), read(loader, 1)
    state = load(folder, backend, world_size=3 - world).state_dict()
    for rank, loader in enumerate(unbroken):
        resumed = load(folder, backend, rank=rank, world_size=world)
        resumed.load_state_dict(state)
        assert same(read(resumed, 2), read(loader, 2))


def test_an_epoch_may_be_left_halfway(digits_train: ImageFolder, backend: str, load: Load) -> None:
    folder = take(digits_train, 200)
    loader = load(folder, backend, batch_size=20)
    expected = {epoch: read(load(folder, backend, batch_size=20), epoch) for epoch in (0, 1, 5)}
    for stop_after in (0, 1, 3, 9, 10):
        list(itertools.islice(loader.epoch(4), stop_after))
        for epoch in (5, 0, 1):
            assert same(read(loader, epoch), expected[epoch])
    half_read = loader.epoch(0)  # not even closed
    next(half_read)
    assert same(read(loader, 1), expected[1])


def test_workers_outlive_the_signals_that_end_a_run(digits_train: ImageFolder, load: Load) -> None:
    """torchrun and Slurm signal all processes: the step is finished, and the checkpoint made, with their help."""
    loader = load(take(digits_train, 100), "torchvision", batch_size=10, workers=1)
    batches = loader.epoch(0)
    next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if "forkserver" in str(type(child)).lower())
    numbers = " ".join(f"-{int(number)} {worker.pid};" for number in STOP_SIGNALS)
    subprocess.run(["sh", "-c", numbers.replace("-", "kill -")], check=True)
    assert len(list(itertools.islice(batches, 8))) == 8
    assert worker.is_alive()
    worker.terminate()  # as the interpreter does at its end, where nobody has closed the loader
    worker.join(60)
    assert worker.exitcode == 0
    loader.close()


def test_resume_refuses_other_data(digits_train: ImageFolder, backend: str, load: Load, seed: int) -> None:
    folder = take(digits_train, 150)
    state = load(folder, backend).state_dict()
    with pytest.raises(UserError, match=r"the number of images was 150 in the checkpoint and is 149 now"):
        load(ImageFolder(folder.root, folder.classes, folder.paths[1:], folder.labels[1:]), backend).load_state_dict(
            state
        )
    renamed = ImageFolder(folder.root, folder.classes, (*folder.paths[1:], folder.paths[0]), folder.labels)
    with pytest.raises(UserError, match=r"the image files was"):
        load(renamed, backend).load_state_dict(state)
    with pytest.raises(UserError, match=rf"the seed was {seed} in the checkpoint and is {seed + 1} now"):
        load(folder, backend, seed=seed + 1).load_state_dict(state)
    with pytest.raises(UserError, match=r"the global batch size was 120 .* is 60 now.*Go back to the former"):
        load(folder, backend, batch_size=60).load_state_dict(state)

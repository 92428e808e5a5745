"""One batch again and again: the first of the loader that it replays, which has nothing left to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lesam_dist.data import SyntheticLoader, Transform, build_loader, scan_split
from lesam_dist.data.replay import ReplayLoader

CPU = torch.device("cpu")


class Closing(SyntheticLoader):
    closed = 0

    def close(self) -> None:
        self.closed += 1


def synthetic(seed: int, rank: int = 0) -> Closing:
    return Closing(num_classes=9, image_size=4, batch_size=6, batches=5, seed=seed, rank=rank, device=CPU)


def test_every_batch_is_the_first_of_this_rank(seed: int) -> None:
    for rank in range(2):
        inner = synthetic(seed, rank)
        replayed = ReplayLoader(inner)
        images, labels = next(synthetic(seed, rank).epoch(0))
        for epoch, start in ((3, 2), (0, 0), (4, 5)):
            batches = list(replayed.epoch(epoch, start))
            assert len(batches) == len(replayed) - start == 5 - start
            for found in batches:
                assert torch.equal(found[0], images)
                assert torch.equal(found[1], labels)
        assert inner.closed == 1, "its threads would take cores from the network"


def test_what_a_caller_does_to_its_batch_is_gone_in_the_next(seed: int) -> None:
    first, second = list(ReplayLoader(synthetic(seed)).epoch(0))[:2]
    first[0].mul_(2)
    assert torch.equal(second[0] * 2, first[0])


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_files_are_read_once(images: Path, seed: int, backend: str) -> None:
    """The batch outlives its reader, and the state is still told."""
    options: dict[str, Any] = {"transform": Transform(image_size=16, val_resize=16), "batch_size": 10, "seed": seed}
    options |= {"rank": 0, "world_size": 1, "device": CPU, "workers": 0, "train": True, "backend": backend}
    loader = build_loader(scan_split(images, "train"), **options)
    expected = [part.clone() for part in next(build_loader(scan_split(images, "train"), **options).epoch(0))]
    replayed = ReplayLoader(loader)
    state = replayed.state_dict()
    for found in list(replayed.epoch(1, 3)):
        torch.testing.assert_close(list(found), expected, rtol=0, atol=0)
    assert replayed.state_dict() == state
    replayed.load_state_dict(state)
    replayed.close()

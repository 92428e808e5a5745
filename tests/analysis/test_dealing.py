"""Batches of another size: which images are in which, on any number of processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lesam_dist.analysis.engine.dealing import deal
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from tests.analysis.quadratics import regression, shared
from tests.parallel import processes

Rows = list[list[list[float]]]  # parts of a batch, of images, of numbers


def dealt(world: Distributed, seed: int, size: int, at_once: int | None) -> tuple[int, int, int, int, list[Rows]]:
    torch.manual_seed(seed)
    model, x, y = regression(23, 3)
    found = deal(shared(model, x, y, world), size, seed, at_once)
    rows = [[torch.cat([a, b[:, None]], dim=1).tolist() for a, b in batch] for batch in found.batches]
    return found.first, found.count, found.left_out, found.most, rows


@pytest.mark.parametrize(("size", "at_once"), [(5, 2), (20, None)])
def test_no_number_of_processes_changes_the_batches(seed: int, size: int, at_once: int | None) -> None:
    first, count, left_out, most, alone = processes.run(dealt, 1, seed, size, at_once)[0]
    assert (first, count, left_out, most) == (0, 23 // size, 23 % size, count)
    assert [len(part) for part in alone[0]] == ([2, 2, 1] if at_once else [20])
    images = {tuple(row) for batch in alone for part in batch for row in part}
    torch.manual_seed(seed)
    _, x, y = regression(23, 3)
    assert images < {tuple(row) for row in torch.cat([x, y[:, None]], dim=1).tolist()}
    assert len(images) == count * size, "each image is in one batch, with its own label"
    together = processes.run(dealt, 3, seed, size, at_once)
    assert [batch for *_, batches in together for batch in batches] == alone
    assert [found[0] for found in together] == [sum(len(f[4]) for f in together[:rank]) for rank in range(3)]
    assert {found[3] for found in together} == {max(len(found[4]) for found in together)}


def test_images_are_shuffled_and_smaller_batches_are_pieces_of_larger_ones(seed: int) -> None:
    x = torch.arange(100.0)[:, None]
    objective = Objective(nn.Linear(1, 1), [(x[:70], x[:70, 0]), (x[70:], x[70:, 0])])
    large = [batch[0][1].tolist() for batch in deal(objective, 50, seed).batches]
    small = [batch[0][1].tolist() for batch in deal(objective, 25, seed).batches]
    assert small[0] + small[1] == large[0]
    assert sorted(large[0] + large[1]) == x[:, 0].tolist()
    assert large[0] != sorted(large[0]), "once in 50! orders"
    assert large[0] != deal(objective, 50, seed + 1).batches[0][0][1].tolist(), "another seed, once in 100! orders"


def test_a_size_that_does_not_fit_is_refused() -> None:
    x = torch.zeros(3, 1)
    objective = Objective(nn.Linear(1, 1), [(x, x[:, 0])])
    with pytest.raises(UserError, match="a batch is of 4 images, but there are 3: take more images"):
        deal(objective, 4)
    with pytest.raises(UserError, match="a batch is of 0 images: it must have at least 1"):
        deal(objective, 0)

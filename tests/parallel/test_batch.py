"""Batches of any structure: their rows, their parts, and what is wrong with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lesam_dist.errors import UserError
from lesam_dist.parallel.batch import empty_like, parts, rows, samples_in, structure, tensors, transform


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


def batch(n: int) -> dict[str, Any]:
    nested = [torch.randn(n, 2), {"c": (torch.arange(n), "name", None)}]
    return {"a": Pair(torch.randn(n, 3), torch.arange(n)), "b": nested, "scale": torch.tensor(2.0), "share": 0.5}


def test_parts_are_the_batch_in_order(seed: int) -> None:
    for n in range(1, 9):
        for count in (1, 2, 3, 8):
            whole = batch(n)
            pieces = parts(whole, count)
            assert len(pieces) == len(torch.arange(n).chunk(count))
            for index, tensor in enumerate(tensors(whole)):
                found = [tensors(piece)[index] for piece in pieces]
                if tensor.ndim:
                    assert torch.equal(torch.cat(found), tensor)
                else:
                    assert all(torch.equal(one, tensor) for one in found)
            assert {type(piece["a"]) for piece in pieces} == {Pair}
            assert pieces[0]["b"][1]["c"][1:] == ("name", None)
            assert sum(map(samples_in, pieces)) == n


def test_rows(seed: int) -> None:
    whole, which = batch(6), torch.randperm(6)[:3]
    some = rows(whole, which)
    assert torch.equal(some["a"].image, whole["a"].image[which])
    assert torch.equal(some["b"][1]["c"][0], which)
    assert (some["scale"], some["share"]) == (whole["scale"], 0.5)
    assert torch.equal(rows(whole, slice(2))["a"].label, torch.arange(2))


def test_an_empty_one_has_its_structure(seed: int) -> None:
    empty = empty_like(batch(4), torch.device("cpu"))
    assert structure(empty) == (
        "{a: (float32[0, 3], int64[0]), b: (float32[0, 2], {c: (int64[0], str, NoneType)}), scale: float32[], "
        "share: float}"
    )


def test_other_mappings_become_dicts() -> None:
    from collections import UserDict

    changed = transform(UserDict(x=torch.ones(2)), lambda t: t + 1)
    assert isinstance(changed, dict)
    assert changed["x"].tolist() == [2, 2]


def test_rows_must_agree() -> None:
    with pytest.raises(UserError, match=r"a batch is \(float32\[3\], float32\[4\]\): its tensors must have as many"):
        samples_in((torch.ones(3), torch.ones(4)))
    with pytest.raises(UserError, match=r"a batch is \{x: float32\[\]\}: it needs a tensor with a row for each sample"):
        samples_in({"x": torch.tensor(1.0)})

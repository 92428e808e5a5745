"""What a batch may be: tensors, alone or in tuples, lists and mappings, one inside the other.

A tensor of at least one dimension has a row for each sample of the batch. What has no rows, a 0-d tensor or anything
that is no tensor, holds for the whole batch and goes with each part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lesam_dist.errors import UserError

Batch = Any


def transform(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The same structure with ``change`` of each tensor; a mapping of any kind becomes a dict."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: transform(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(transform(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(transform(value, change) for value in batch)
    return batch


def tensors(batch: Batch) -> list[Tensor]:
    """All tensors, in the order of the structure."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    transform(batch, keep)
    return found


def samples_in(batch: Batch) -> int:
    """How many samples a batch has.

    Raises:
        UserError: no tensor has rows, or two have different numbers of them.
    """
    lengths = [len(tensor) for tensor in tensors(batch) if tensor.ndim]
    if not lengths:
        raise UserError(f"a batch is {structure(batch)}: it needs a tensor with a row for each sample.")
    if len(set(lengths)) > 1:
        raise UserError(
            f"a batch is {structure(batch)}: its tensors must have as many rows as it has samples, all the same. Give "
            "what holds for the whole batch as a number, or as a tensor without dimensions."
        )
    return lengths[0]


def rows(batch: Batch, which: slice | Tensor) -> Batch:
    """Some of the samples: a slice, or their numbers, (K,) int64."""
    return transform(batch, lambda tensor: tensor[which] if tensor.ndim else tensor)


def parts(batch: Batch, count: int) -> list[Batch]:
    """The batch in at most so many parts of equal size, as `torch.chunk` makes them."""
    size = max(1, -(-samples_in(batch) // count))
    return [rows(batch, slice(i, i + size)) for i in range(0, max(1, samples_in(batch)), size)]


def structure(batch: Batch) -> str:
    """In words: the kinds and names of what is in a batch, with shapes and dtypes."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {structure(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(map(structure, batch)) + ")"
    return type(batch).__name__


def empty_like(batch: Batch, device: torch.device) -> Batch:
    """A batch of the same structure without samples, on another device."""

    def empty(tensor: Tensor) -> Tensor:
        return tensor.new_empty((0, *tensor.shape[1:]), device=device) if tensor.ndim else tensor.to(device)

    return transform(batch, empty)

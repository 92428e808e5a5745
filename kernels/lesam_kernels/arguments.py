"""Checks of the scalar tensors that launchers take."""

from __future__ import annotations

import torch
from torch import Tensor


def check_if_given(
    name: str, value: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """`check_argument` of one that may be left out."""
    if value is not None:
        check_argument(name, value, dtype, shape, device)


def check_argument(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless ``value`` is a contiguous tensor of this dtype, shape and device; () means one element.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, other strides, another device.
    """
    if value.dtype != dtype:
        raise TypeError(f"{name} is {value.dtype}; it must be {dtype}.")
    fits = value.shape == shape if shape else value.numel() == 1
    if not fits or value.device != device or not value.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and is on '{value.device}'; it must be contiguous, of shape "
            f"{shape} and on '{device}'."
        )

"""What a kernel assumes of a tensor, checked on the host: dtype, device, dense memory, order of elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesam_kernels.launch_config import SUPPORTED_DTYPES


class Layout(NamedTuple):
    """Everything but the address and the dtype that a kernel depends on."""

    shape: torch.Size
    strides: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> Layout:
        strides = tensor.stride() if tensor.layout == torch.strided else ()
        return Layout(tensor.shape, strides, tensor.device)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that the kernels do not know."""
    if dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise TypeError(f"{name} is {dtype}; supported dtypes are {supported}. Convert it or leave it out.")


def check_device(name: str, where: torch.device, device: torch.device) -> None:
    """Raise ValueError for a tensor that is not on the table's device."""
    if where != device:
        raise ValueError(f"{name} is on '{where}', the table on '{device}'; use one table per device.")


def check_memory(name: str, tensor: Tensor) -> int:
    """The tensor's address; raise ValueError where it has none."""
    address = tensor.data_ptr()
    if not address:
        raise ValueError(
            f"{name} has no memory of its own (a DTensor, or a meta or fake tensor); pass its local tensor."
        )
    return address


def check_dense(name: str, layout: Layout) -> None:
    """Raise ValueError where walking the memory would meet anything but the elements, each once."""
    if not _is_dense(layout):
        raise ValueError(
            f"{name} is not dense in memory (shape {tuple(layout.shape)}, strides {layout.strides}); pass a dense "
            "tensor, e.g. its clone(memory_format=torch.contiguous_format)."
        )


def check_parallel(name: str, layout: Layout, param: Layout) -> None:
    """Raise ValueError where walking both memories would not pair the right elements."""
    if layout.shape.numel() != param.shape.numel():
        raise ValueError(
            f"{name} has {layout.shape.numel()} elements (shape {tuple(layout.shape)}), but the parameter has "
            f"{param.shape.numel()} (shape {tuple(param.shape)})."
        )
    check_dense(name, layout)
    if _order(layout) != _order(param):
        raise ValueError(
            f"{name} has shape {tuple(layout.shape)} and strides {layout.strides}, but the parameter has shape "
            f"{tuple(param.shape)} and strides {param.strides}: their elements do not lie in the same order. Give "
            "both one memory format."
        )


def _order(layout: Layout) -> list[tuple[int, int]]:
    """The dims that decide where elements lie: the stride of a dim of size 1 means nothing."""
    return [(stride, size) for size, stride in zip(layout.shape, layout.strides, strict=False) if size > 1]


def _is_dense(layout: Layout) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of dims."""
    if len(layout.shape) != len(layout.strides):  # a sparse tensor
        return False
    expected = 1
    for stride, size in sorted(_order(layout)):
        if stride != expected:
            return False
        expected *= size
    return True


def guard_of(tensors: Sequence[Any]) -> Callable[..., bool]:
    """A quick test whether other tensors are like these in type, dtype, device, sizes and strides, each like its own.

    ``guard(*others)`` is True only where they are; False also where it cannot know. The one of torch.compile: a list
    passes in one call, where reading the attributes of each tensor in Python takes several times as long.
    """
    sizes: Any = [list(t.shape) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    try:  # torch's own: it may go, and its arguments may change
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except (ImportError, TypeError, RuntimeError):
        return lambda *_: False

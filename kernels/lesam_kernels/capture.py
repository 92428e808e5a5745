"""What a table keeps for the CUDA graphs that were captured with it: lists of addresses that never change.

A graph is launches with fixed arguments, so the buffers that they read must stay, in place and in contents. Memory that
is allocated *within* a capture will not do for contents that are written once: it may be that of earlier operations of
the same graph, which write there again in every replay. So buffers are made in advance, outside of captures.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEW_LISTS = 16
"""How many lists of addresses one capture may bring along that no graph of the table has yet."""

_ALIGNED = 2  # addresses; 16 bytes, which is all that Triton asks for


def is_capturing(device: torch.device) -> bool:
    """Whether launches on ``device`` are recorded in a CUDA graph now, instead of run.

    All code of this package asks here, so that tests can have captures where there is no GPU.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory from which a copy to ``device`` does not wait for it."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.numel() else tensor


class GraphLists:
    """Lists of ``length`` addresses, int64, in buffers on ``device`` that are never written again."""

    def __init__(self, length: int, device: torch.device) -> None:
        self._length, self._device = length, device
        self._known: list[tuple[list[int], Tensor]] = []
        self._unwritten: list[tuple[list[int], Tensor]] = []
        self._spare: list[Tensor] = []
        self.refill()

    @property
    def are_written(self) -> bool:
        """Whether all buffers hold their lists."""
        return not self._unwritten

    def refill(self) -> None:
        """Have buffers for one more capture; not within one."""
        if len(self._spare) < NEW_LISTS:
            # Zeros: a graph that is replayed before its lists are written finds no tensors and does nothing. Aligned as
            # all other buffers are: for another alignment Triton would compile the kernels anew, within the capture.
            stride = -(-self._length // _ALIGNED) * _ALIGNED
            room = torch.zeros((NEW_LISTS, stride), dtype=torch.int64, device=self._device)
            self._spare = [row[: self._length] for row in room]

    def add(self, addresses: list[int], buffer: Tensor) -> None:
        """Keep a buffer that holds ``addresses`` and that a graph reads from now on."""
        self._known.append((addresses, buffer))

    def take(self, addresses: list[int]) -> Tensor:
        """A buffer that will hold ``addresses`` after the next `write`; nothing runs on the device.

        Raises:
            RuntimeError: all buffers are used up.
        """
        for known, buffer in self._known:
            if known == addresses:
                return buffer
        if not self._spare:
            raise RuntimeError(
                f"CUDA graphs captured since the last upload have more than {NEW_LISTS} lists of new addresses, one "
                "for each pass that makes gradients. Call push_scalars() between captures; within one, keep gradients "
                "in place (set_to_none=False; static_grads=True)."
            )
        buffer = self._spare.pop()
        self._known.append((addresses, buffer))
        self._unwritten.append((addresses, buffer))
        return buffer

    def write(self) -> None:
        """Write the lists that were taken in captures, without host sync; not within one."""
        for addresses, buffer in self._unwritten:
            buffer.copy_(pinned(torch.tensor(addresses, dtype=torch.int64), self._device), non_blocking=True)
        self._unwritten = []
        self.refill()

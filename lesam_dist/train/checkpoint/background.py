"""Writing beside the training: one thread, one job at a time, from a copy of the state in the host's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Staging:
    """Copies of tensors on the host, in memory that the next copy uses again; page-locked where they are on a GPU."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of these tensors at this point of the program, when this returns."""
        self._kept = {name: self._room(name, tensor) for name, tensor in tensors.items()}
        on_device = False
        for name, tensor in tensors.items():
            self._kept[name].copy_(tensor, non_blocking=tensor.is_cuda)
            on_device |= tensor.is_cuda
        if on_device:
            torch.cuda.current_stream().synchronize()
        return dict(self._kept)

    def _room(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            return kept
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class Background:
    """A function that runs in a thread of its own, until it is waited for. It holds up the interpreter's exit."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until it is done; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self._error = error

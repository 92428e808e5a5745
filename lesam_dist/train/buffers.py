"""What forwards change in a model beside gradients: its buffers, such as BatchNorm's running statistics."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


class ModelBuffers:
    """A model's buffers as they were before a step, to undo what the passes of a skipped step did to them.

    Nothing waits for the device. Saving copies the buffers once; `undo_if` copies them twice, and selects.

    Args:
        model: on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        by_kind: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for buffer in model.buffers():
            by_kind[buffer.device, buffer.dtype].append(buffer)
        self._kinds = list(by_kind.values())
        self._saved: list[Tensor] = []

    @torch.no_grad()
    def save(self) -> None:
        """Remember what they are now."""
        self._saved = [_joined(buffers) for buffers in self._kinds]

    @torch.no_grad()
    def undo_if(self, skipped: Tensor) -> None:
        """Give them back what `save` saw, bit for bit, where ``skipped`` (0-d) is not 0."""
        for buffers, saved in zip(self._kinds, self._saved, strict=True):
            chosen = torch.where(skipped.to(saved.device) != 0, saved, _joined(buffers))
            parts = chosen.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(parts, buffers, strict=True)])


def _joined(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in buffers])

"""Whether a CUDA graph is being captured: the one place of this package that asks."""

from __future__ import annotations

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is recorded in a CUDA graph now, instead of run.

    All code of this package asks here, so that tests can have captures where there is no GPU.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_new_state(device: torch.device, what: str) -> None:
    """Raise RuntimeError where memory that lasts from step to step is made in a capture: each replay would reset it."""
    if is_capturing(device):
        raise RuntimeError(
            f"{what} would be made while a CUDA graph is captured, and anew in every replay. Take a few steps with all "
            "gradients present before the capture."
        )

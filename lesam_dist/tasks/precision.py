"""In which dtype a run computes its forwards."""

from __future__ import annotations

import torch

from lesam_dist.config.schema import PrecisionConfig

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: PrecisionConfig) -> torch.dtype | None:
    """For `torch.autocast`; None computes in the weights' dtype."""
    return _AUTOCAST[precision.compute]

"""What a model's passes cost in floating-point operations, and what a device could do at best."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from lesam_dist.config.schema import Config, PrecisionConfig
from lesam_dist.models import build_model

# Dense TFLOP/s of bfloat16 and float16 with float32 sums, TF32, and float32 without tensor cores, by the words of the
# device's name. From NVIDIA's data sheets of A100 (2021), H100 (2023), H200 (2024) and HGX B200 (2025), whose numbers
# for tensor cores are with sparsity but for A100: half of them is dense.
_PEAKS: dict[tuple[str, ...], tuple[float, float, float]] = {  # the first whose words are all there
    ("A100",): (312, 156, 19.5),
    ("H100", "PCIe"): (756, 378, 51),
    ("H100", "NVL"): (835, 418, 60),
    ("H100",): (989, 495, 67),
    ("H200", "NVL"): (835, 418, 60),
    ("H200",): (989, 495, 67),
    ("B200",): (2250, 1125, 75),
}


@dataclass(frozen=True)
class Flops:
    """Of one image, a multiplication and an addition being two.

    Attributes:
        forward, backward: operations of the matrix products and convolutions; nothing is counted for what is computed
            again to save memory.
        peak: TFLOP/s of the device, None where that is not known.
    """

    forward: float
    backward: float
    peak: float | None = None

    def rates(self, flops: float, seconds: float) -> dict[str, float]:
        """``tflops_per_device`` and, where the peak is known, ``mfu`` of so many operations in so much time."""
        tflops = flops / seconds / 1e12
        return {"tflops_per_device": tflops} | ({} if self.peak is None else {"mfu": tflops / self.peak})


def flops_of(config: Config, num_classes: int, device: torch.device) -> Flops | None:
    """Of a run's model; None where nobody asks for them, or the model has no form without data.

    They take a second to count for a large model, and a CPU has no peak that is known: there they are counted only for
    ``logging.peak_tflops``. Where the images' size changes during the run there is no one number.
    """
    peak = config.logging.peak_tflops
    if config.schedule.image_size is not None or (peak is None and device.type == "cpu"):
        return None
    if peak is None:
        peak = peak_of(torch.cuda.get_device_name(device), config.precision)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(config.model.name, num_classes, image_size=config.data.image_size)
    try:
        return Flops(*count(model, config.data.image_size), peak)
    except NotImplementedError:
        return None


def peak_of(name: str, precision: PrecisionConfig) -> float | None:
    """Dense TFLOP/s of the device of this name in the number format of a run; None for an unknown one."""
    words = set(re.split(r"[\s-]+", name))
    for wanted, (half, tf32, single) in _PEAKS.items():
        if words.issuperset(wanted):
            return half if precision.compute != "fp32" else tf32 if precision.tf32 else single
    return None


def count(model: nn.Module, image_size: int) -> tuple[float, float]:
    """Operations of a forward and of a backward for one image.

    Args:
        model: on the meta device, where sizes alone go through it, in training mode.
        image_size: side of the image in pixels.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here: importing it takes a quarter of a second

    images = torch.empty(2, 3, image_size, image_size, device="meta")  # BatchNorm needs more than one value
    fixed = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False) as forward:
        logits = model(images)
    with FlopCounterMode(display=False, custom_mapping=fixed) as backward:
        logits.sum().backward()
    return forward.get_total_flops() / 2, backward.get_total_flops() / 2


def _convolution_backward(
    gradient: Sequence[int], images: Sequence[int], weight: Sequence[int], *rest: Any, **_: object
) -> int:
    """Of the shapes of `aten.convolution_backward`; torch 2.14's own takes grouped convolutions for dense ones.

    The gradients of input and weight, where they are asked for, multiply as often as the forward does: each output
    with the weights that it is made of.
    """
    transposed, wanted = rest[4], rest[7]
    outputs = images if transposed else gradient  # whichever a filter of ``weight`` slides over
    each: int = 2 * outputs[0] * prod(outputs[2:]) * prod(weight)
    return each * (bool(wanted[0]) + bool(wanted[1]))

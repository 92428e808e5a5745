"""The direction of a perturbation, shared by its norm (`sum_sq`) and its application (`perturb`).

    v = g - ema_scale*ema          T = p*|w| + q

`sum_sq` sums ``(T*v)^2``, `perturb` moves along ``T^2 * v``; what is not given is left out (T is then 1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesam_kernels.arguments import check_if_given
from lesam_kernels.tensor_table import TensorTable


@triton.jit
def load_direction(metric_ptr, ema_scale_ptr, group):
    """p, q, ema_scale of a param group; neutral values for what is None."""
    if metric_ptr is None:
        p, q = 0.0, 1.0
    else:
        p, q = tl.load(metric_ptr + 2 * group), tl.load(metric_ptr + 2 * group + 1)
    ema_scale = 0.0 if ema_scale_ptr is None else tl.load(ema_scale_ptr + group)
    return p, q, ema_scale


def check_direction(table: TensorTable, metric: Tensor | None, ema_scale: Tensor | None) -> None:
    """Check the optional arguments of `sum_sq` and `perturb`; `arguments.check_argument` says how."""
    check_if_given("metric", metric, torch.float32, (table.num_groups, 2), table.device)
    check_if_given("ema_scale", ema_scale, torch.float32, (table.num_groups,), table.device)

"""What both updates share: whether one is allowed, who tells of it, and the mixture of gradients that it steps with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesam_kernels.arguments import check_argument, check_if_given
from lesam_kernels.tensor_table import TensorTable


@triton.jit
def is_allowed(found_inf_ptr, sum_sq_ptr):
    """Whether found_inf is 0 and the gradient's sum of squares, where there is one, is finite."""
    allowed = tl.load(found_inf_ptr) == 0
    if sum_sq_ptr is not None:
        allowed = allowed & (tl.load(sum_sq_ptr) < float("inf"))
    return allowed


@triton.jit
def tell_skipped(allowed, found_inf_ptr, skipped_ptr):
    """Where the update is not allowed: found_inf <- 1 and skipped <- skipped + 1. For one program alone.

    Whether the others read found_inf before or after makes no difference: they see the same sum of squares.
    """
    if not allowed:
        tl.store(found_inf_ptr, 1.0)
        if skipped_ptr is not None:
            tl.store(skipped_ptr, tl.load(skipped_ptr) + 1.0)


@triton.jit
def times(number, factors_ptr, group):
    """A param group's number times its fp64 factor, where there is one."""
    return number if factors_ptr is None else (number * tl.load(factors_ptr + group)).to(number.dtype)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr", "sum_sq_ptr", "skipped_ptr"])
def _skip_kernel(found_inf_ptr, sum_sq_ptr, skipped_ptr):
    """What an update tells of a step that it leaves out, for a rank that holds no element."""
    tell_skipped(is_allowed(found_inf_ptr, sum_sq_ptr), found_inf_ptr, skipped_ptr)


def check_update(
    table: TensorTable,
    a_factors: Tensor | None,
    b_factors: Tensor | None,
    found_inf: Tensor,
    sum_sq: Tensor | None,
    skipped: Tensor | None,
) -> None:
    """Check the arguments that both updates take; `arguments.check_argument` says how."""
    check_argument("found_inf", found_inf, torch.float32, (), table.device)
    check_if_given("a_factors", a_factors, torch.float64, (table.num_groups,), table.device)
    check_if_given("b_factors", b_factors, torch.float64, (table.num_groups,), table.device)
    check_if_given("sum_sq", sum_sq, torch.float64, (), table.device)
    check_if_given("skipped", skipped, torch.float32, (), table.device)


def tell_without_rows(table: TensorTable, found_inf: Tensor, sum_sq: Tensor | None, skipped: Tensor | None) -> None:
    """Where the table is empty, and so no update runs: tell of a step that is left out."""
    if not table.segments:
        table.launch(_skip_kernel, 1, found_inf, sum_sq, skipped)

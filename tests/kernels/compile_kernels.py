"""Compile every kernel offline and print what came out as JSON: run by test_ptx.py in a process of its own.

Whether a kernel is interpreted is decided where it is decorated, so the test process cannot compile it.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lesam_kernels.dots import _dots_kernel
from lesam_kernels.launch_config import CHUNK, MAX_REGISTERS, NUM_WARPS, TRITON_DTYPES, block_of
from lesam_kernels.norm import _FINISH_BLOCK, _sum_sq_kernel
from lesam_kernels.perturb import _perturb_kernel, _stats_kernel
from lesam_kernels.restore import _restore_kernel
from lesam_kernels.restore_adamw import _STEPS_BLOCK, _restore_adamw_kernel
from lesam_kernels.restore_sgd import _restore_sgd_kernel

Spec = tuple[str, Any, dict[str, Any], set[str]]  # name, kernel, constexprs, arguments that are None

DOUBLES = {"sum_sq_ptr", "sum_ptr", "radius_ptr", "stats_ptr", "a_factors_ptr", "b_factors_ptr"}
INTS = {"blocks_ptr", "ticket_ptr"}
NO_METRIC, NO_EMA = {"metric_ptr", "w_ptrs"}, {"ema_scale_ptr", "ema_ptrs"}


def specs() -> Iterator[Spec]:
    """Kernels as the launchers launch them: with every option, and sums without them also over all dtypes at once."""
    yield "dots", _dots_kernel, over(*TRITON_DTYPES), set()
    yield "sum_sq", _sum_sq_kernel, over(*TRITON_DTYPES), NO_METRIC | NO_EMA
    yield "stats", _stats_kernel, {"RAISE": False}, set()
    for dtype, triton_dtype in TRITON_DTYPES.items():
        constants = {"DTYPE": triton_dtype, "CHUNK": CHUNK, "BLOCK": block_of(dtype), "WALK_BACK": True}
        perturb = {**constants, "RAISE": False}
        steps = {**constants, "STEPS_BLOCK": _STEPS_BLOCK}
        yield f"restore-{triton_dtype}", _restore_kernel, constants, set()
        yield f"perturb-{triton_dtype}", _perturb_kernel, perturb, NO_EMA | {"metric_ptr", "kept_ptrs"}
        yield f"perturb-kept-{triton_dtype}", _perturb_kernel, perturb, NO_EMA | {"metric_ptr"}
        yield f"perturb-metric-{triton_dtype}", _perturb_kernel, perturb, NO_EMA | {"kept_ptrs"}
        yield f"perturb-ema-{triton_dtype}", _perturb_kernel, perturb, {"metric_ptr", "kept_ptrs"}
        plain = {"g_kept_ptrs", "a_factors_ptr", "b_factors_ptr"}
        yield f"restore_sgd-{triton_dtype}", _restore_sgd_kernel, constants, plain
        yield f"restore_sgd-kept-{triton_dtype}", _restore_sgd_kernel, constants, set()
        yield (
            f"restore_sgd-plain-{triton_dtype}",
            _restore_sgd_kernel,
            constants,
            {*plain, "buf_ptrs"},
        )
        yield f"restore_adamw-{triton_dtype}", _restore_adamw_kernel, steps, plain
        yield f"restore_adamw-kept-{triton_dtype}", _restore_adamw_kernel, steps, set()
        yield f"dots-{triton_dtype}", _dots_kernel, over(dtype), set()
        yield f"sum_sq-{triton_dtype}", _sum_sq_kernel, over(dtype), NO_METRIC | NO_EMA
        yield f"sum_sq-metric-{triton_dtype}", _sum_sq_kernel, over(dtype), NO_EMA
        yield f"sum_sq-ema-{triton_dtype}", _sum_sq_kernel, over(dtype), NO_METRIC


def over(*dtypes: torch.dtype) -> dict[str, Any]:
    """Constants of a launch that reads segments of these dtypes."""
    types = tuple((TRITON_DTYPES[dtype], block_of(dtype)) for dtype in dtypes)
    return {"TYPES": types, "CHUNK": CHUNK, "FINISH_BLOCK": _FINISH_BLOCK}


def type_of(argument: str, kernel: Any) -> str:
    if argument in DOUBLES or (argument == "scalars_ptr" and kernel is _restore_adamw_kernel):
        return "*fp64"
    if argument.endswith("_ptrs") or argument == "rows_ptr":
        return "*i64"
    if argument in INTS:
        return "*i32"
    return "*fp32" if argument.endswith("_ptr") else "i32"


def compile_one(kernel: Any, constants: dict[str, Any], absent: set[str], arch: int) -> dict[str, Any]:
    constants = {**constants, **dict.fromkeys(absent)}
    signature = {a: "constexpr" if a in constants else type_of(a, kernel) for a in kernel.arg_names}
    options = {"num_warps": NUM_WARPS}
    if kernel is _restore_adamw_kernel:
        options["maxnreg"] = MAX_REGISTERS
    assembler = io.StringIO()
    with contextlib.redirect_stdout(assembler):
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    accesses = re.findall(r"\b(ld|st)\.global[\w.:]*?((?:\.v\d)?\.[bfus]\d+)\b", ptx)
    return {
        "ptx": ptx,
        "shared": compiled.metadata.shared,
        "global": [operation + width for operation, width in accesses],
        **resource_use(assembler.getvalue()),
    }


def resource_use(report: str) -> dict[str, int]:
    """What ptxas said of the kernel."""
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "stack": r"(\d+) bytes stack frame",
    }
    return {name: max(int(n) for n in re.findall(pattern, report)) for name, pattern in patterns.items()}


if __name__ == "__main__":
    triton.knobs.nvidia.dump_ptxas_log = True
    json.dump(
        {f"{name}-sm{arch}": compile_one(*spec, int(arch)) for arch in sys.argv[1:] for name, *spec in specs()},
        sys.stdout,
    )

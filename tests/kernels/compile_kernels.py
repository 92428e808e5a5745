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

from lesam_kernels.dots import _dots_kernel, types_of
from lesam_kernels.launch_config import CHUNK, MAX_REGISTERS, NUM_WARPS, TRITON_DTYPES, launch_config
from lesam_kernels.norm import _FINISH_BLOCK, _sum_sq_kernel
from lesam_kernels.perturb import _perturb_kernel, _stats_kernel
from lesam_kernels.restore import _restore_kernel
from lesam_kernels.restore_adamw import _STEPS_BLOCK, _restore_adamw_kernel
from lesam_kernels.restore_sgd import _restore_sgd_kernel

Pair = tuple[torch.dtype, torch.dtype]
Spec = tuple[str, Any, dict[str, Any], set[str]]  # name, kernel, constexprs, arguments that are None

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
COMMON: tuple[Pair, ...] = ((F32, F32), (BF16, BF16), (F32, BF16))
ALL: tuple[Pair, ...] = (*COMMON, (BF16, F32), (F16, F16), (F16, F32), (F16, BF16))

DOUBLES = {"sum_sq_ptr", "sum_ptr", "radius_ptr", "stats_ptr"}
INTS = {"blocks_ptr", "ticket_ptr"}
NO_METRIC, NO_EMA = {"metric_ptr", "w_ptrs"}, {"ema_scale_ptr", "ema_ptrs"}


def name_of(dtype: torch.dtype) -> str:
    return str(TRITON_DTYPES[dtype])


def specs() -> Iterator[Spec]:
    """Kernels as the launchers launch them: for every pair of dtypes that is used, with options for the common ones."""
    yield sum_sq_spec("", ALL, NO_METRIC | NO_EMA | {"inv_scale_ptr"})
    types = tuple(types_of(g) for _, g in ALL)
    yield "dots", _dots_kernel, {"TYPES": types, "CHUNK": CHUNK, "FINISH_BLOCK": _FINISH_BLOCK}, set()
    yield "stats", _stats_kernel, {}, set()
    for dtype in (F32, BF16, F16):
        constants = {"DTYPE": TRITON_DTYPES[dtype], "CHUNK": CHUNK, "BLOCK": launch_config(dtype).block}
        yield f"restore-{name_of(dtype)}", _restore_kernel, constants, set()
    for pair in ALL:
        name, constants = f"{name_of(pair[0])}-{name_of(pair[1])}", elementwise(pair)
        steps = {**constants, "STEPS_BLOCK": _STEPS_BLOCK}
        yield f"perturb-{name}", _perturb_kernel, constants, NO_EMA | {"metric_ptr", "inv_scale_ptr"}
        yield f"restore_sgd-{name}", _restore_sgd_kernel, constants, {"g_kept_ptrs"}
        yield f"restore_adamw-{name}", _restore_adamw_kernel, steps, {"g_kept_ptrs"}
    for pair in COMMON:
        name, constants = f"{name_of(pair[0])}-{name_of(pair[1])}", elementwise(pair)
        steps = {**constants, "STEPS_BLOCK": _STEPS_BLOCK}
        yield sum_sq_spec(f"-metric-{name}", [pair], NO_EMA)
        yield sum_sq_spec(f"-ema-{name}", [pair], NO_METRIC)
        yield f"perturb-metric-{name}", _perturb_kernel, constants, NO_EMA
        yield f"perturb-ema-{name}", _perturb_kernel, constants, {"metric_ptr"}
        yield f"restore_sgd-kept-{name}", _restore_sgd_kernel, constants, set()
        yield f"restore_adamw-kept-{name}", _restore_adamw_kernel, steps, set()
    yield "restore_sgd-plain", _restore_sgd_kernel, elementwise(COMMON[0]), {"g_kept_ptrs", "buf_ptrs"}


def sum_sq_spec(name: str, pairs: Any, absent: set[str]) -> Spec:
    types = tuple((TRITON_DTYPES[w], TRITON_DTYPES[g], launch_config(w, g, vectors=2).block) for w, g in pairs)
    constants = {"TYPES": types, "CHUNK": CHUNK, "FINISH_BLOCK": _FINISH_BLOCK}
    return f"sum_sq{name}", _sum_sq_kernel, constants, absent


def elementwise(pair: Pair) -> dict[str, Any]:
    w, g = pair
    block = launch_config(w, g).block
    return {"W_DTYPE": TRITON_DTYPES[w], "G_DTYPE": TRITON_DTYPES[g], "CHUNK": CHUNK, "BLOCK": block}


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

"""Compile every kernel offline and print what came out as JSON: run by test_ptx.py in a process of its own.

Whether a kernel is interpreted is decided where it is decorated, so the test process cannot compile it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lesam_kernels.launch_config import CHUNK, TRITON_DTYPES, launch_config
from lesam_kernels.norm import _FINISH_BLOCK, _finish_sum_sq_kernel, _sum_sq_kernel
from lesam_kernels.perturb import _perturb_kernel, _stats_kernel
from lesam_kernels.restore import _restore_kernel

FP32, BF16 = torch.float32, torch.bfloat16
TABLE = {"numels": "*i64", "block_tensor": "*i32", "block_chunk": "*i32"}


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Name -> kernel, types of its runtime arguments, constexprs, warps; as the launchers launch it."""
    found = {
        "sum_sq": (
            _sum_sq_kernel,
            {"g_ptrs": "*i64", "dtype_codes": "*i32", "partials_ptr": "*fp32", **TABLE},
            {"CHUNK": CHUNK, "BLOCK_32": launch_config(FP32).block, "BLOCK_16": launch_config(BF16).block},
            launch_config(FP32).num_warps,
        ),
        "finish_sum_sq": (
            _finish_sum_sq_kernel,
            {"partials_ptr": "*fp32", "sum_sq_ptr": "*fp64", "num_blocks": "i32"},
            {"BLOCK": _FINISH_BLOCK},
            4,
        ),
        "stats": (_stats_kernel, dict.fromkeys(("sum_sq_ptr", "radius_ptr", "stats_ptr"), "*fp64"), {}, 4),
    }
    for w, g in ((FP32, FP32), (BF16, BF16), (FP32, BF16)):
        config = launch_config(w, g)
        constants = {"W_DTYPE": TRITON_DTYPES[w], "G_DTYPE": TRITON_DTYPES[g], "CHUNK": CHUNK}
        scalars = dict.fromkeys(("sum_sq_ptr", "radius_ptr", "stats_ptr"), "*fp64")
        found[f"perturb-{constants['W_DTYPE']}-{constants['G_DTYPE']}"] = (
            _perturb_kernel,
            {"w_g_copy_ptrs": "*i64", "first_block": "i32", **scalars, **TABLE},
            {**constants, "BLOCK": config.block},
            config.num_warps,
        )
    for dtype in (FP32, BF16):
        config = launch_config(dtype)
        found[f"restore-{TRITON_DTYPES[dtype]}"] = (
            _restore_kernel,
            {"w_copy_ptrs": "*i64", "first_block": "i32", **TABLE},
            {"DTYPE": TRITON_DTYPES[dtype], "CHUNK": CHUNK, "BLOCK": config.block},
            config.num_warps,
        )
    return found


def compile_one(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int, capability: int
) -> dict[str, Any]:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    ptx = compiled.asm["ptx"]
    accesses = re.findall(r"\b(ld|st)\.global[\w.:]*?((?:\.v\d)?\.[bfus]\d+)\b", ptx)
    return {
        "ptx": ptx,
        "shared": compiled.metadata.shared,
        "global": [operation + width for operation, width in accesses],
        **resource_use(ptx, capability),
    }


def resource_use(ptx: str, capability: int) -> dict[str, int]:
    ptxas = triton.knobs.nvidia.ptxas.path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        arch = f"sm_{capability}a" if f"sm_{capability}a" in ptx else f"sm_{capability}"
        command = [ptxas, "-v", f"-arch={arch}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "stack": r"(\d+) bytes stack frame",
    }
    return {name: max(int(n) for n in re.findall(pattern, report)) for name, pattern in patterns.items()}


if __name__ == "__main__":
    capabilities = [int(argument) for argument in sys.argv[1:]]
    json.dump(
        {f"{name}-sm{c}": compile_one(*spec, c) for name, spec in kernels().items() for c in capabilities},
        sys.stdout,
    )

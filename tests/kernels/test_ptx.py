"""What the compiler makes of the kernels, with no GPU: vector width, shared memory, registers, spills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

ROOT = Path(__file__).parents[2]
ARCHS = ("sm80", "sm90")
ELEMENTWISE = ("perturb-fp32-fp32", "perturb-bf16-bf16", "perturb-fp32-bf16", "restore-fp32", "restore-bf16")
KERNELS = ("sum_sq", "finish_sum_sq", "stats", *ELEMENTWISE)
MAX_REGISTERS = 64  # 256 threads of this many still fill half of an SM

ALL = pytest.mark.parametrize("name", [f"{kernel}-{arch}" for kernel in KERNELS for arch in ARCHS])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    try:
        triton.knobs.nvidia.ptxas  # noqa: B018 (raises where the binary is missing)
    except RuntimeError as error:
        pytest.skip(f"Triton compiles with ptxas: {error}")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), env.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), *(arch.removeprefix("sm") for arch in ARCHS)]
    finished = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    report: dict[str, dict[str, Any]] = json.loads(finished.stdout)
    return report


@ALL
def test_registers_and_spills(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    use = {key: value for key, value in compiled[name].items() if key != "ptx"}
    assert use["registers"] <= MAX_REGISTERS
    assert (use["spill_stores"], use["spill_loads"], use["stack"]) == (0, 0, 0)
    assert not re.search(r"\b(ld|st)\.local|\.local\b", compiled[name]["ptx"])


@pytest.mark.parametrize("arch", ARCHS)
def test_sum_sq_reads_16_bytes(arch: str, compiled: dict[str, dict[str, Any]]) -> None:
    """One vector load in each of the three dtypes' loops."""
    assert compiled[f"sum_sq-{arch}"]["global"].count("ld.v4.b32") >= 3


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ELEMENTWISE)
def test_elementwise_kernels_move_16_bytes(kernel: str, arch: str, compiled: dict[str, dict[str, Any]]) -> None:
    """perturb reads w and g, writes w and the copy; and has a copy alone for rho = 0, as restore is."""
    accesses = compiled[f"{kernel}-{arch}"]["global"]
    mixed = kernel == "perturb-fp32-bf16"
    perturbs = kernel.startswith("perturb")
    assert accesses.count("ld.v4.b32") >= (3 if perturbs else 1) - mixed
    assert accesses.count("ld.v2.b32") >= mixed  # 4 bf16 next to 4 fp32
    assert accesses.count("st.v4.b32") >= (3 if perturbs else 1)


@ALL
def test_no_layout_conversion(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    """Shared memory serves the reductions alone, with one value per warp."""
    assert compiled[name]["shared"] <= (64 if "sum_sq" in name else 0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["sum_sq", *ELEMENTWISE])
def test_unaligned_tensors_have_narrow_accesses(kernel: str, arch: str, compiled: dict[str, dict[str, Any]]) -> None:
    """An alignment promise that leaked into the second loop would leave no access of a single element."""
    narrow = {"ld.b32", "ld.b16"} if kernel == "sum_sq" else {"ld.b16" if "bf16" in kernel else "ld.b32"}
    assert narrow <= set(compiled[f"{kernel}-{arch}"]["global"])


@pytest.mark.parametrize("arch", ARCHS)
def test_arithmetic(arch: str, compiled: dict[str, dict[str, Any]]) -> None:
    """rho is rounded correctly in float64, w is one fma, and bfloat16 is rounded to nearest even."""
    ptx = compiled[f"perturb-bf16-bf16-{arch}"]["ptx"]
    for instruction in ("sqrt.rn.f64", "div.rn.f64", "fma.rn.f32", "cvt.rn.bf16"):
        assert instruction in ptx
    assert "approx" not in ptx
    assert not re.search(r"\b(mul|add)(\.\w+)*\.f32", ptx)


@ALL
def test_no_float_atomics(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert not re.search(r"\b(atom|red)\.", compiled[name]["ptx"])

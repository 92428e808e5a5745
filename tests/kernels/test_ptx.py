"""What the compiler makes of the kernels, with no GPU: vector width, shared memory, registers, spills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import triton

ROOT = Path(__file__).parents[2]
ARCHS = (80, 90, 100)
COMMON = ("fp32-fp32", "bf16-bf16", "fp32-bf16")
PAIRS = (*COMMON, "bf16-fp32", "fp16-fp16", "fp16-fp32", "fp16-bf16")
ELEMENTWISE = (
    *(f"{kernel}-{pair}" for kernel in ("perturb", "restore_sgd", "restore_adamw") for pair in PAIRS),
    *(f"{kernel}-{pair}" for kernel in ("perturb-metric", "perturb-ema") for pair in COMMON),
    *(f"{kernel}-kept-{pair}" for kernel in ("restore_sgd", "restore_adamw") for pair in COMMON),
)
SUMS = ("sum_sq", "dots", *(f"sum_sq-{option}-{pair}" for option in ("metric", "ema") for pair in COMMON))
RESTORES = ("restore-fp32", "restore-bf16", "restore-fp16")
KERNELS = (*SUMS, "stats", *RESTORES, "restore_sgd-plain", *ELEMENTWISE)
MAX_REGISTERS = 64  # 256 threads of this many still fill half of an SM

Report = dict[str, dict[str, Any]]
EACH_ARCH = pytest.mark.parametrize("arch", ARCHS, ids="sm{}".format)


def run_offline(script: str, cache: Path, *arguments: str) -> Any:
    """The JSON that a script of this folder prints, run where kernels are compiled and not interpreted."""
    try:
        for tool in ("ptxas", "ptxas_blackwell"):  # the latter from sm_100 on
            getattr(triton.knobs.nvidia, tool)
    except RuntimeError as error:
        pytest.skip(f"Triton compiles with ptxas: {error}")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    finished = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Report:
    report: Report = run_offline("compile_kernels.py", tmp_path_factory.mktemp("triton"), *map(str, ARCHS))
    return report


def test_launchers_compile_once(tmp_path: Path) -> None:
    """Seven kernels, perturb twice: not again for other values, other alignments of scalars, other lists."""
    counts = run_offline("launch_offline.py", tmp_path)
    assert counts == [7] * 9


def test_every_kernel_is_checked(compiled: Report) -> None:
    assert set(compiled) == {f"{kernel}-sm{arch}" for kernel in KERNELS for arch in ARCHS}


@EACH_ARCH
@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_and_spills(kernel: str, arch: int, compiled: Report) -> None:
    use = compiled[f"{kernel}-sm{arch}"]
    assert use["registers"] <= MAX_REGISTERS
    assert (use["spill_stores"], use["spill_loads"], use["stack"]) == (0, 0, 0)
    assert not re.search(r"\b(ld|st)\.local|\.local\b", use["ptx"])


@EACH_ARCH
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_layout_conversion(kernel: str, arch: int, compiled: Report) -> None:
    """Shared memory serves reductions, with a value per warp, and the ticket."""
    limit = 64 if kernel in SUMS else 4 if "adamw" in kernel else 0
    assert compiled[f"{kernel}-sm{arch}"]["shared"] <= limit


def expected_accesses(kernel: str) -> Counter[str]:
    """Vector accesses: of all tensors where all are aligned, of all but gradients where those are not, and a copy."""
    name, *options, w, g = kernel.split("-")
    read, written = {"perturb": (1, 2), "restore_sgd": (2, 2), "restore_adamw": (3, 3)}[name]
    # 4 elements of each per thread where one is fp32: 8 bytes of the other.
    width = {dtype: "v2.b32" if "fp32" in (w, g) and dtype != "fp32" else "v4.b32" for dtype in (w, g)}
    counts: Counter[str] = Counter()
    counts[f"ld.{width[w]}"] += 2 * read + 1
    counts[f"st.{width[w]}"] += 2 * written + 1
    counts[f"ld.{width[g]}"] += 2 if options in (["ema"], ["kept"]) else 1
    return counts


def vector_accesses(report: Report, name: str) -> Counter[str]:
    return Counter(access for access in report[name]["global"] if ".v" in access)


@EACH_ARCH
@pytest.mark.parametrize("kernel", ELEMENTWISE)
def test_elementwise_kernels_move_16_bytes(kernel: str, arch: int, compiled: Report) -> None:
    assert vector_accesses(compiled, f"{kernel}-sm{arch}") == expected_accesses(kernel)


@EACH_ARCH
def test_a_restore_moves_16_bytes(arch: int, compiled: Report) -> None:
    once = Counter({"ld.v4.b32": 1, "st.v4.b32": 1})
    for kernel in RESTORES:
        assert vector_accesses(compiled, f"{kernel}-sm{arch}") == once
    assert vector_accesses(compiled, f"restore_sgd-plain-sm{arch}") == Counter({"ld.v4.b32": 4, "st.v4.b32": 3})


@EACH_ARCH
def test_sums_read_16_bytes(arch: int, compiled: Report) -> None:
    """32 bytes of the widest dtype per thread and iteration; one loop for each pair of dtypes."""
    of_g = {pair: 1 if pair == "fp32-bf16" else 2 for pair in PAIRS}
    expected = {"sum_sq": sum(of_g.values()), "dots": 2 * len(PAIRS)}
    for pair in COMMON:
        expected[f"sum_sq-metric-{pair}"] = of_g[pair] + 2
        expected[f"sum_sq-ema-{pair}"] = 2 * of_g[pair]
    for kernel, count in expected.items():
        assert vector_accesses(compiled, f"{kernel}-sm{arch}") == Counter({"ld.v4.b32": count})


@EACH_ARCH
@pytest.mark.parametrize("kernel", [*SUMS, *RESTORES, *ELEMENTWISE])
def test_unaligned_tensors_have_narrow_accesses(kernel: str, arch: int, compiled: Report) -> None:
    """An alignment promise that leaked into another span would leave no access of a single element."""
    dtypes = ("fp32", "bf16") if kernel in ("sum_sq", "dots") else kernel.split("-")[1:]
    narrow = {"fp32": "ld.b32", "bf16": "ld.b16", "fp16": "ld.b16"}
    expected = {narrow[dtype] for dtype in dtypes if dtype in narrow}
    if kernel.startswith("sum_sq-ema"):
        expected = {narrow[kernel.split("-")[-1]]}  # w is not read
    assert expected <= set(compiled[f"{kernel}-sm{arch}"]["global"])


@EACH_ARCH
@pytest.mark.parametrize("kernel", ["perturb-bf16-bf16", "restore_sgd-bf16-bf16", "restore_adamw-bf16-bf16"])
def test_arithmetic(kernel: str, arch: int, compiled: Report) -> None:
    """Rounded correctly: bfloat16 to nearest even, nothing approximate, products fused where written so."""
    ptx = compiled[f"{kernel}-sm{arch}"]["ptx"]
    wanted = {
        "perturb": ("sqrt.rn.f64", "div.rn.f64"),
        "restore_sgd": (),
        "restore_adamw": ("sqrt.rn.f64", "div.rn.f64", "sqrt.rn.f32", "div.rn.f32"),
    }[kernel.split("-")[0]]
    for instruction in (*wanted, "fma.rn.f32", "cvt.rn.bf16"):
        assert instruction in ptx
    assert not re.search(r"\.(approx|full|ftz)\b", ptx)
    if kernel.startswith("perturb"):
        assert not re.search(r"\b(mul|add)(\.\w+)*\.f32", ptx)


@EACH_ARCH
@pytest.mark.parametrize("kernel", KERNELS)
def test_atomics_count_programs_alone(kernel: str, arch: int, compiled: Report) -> None:
    """One integer ticket, taken with release and acquire, and what others wrote is read from the shared cache."""
    ptx = compiled[f"{kernel}-sm{arch}"]["ptx"]
    atomics = re.findall(r"\b(?:atom|red)\.[\w.]+", ptx)
    has_ticket = kernel in SUMS or "adamw" in kernel
    assert atomics == ["atom.global.gpu.acq_rel.add.u32"] * has_ticket
    if kernel in SUMS:
        assert "ld.global.cg" in ptx

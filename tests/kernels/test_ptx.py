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
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DTYPES = ("fp32", "bf16", "fp16")
# Vector accesses by dtype: of tensors that are loaded and stored. Twice of each, where all are aligned and where all
# but gradients are; once of a gradient, where it is aligned; and a copy.
ACCESSES = {
    "restore": (1, 1),
    "perturb": (2 * 1 + 1 + 1, 2 * 2 + 1),
    "perturb-kept": (2 * 1 + 1 + 2, 2 * 3 + 2),
    "perturb-metric": (2 * 1 + 1 + 1, 2 * 2 + 1),
    "perturb-ema": (2 * 1 + 2 + 1, 2 * 2 + 1),
    "restore_sgd": (2 * 2 + 1 + 1, 2 * 2 + 1),
    "restore_sgd-kept": (2 * 2 + 2 + 1, 2 * 2 + 1),
    "restore_sgd-plain": (2 * 1 + 1 + 1, 2 * 1 + 1),
    "restore_adamw": (2 * 3 + 1 + 1, 2 * 3 + 1),
    "restore_adamw-kept": (2 * 3 + 2 + 1, 2 * 3 + 1),
}
ELEMENTWISE = tuple(f"{kernel}-{dtype}" for kernel in ACCESSES for dtype in DTYPES)
# Tensors that a sum reads, and 16-byte loads of each per thread and iteration.
READS = {"sum_sq": (1, 2), "sum_sq-metric": (2, 2), "sum_sq-ema": (2, 2), "dots": (2, 1)}
SUMS = ("sum_sq", "dots", *(f"{kernel}-{dtype}" for kernel in READS for dtype in DTYPES))
KERNELS = (*SUMS, "stats", *ELEMENTWISE)
MAX_REGISTERS = 64  # 256 threads of this many still fill half of an SM

Report = dict[str, dict[str, Any]]
# Compiled once each, and only where a test of this architecture is run.
EACH_ARCH = pytest.mark.parametrize(
    "arch",
    [pytest.param(80, marks=pytest.mark.full), 90, pytest.param(100, marks=pytest.mark.full)],
    ids="sm{}".format,
    scope="module",
)


def run_offline(script: str, cache: Path, *arguments: str) -> Any:
    """The JSON that a script of this folder prints, run where kernels are compiled and not interpreted."""
    try:
        for tool in ("ptxas", "ptxas_blackwell"):  # the latter from sm_100 on
            getattr(triton.knobs.nvidia, tool, None)  # Triton 3.5 has one for all
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
def compiled(arch: int, tmp_path_factory: pytest.TempPathFactory) -> Report:
    report: Report = run_offline("compile_kernels.py", tmp_path_factory.mktemp("triton"), str(arch))
    return report


def test_launchers_compile_once(tmp_path: Path) -> None:
    """Seven kernels, perturb twice: not again for other values, other alignments of scalars, other lists."""
    counts = run_offline("launch_offline.py", tmp_path)
    assert counts == [7] * 9


@EACH_ARCH
def test_every_kernel_is_checked(arch: int, compiled: Report) -> None:
    assert set(compiled) == {f"{kernel}-sm{arch}" for kernel in KERNELS}


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


def split(kernel: str) -> tuple[str, tuple[str, ...]]:
    """The name without the dtype, and the dtypes."""
    name, _, dtype = kernel.rpartition("-")
    return (name, (dtype,)) if dtype in DTYPES else (kernel, DTYPES)


def vector_accesses(report: Report, name: str) -> Counter[str]:
    return Counter(access for access in report[name]["global"] if ".v" in access)


@EACH_ARCH
@pytest.mark.parametrize("kernel", ELEMENTWISE)
def test_elementwise_kernels_move_16_bytes(kernel: str, arch: int, compiled: Report) -> None:
    loads, stores = ACCESSES[split(kernel)[0]]
    assert vector_accesses(compiled, f"{kernel}-sm{arch}") == Counter({"ld.v4.b32": loads, "st.v4.b32": stores})


@EACH_ARCH
@pytest.mark.parametrize("kernel", SUMS)
def test_sums_read_16_bytes(kernel: str, arch: int, compiled: Report) -> None:
    """In one loop for each dtype."""
    name, dtypes = split(kernel)
    tensors, vectors = READS[name]
    assert vector_accesses(compiled, f"{kernel}-sm{arch}") == Counter({"ld.v4.b32": tensors * vectors * len(dtypes)})


@EACH_ARCH
@pytest.mark.parametrize("kernel", [*SUMS, *ELEMENTWISE])
def test_unaligned_tensors_have_narrow_accesses(kernel: str, arch: int, compiled: Report) -> None:
    """An alignment promise that leaked into another span would leave no access of a single element."""
    narrow = {"fp32": "ld.b32", "bf16": "ld.b16", "fp16": "ld.b16"}
    expected = {narrow[dtype] for dtype in split(kernel)[1]}
    assert expected <= set(compiled[f"{kernel}-sm{arch}"]["global"])


@EACH_ARCH
@pytest.mark.parametrize("kernel", ["perturb-bf16", "restore_sgd-bf16", "restore_adamw-bf16"])
def test_arithmetic(kernel: str, arch: int, compiled: Report) -> None:
    """Rounded correctly: bfloat16 to nearest even, nothing approximate, products fused where written so."""
    ptx = compiled[f"{kernel}-sm{arch}"]["ptx"]
    if Version(triton.__version__) < Version("3.6"):  # takes subnormals for 0 in these two: kernels/README.md
        ptx = ptx.replace("sqrt.rn.ftz.f32", "sqrt.rn.f32").replace("div.rn.ftz.f32", "div.rn.f32")
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

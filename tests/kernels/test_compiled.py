"""What every Triton makes of the kernels, with no GPU: vector width, registers, spills, shared memory, arithmetic.

`make test` asks the installed one, for sm_90. Where what is compiled has changed since kernels/README.md's table was
written, `make test-all` asks all versions that pyproject.toml admits, for sm_80, sm_90 and sm_100. compile_kernels.py
says how.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
from packaging.version import Version

from tests.kernels.compile_kernels import (
    ARCHS,
    INSTALLED,
    ROOT,
    VERSIONS,
    Kernel,
    Report,
    UnavailableError,
    compile_with,
    in_readme,
    is_current,
    table,
)

MAX_REGISTERS = 64  # 256 threads of this many still fill half of an SM
SUMS = ("sum_sq", "dots")
TICKETS = (*SUMS, "restore_adamw")  # the last program finds itself
NARROW = {"fp32": "b32", "bf16": "b16", "fp16": "b16"}


class Moves(NamedTuple):
    """Arguments that an elementwise kernel loads and stores, of which those that it lacks count nothing.

    Each is accessed in two loops that use vectors: where all is aligned, and where all but the gradients are.
    """

    loads: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()  # vectors in the first of the loops alone
    stores: tuple[str, ...] = ()
    copies: tuple[str, ...] = ("w_ptrs",)  # written in a loop of their own, where nothing is computed


MOVES = {
    "restore": Moves(),
    "perturb": Moves(
        ("w_ptrs",), ("g_ptrs", "ema_ptrs"), ("copy_ptrs", "w_ptrs", "kept_ptrs"), ("copy_ptrs", "kept_ptrs")
    ),
    "restore_sgd": Moves(("copy_ptrs", "buf_ptrs"), ("g_hat_ptrs", "g_kept_ptrs"), ("w_ptrs", "buf_ptrs")),
    "restore_adamw": Moves(
        ("copy_ptrs", "m_ptrs", "v_ptrs"), ("g_hat_ptrs", "g_kept_ptrs"), ("w_ptrs", "m_ptrs", "v_ptrs")
    ),
}
OPTIONAL = {"ema_ptrs", "kept_ptrs", "buf_ptrs", "g_kept_ptrs"}


@cache
def reports_of(triton: str, archs: tuple[int, ...]) -> dict[int, Report]:
    try:
        return compile_with(triton, archs)
    except UnavailableError as error:
        if error.has_wheel and os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


def minor(triton: str) -> tuple[int, int]:
    return Version(triton).major, Version(triton).minor


# The installed version stands for the one of its minor.
TESTED = tuple(INSTALLED if minor(INSTALLED) == minor(known) else known for known in VERSIONS)
QUICK = (INSTALLED, 90)


def targets() -> Iterator[object]:
    for triton in TESTED:
        for arch in ARCHS:
            marks = () if (triton, arch) == QUICK else (pytest.mark.full,)
            yield pytest.param((triton, arch), marks=marks, id=f"triton-{triton}-sm_{arch}")


@pytest.fixture(scope="module", params=targets())
def report(request: pytest.FixtureRequest) -> Report:
    triton, arch = request.param
    if request.param != QUICK and triton in VERSIONS and is_current():
        pytest.skip("kernels/README.md has what this version made of the same sources")
    archs = tuple(a for a in ARCHS if ((triton, a) == QUICK) == (request.param == QUICK))
    return reports_of(triton, archs)[arch]


def given(kernel: Kernel, arguments: tuple[str, ...]) -> int:
    """How many of the arguments the kernel has."""
    return sum(argument not in OPTIONAL or argument in kernel.options for argument in arguments)


def test_every_minor_version_is_known() -> None:
    """A Triton that pyproject.toml admits and that nobody has compiled with would fail in a user's first step."""
    bound = re.search(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert bound is not None
    assert minor(bound[1]) == minor(VERSIONS[0])
    assert minor(INSTALLED) in map(minor, VERSIONS), f"add Triton {INSTALLED} to compile_kernels.VERSIONS"


def test_every_kernel_is_compiled_once(report: Report) -> None:
    """By its launcher, and not again for other values, other alignments of scalars, other lists."""
    assert report.never_launched == []
    assert report.compiled_again == []


def test_resources(report: Report) -> None:
    """Half of a multiprocessor's threads find room; nothing is spilled; shared memory serves reductions alone."""
    shared = {"sum_sq": 64, "dots": 64, "restore_adamw": 4}  # a value per warp, and the ticket
    for kernel in report.kernels:
        assert kernel.registers <= MAX_REGISTERS, kernel
        assert (kernel.local, kernel.sass_count("LDL"), kernel.sass_count("STL")) == (0, 0, 0), kernel
        assert kernel.shared <= shared.get(kernel.kernel, 0), kernel
        assert kernel.kernel in TICKETS or not kernel.sass_count("BAR"), kernel


def test_elementwise_kernels_move_16_bytes(report: Report) -> None:
    """In PTX as often as their source says, and in machine code at least so: loops are unrolled."""
    elementwise = [kernel for kernel in report.kernels if kernel.kernel in MOVES]
    assert {kernel.kernel for kernel in elementwise} == set(MOVES)
    for kernel in elementwise:
        moves = MOVES[kernel.kernel]
        copies = given(kernel, moves.copies)
        loads = 2 * given(kernel, moves.loads) + given(kernel, moves.grads) + copies
        stores = 2 * given(kernel, moves.stores) + copies
        assert (kernel.ptx_count("ld.global", "v4.b32"), kernel.ptx_count("st.global", "v4.b32")) == (loads, stores), (
            kernel
        )
        assert kernel.sass_count("LDG", ".128") >= loads, kernel
        assert kernel.sass_count("STG", ".128") >= stores, kernel


def test_sums_read_16_bytes(report: Report) -> None:
    """In one loop for each dtype; two vectors of the only tensor, one of each where there are more."""
    for kernel in report.kernels:
        if kernel.kernel not in SUMS:
            continue
        tensors = 2 if kernel.kernel == "dots" else 1 + ("w_ptrs" in kernel.options) + ("ema_ptrs" in kernel.options)
        loads = max(tensors, 2) * len(kernel.dtypes)
        assert (kernel.ptx_count("ld.global", "v4.b32"), kernel.ptx_count("st.global", "v4.b32")) == (loads, 0), kernel
        assert kernel.sass_count("LDG", ".128") >= loads, kernel


def test_unaligned_tensors_have_narrow_accesses(report: Report) -> None:
    """An alignment promise that leaked into another span would leave no access of a single element."""
    for kernel in report.kernels:
        for dtype in kernel.dtypes:
            assert kernel.ptx_count("ld.global", f".{NARROW[dtype]}") > kernel.ptx_count("ld.global", "v4.b32"), kernel


def test_arithmetic(report: Report) -> None:
    """Rounded correctly: bfloat16 to nearest even, nothing approximate, products fused where written so."""
    wanted = {
        "perturb": ("sqrt.rn.f64", "div.rn.f64"),
        "restore_sgd": (),
        "restore_adamw": ("sqrt.rn.f64", "div.rn.f64", "sqrt.rn.f32", "div.rn.f32"),
    }
    # Triton 3.5 takes subnormals for 0 in these two: kernels/README.md.
    flushing = {"sqrt.rn.ftz.f32", "div.rn.ftz.f32"} if minor(report.triton) < (3, 6) else set()
    for kernel in report.kernels:
        inexact = {opcode for opcode in kernel.ptx if re.search(r"\.(approx|full|ftz)\b", opcode)}
        assert inexact <= flushing, kernel
        opcodes = {opcode.replace(".ftz", "") if opcode in flushing else opcode for opcode in kernel.ptx}
        if kernel.kernel in wanted:
            rounding = ("cvt.rn.bf16",) if "bf16" in kernel.dtypes else ()
            for instruction in (*wanted[kernel.kernel], "fma.rn.f32", *rounding):
                assert any(opcode.startswith(instruction) for opcode in opcodes), (kernel, instruction)
        if kernel.kernel == "perturb" and not {"metric_ptr", "ema_ptrs"} & {*kernel.options}:
            assert not [opcode for opcode in opcodes if re.match(r"(mul|add)\b.*\.f32$", opcode)], kernel


def test_atomics_count_programs_alone(report: Report) -> None:
    """One integer ticket, taken with release and acquire, and what others wrote is read from the shared cache."""
    for kernel in report.kernels:
        tickets = int(kernel.kernel in TICKETS)
        atomics = {opcode: n for opcode, n in kernel.ptx.items() if opcode.startswith(("atom.", "red."))}
        assert atomics == ({"atom.global.gpu.acq_rel.add.u32": 1} if tickets else {}), kernel
        assert (kernel.sass_count("ATOM"), kernel.sass_count("RED.")) == (tickets, 0), kernel
        if kernel.kernel in SUMS:
            assert kernel.ptx_count("ld.global.cg"), kernel


@pytest.mark.full
def test_the_readme_has_the_table() -> None:
    if INSTALLED not in VERSIONS:
        pytest.skip(f"the table is of {VERSIONS}, and {INSTALLED} is installed")
    if is_current():
        pytest.skip("it was written from the same sources")
    reports = []
    for triton in VERSIONS:
        rest = tuple(arch for arch in ARCHS if (triton, arch) != QUICK)
        reports += reports_of(triton, rest).values()
    reports += reports_of(INSTALLED, (QUICK[1],)).values()
    assert in_readme()[0] == table(reports), "run python -m tests.kernels.compile_kernels --write"

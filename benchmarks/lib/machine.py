"""What the predictions assume of a GPU: an H100 SXM and the compiler's register counts. Nothing here was measured.

Sizes are NVIDIA's data sheet. Latencies are what published microbenchmarks of the H100 give in round numbers.
"""

from __future__ import annotations

MULTIPROCESSORS = 132
REGISTERS, THREADS = 65536, 2048
"""Of one multiprocessor."""

BLOCK_THREADS = 256
"""8 warps, `lesam_kernels.launch_config.NUM_WARPS`."""

LATENCY = 0.6e-6
"""Seconds of one load from memory, while others are under way."""

L2 = 50e6
"""Bytes. A line that both halves of the chip ask for lies in each, so between half and all of it is of use."""

KERNEL_REGISTERS = {"sum_sq": 32, "dots": 32, "perturb": 40, "restore": 32, "restore_sgd": 40, "restore_adamw": 64}
"""Per thread, as ptxas gives them for sm_90; a kernel near 64 is compiled with that limit."""


def slots(kernel: str) -> int:
    """Programs of a kernel that are under way at once on the whole chip."""
    by_registers = REGISTERS // (KERNEL_REGISTERS[kernel] * BLOCK_THREADS)
    return MULTIPROCESSORS * min(THREADS // BLOCK_THREADS, by_registers)

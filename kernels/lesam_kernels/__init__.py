"""Fused multi-tensor Triton kernels for sharpness-aware steps: gradient norm, perturbation, restore.

One launch walks a whole list of tensors, whatever its length. See README.md in the folder above.
"""

from lesam_kernels.norm import sum_sq
from lesam_kernels.perturb import perturb
from lesam_kernels.restore import restore
from lesam_kernels.tensor_table import TensorTable

__all__ = ["TensorTable", "perturb", "restore", "sum_sq"]

"""Fused multi-tensor Triton kernels for sharpness-aware steps: gradient norm, perturbation, restore with the update.

One launch walks the tensors of a whole optimizer, however many. See README.md in the folder above.
"""

from lesam_kernels.dots import dots
from lesam_kernels.norm import sum_sq
from lesam_kernels.perturb import perturb
from lesam_kernels.restore import restore
from lesam_kernels.restore_adamw import restore_adamw
from lesam_kernels.restore_sgd import restore_sgd
from lesam_kernels.tensor_table import TensorTable

__all__ = ["TensorTable", "dots", "perturb", "restore", "restore_adamw", "restore_sgd", "sum_sq"]

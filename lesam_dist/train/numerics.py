"""torch's settings of how a device computes: process-wide, so they are put back after a run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lesam_dist.config.schema import PrecisionConfig
from lesam_dist.errors import UserError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS promises the same bits on several streams too
_NO_IMPLEMENTATION = re.compile(r"^(\S+) does not have a deterministic implementation")


@contextmanager
def numerics(precision: PrecisionConfig, device: torch.device) -> Iterator[None]:
    """Compute as a run says.

    Raises:
        UserError: for an environment that contradicts ``precision.deterministic``.
    """
    if precision.deterministic and device.type == "cuda":
        _require_workspace()
    cudnn = torch.backends.cudnn
    before = _precisions(), cudnn.benchmark, cudnn.deterministic
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        _set_precisions(["tf32" if precision.tf32 else "ieee"] * 3)
        cudnn.benchmark = precision.cudnn_benchmark
        if precision.deterministic:
            cudnn.deterministic = True
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        _set_precisions(before[0])
        cudnn.benchmark, cudnn.deterministic = before[1:]
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def explain_nondeterminism(error: BaseException, precision: PrecisionConfig) -> UserError | None:
    """What a user can do about an operation that has no deterministic form; None for any other error."""
    found = _NO_IMPLEMENTATION.match(str(error))
    if not precision.deterministic or found is None:
        return None
    return UserError(
        f"precision.deterministic is true, but torch has no deterministic form of {found[1]} on this device, which the "
        "model or the data need: choose another model.name, or set it to false."
    )


def _precisions() -> list[str]:
    """Of float32 matrix products, convolutions and recurrent networks on CUDA."""
    return [each.fp32_precision for each in _settings()]


def _set_precisions(values: list[str]) -> None:
    """By torch's current settings. It has older ones beside them, which its compiler reads (torch 2.14), and raises
    where the two say different things; so they agree. On the CPU nothing changes."""
    on_cpu: Any = torch.backends.mkldnn
    on_cpu = on_cpu.matmul
    before = on_cpu.fp32_precision
    torch.set_float32_matmul_precision("high" if values[0] == "tf32" else "highest")
    on_cpu.fp32_precision = before
    for each, value in zip(_settings(), values, strict=True):
        each.fp32_precision = value


def _settings() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]


def _require_workspace() -> None:
    """cuBLAS reads it when it is first used on a device, which is later."""
    given = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if given not in _WORKSPACES:
        raise UserError(
            f"precision.deterministic is true but the environment variable {_WORKSPACE} is '{given}', with which "
            f"cuBLAS is not: unset it, or set it to {' or '.join(_WORKSPACES)}."
        )

"""Settings of torch that a run changes, and leaves as they were."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lesam_dist.config.schema import PrecisionConfig
from lesam_dist.errors import UserError
from lesam_dist.train.numerics import explain_nondeterminism, numerics

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settings() -> dict[str, Any]:
    """All that may change, as torch tells it now, by its current names."""
    backends: Any = torch.backends
    return {
        "matmul": backends.cuda.matmul.fp32_precision,
        "conv": backends.cudnn.conv.fp32_precision,
        "rnn": backends.cudnn.rnn.fp32_precision,
        "cpu": backends.mkldnn.matmul.fp32_precision,
        "benchmark": backends.cudnn.benchmark,
        "cudnn": backends.cudnn.deterministic,
        "mode": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
    }


def test_a_run_sets_them_and_puts_them_back() -> None:
    before = settings()
    for tf32, benchmark, deterministic in product([True, False], repeat=3):
        if benchmark and deterministic:
            continue
        with numerics(PrecisionConfig(tf32=tf32, cudnn_benchmark=benchmark, deterministic=deterministic), CPU):
            now = settings()
            precision = "tf32" if tf32 else "ieee"
            assert (now["matmul"], now["conv"], now["rnn"]) == (precision,) * 3
            assert now["cpu"] == before["cpu"], "a CPU computes as ever"
            assert (now["benchmark"], now["cudnn"], now["mode"]) == (benchmark, deterministic, deterministic)
            # What torch's compiler reads of a matrix product: it raises where the old and the new settings differ.
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
            assert torch._C._get_cublas_allow_tf32() == tf32
        assert settings() == before


def test_they_are_put_back_after_an_error() -> None:
    before = settings()
    with pytest.raises(ZeroDivisionError), numerics(PrecisionConfig(deterministic=True, tf32=False), CPU):
        _ = 1 / 0
    assert settings() == before


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    """By torch's own error."""
    images, indices = F.max_pool2d(torch.randn(1, 1, 4, 4), 2, return_indices=True)
    precision = PrecisionConfig(deterministic=True)
    with pytest.raises(RuntimeError) as raised, numerics(precision, CPU):
        F.max_unpool2d(images, indices, 2)
    explained = explain_nondeterminism(raised.value, precision)
    assert explained is not None
    assert "torch has no deterministic form of max_unpooling2d" in str(explained)
    assert explain_nondeterminism(raised.value, PrecisionConfig()) is None
    assert explain_nondeterminism(RuntimeError("another one"), precision) is None


def test_the_workspace_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is set where nobody has, and another one is refused."""
    import os

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    precision = PrecisionConfig(deterministic=True)
    with numerics(PrecisionConfig(), CUDA):
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with numerics(precision, CUDA):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"is ':0:0', with which cuBLAS is not: unset it"), numerics(precision, CUDA):
        pass

"""Watches what interpreted kernels load and store, address by address."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from torch import Tensor

MODULES = ("norm", "dots", "perturb", "restore", "restore_sgd", "restore_adamw")
# Marks in bits that no address has: a pointer that promises 16-byte alignment, rightly or wrongly.
PROMISED, BROKEN = 1 << 60, 1 << 61
ADDRESS = PROMISED - 1


class MemorySpy:
    """Bytes by name of the watched tensors; what is accessed elsewhere (tables, scalars) is not counted.

    Attributes:
        loaded, stored: bytes.
        promised: those of both that went through a pointer that promises alignment.
        broken: names of tensors that were accessed through such a pointer although they are not aligned.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import triton.runtime.interpreter as interpreter

        self._ranges: list[tuple[str, int, int]] = []
        self.clear()
        builder = interpreter.interpreter_builder
        load, store = builder.create_masked_load, builder.create_masked_store

        def spy_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
            return load(self._access(self.loaded, ptrs, mask), mask, *rest)

        def spy_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            return store(self._access(self.stored, ptrs, mask), value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", spy_load)
        monkeypatch.setattr(builder, "create_masked_store", spy_store)
        for name in MODULES:
            module = sys.modules[f"lesam_kernels.{name}"]
            monkeypatch.setattr(module, "pointer", _marking(module.pointer))

    def watch(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        for t in tensors:
            if t is not None and t.numel():
                self._ranges.append((name, t.data_ptr(), t.data_ptr() + t.nbytes))

    def clear(self) -> None:
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.promised: Counter[str] = Counter()
        self.broken: set[str] = set()

    def _access(self, counter: Counter[str], ptrs: Any, mask: Any) -> Any:
        marked = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape)).astype(np.uint64)
        addresses = marked & np.uint64(ADDRESS)
        touched = np.broadcast_to(mask.data, marked.shape)
        for name, begin, end in self._ranges:
            inside = touched & (addresses >= begin) & (addresses < end)
            num_bytes = int(inside.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
            if num_bytes:
                counter[name] += num_bytes
                if (marked[inside] & np.uint64(PROMISED | BROKEN)).any():
                    self.promised[name] += num_bytes
                if (marked[inside] & np.uint64(BROKEN)).any():
                    self.broken.add(name)
        return type(ptrs)(ptrs.data & np.uint64(ADDRESS), ptrs.dtype)


def _marking(pointer: Any) -> Any:
    def spy(address: Any, DTYPE: Any, ALIGNED: Any) -> Any:  # noqa: N803
        result = pointer(address, DTYPE, ALIGNED)
        if getattr(ALIGNED, "value", ALIGNED):
            is_aligned = int(result.handle.data.item()) % 16 == 0
            result.handle.data = result.handle.data + np.uint64(PROMISED if is_aligned else BROKEN)
        return result

    return spy

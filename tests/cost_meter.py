"""Counts launches, bytes moved, memory and collectives, by watching torch's operators and interpreted kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.interpreter import language_patched_once

LARGE = 256  # an operator on a tensor of so many elements is a pass; on smaller ones alone it is a tiny launch

_WRITES_ONLY = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")
_MAKES = ("empty", "zeros", "ones", "full", "new_", "rand", "arange", "scalar_tensor")


class Meter(TorchDispatchMode):
    """Counts what runs within it, but for what runs while it is paused.

    Attributes:
        passes: operators on large tensors, by name: each is a launch on a GPU. A list's operator counts once.
        tiny: operators on scalars alone, by name: a launch each as well.
        moved: bytes that the large ones read and write.
        allocations: tensors that operators made new memory for, of any size.
        reads: times that the host asked for a device's number, and would wait for it.
        reductions: collectives; ``reduced``: the elements of the largest.
        calls: of a closure, for that to count.
        kernels: launches of Triton's kernels by name; ``kernel_moved``: bytes that they load and store in blocks.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = 0
        self._storages: WeakSet[torch.UntypedStorage] = WeakSet()
        self.clear()

    def clear(self) -> None:
        self.passes: Counter[str] = Counter()
        self.tiny: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.moved = self.kernel_moved = self.reads = self.reductions = self.reduced = self.calls = 0
        self.allocations = 0
        self.peak = self.live()

    def live(self) -> int:
        """Bytes of all large storages made within this meter that still exist."""
        return sum(storage.nbytes() for storage in self._storages)

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # seen again as operators on its shards
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        known = len(self._storages)
        for leaf in tree_leaves(result):
            if (
                isinstance(leaf, Tensor) and leaf.numel() >= LARGE and leaf.dtype != torch.int64
            ):  # else a table of addresses
                self._storages.add(leaf.untyped_storage())
        if len(self._storages) > known:
            self.peak = max(self.peak, self.live())
        if not self.paused:
            self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = func.overloadpacket.__name__
        self.allocations += len(_new_storages(args, kwargs, result))
        if func.namespace in ("c10d", "_c10d_functional"):
            self.reductions += name != "wait_tensor"
            elements = (leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.reduced = max(self.reduced, *elements)
        elif func.namespace == "aten" and name == "_local_scalar_dense":
            self.reads += 1
        elif func.namespace == "aten":
            read, written = traffic(func, args, kwargs, result)
            touched = [*read, *written]
            if any(t.numel() >= LARGE for t in touched):
                self.passes[name] += 1
                self.moved += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in touched)
            elif any(t.dtype != torch.int64 for t in touched):
                # Addresses are int64: whether their table is copied anew is up to the allocator.
                self.tiny[name] += 1

    @contextmanager
    def interpreter(self) -> Iterator[None]:
        """Within, launches of the kernels are counted, with what they move; only in Triton's interpreter."""
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        launch, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store

        def counted_launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.kernels[executor.fn.__name__.strip("_").removesuffix("_kernel")] += 1
            with self.pause():
                return launch(executor, *args, **kwargs)

        def count_block(ptrs: Any, mask: Any) -> None:
            if ptrs.data.size > 1:  # else a scalar or an address
                self.kernel_moved += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8

        def counted_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
            count_block(ptrs, mask)
            return load(ptrs, mask, *rest)

        def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            count_block(ptrs, mask)
            return store(ptrs, value, mask, *rest)

        with (
            language_patched_once(),
            mock.patch.object(interpreter.GridExecutor, "__call__", counted_launch),
            mock.patch.object(builder, "create_masked_load", counted_load),
            mock.patch.object(builder, "create_masked_store", counted_store),
        ):
            yield


class Waits(TorchFunctionMode):
    """Counts calls that copy a tensor to the host and, of a tensor on the host already, are no operators."""

    _NAMES = ("tolist", "cpu", "numpy", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.calls: Counter[str] = Counter()

    def total(self) -> int:
        return self.calls.total()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._NAMES:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _new_storages(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> set[int]:
    """Memory that an operator's result has and no argument; not that of addresses, which the allocator decides on."""
    given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    made = (t for t in tree_leaves(result) if isinstance(t, Tensor) and t.dtype != torch.int64)
    return {t.untyped_storage()._cdata for t in made} - given


def traffic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operator reads, and those that it writes, by its schema; nothing of a view's."""
    name = func.overloadpacket.__name__
    made = name.startswith(_MAKES)
    read: list[Tensor] = []
    written: list[Tensor] = []
    given: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        given += tensors
        # torch's fused updates may unscale the gradients in place, but do not without a scale.
        is_written = argument.is_write and not (name.startswith("_fused") and argument.name == "grads")
        if is_written:
            written += tensors
        if not (made or argument.is_out or (is_written and name in _WRITES_ONLY)):
            read += tensors
    storages = {t.untyped_storage()._cdata for t in given}
    new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    new = [t for t in new if t.untyped_storage()._cdata not in storages]
    if name.startswith(("empty", "new_empty")) or (not new and not written):
        return [], []
    return read, written + new

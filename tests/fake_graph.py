"""CUDA graphs where there is no GPU: what a capture forbids is refused, and a replay is only what a graph holds.

Kernels run in Triton's interpreter. Within `FakeGraph.capture` every launch and every operator of torch is recorded
with its arguments, and afterwards all memory is as it was before: a capture computes nothing. `FakeGraph.replay` runs
the recording again, on the same memory. What was allocated in the capture is poisoned before each replay, since a
graph's memory holds nothing from one replay to the next: earlier operations of the graph may have had the same place.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import lesam_kernels.capture
from lesam_dist.optim.engine import capturing

_WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_is_all_true", "masked_select", "unique")
_HOST_MEMORY = ("pin_memory", "_pin_memory", "is_pinned")
_FROM_NUMBERS = ("lift_fresh", "lift_fresh_copy")  # torch.tensor(...)


class CaptureError(RuntimeError):
    """What would break a capture on a GPU."""


class RealGraph:
    """A CUDA graph, with the methods of `FakeGraph`."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self) -> Any:
        return torch.cuda.graph(self._graph)

    def replay(self) -> None:
        self._graph.replay()


class FakeGraph(TorchDispatchMode):
    """A recording of what ran in `capture`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorded: list[Callable[[], None]] = []
        self._pool: dict[int, Tensor] = {}  # of each storage that was made in the capture
        self._host: dict[int, Any] = {}  # storages of what would be on the host; kept, so that no address comes again

    @contextmanager
    def capture(self) -> Iterator[None]:
        from triton.runtime import interpreter

        before = _live_tensors()
        contents = [tensor.clone() for tensor in before]
        launch = interpreter.GridExecutor.__call__

        def recorded_launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _aliases((args, kwargs))
            self._recorded.append(lambda: launch(executor, *args, **kwargs))
            return launch(executor, *args, **kwargs)

        with ExitStack() as stack:
            for module in (capturing, lesam_kernels.capture):
                stack.enter_context(mock.patch.object(module, "is_capturing", return_value=True))
            stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", recorded_launch))
            stack.callback(lambda: [tensor.copy_(content) for tensor, content in zip(before, contents, strict=True)])
            stack.enter_context(self)
            yield

    def replay(self) -> None:
        for tensor in self._pool.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        with torch.no_grad():
            for run in self._recorded:
                run()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if name in _WAITS:
            raise CaptureError(f"{func} makes the host wait for the device")
        if name in _HOST_MEMORY or kwargs.get("pin_memory"):
            raise CaptureError(f"{func} allocates host memory")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_host = [_storage(tensor) in self._host for tensor in given]
        if any(on_host) and not all(on_host):
            raise CaptureError(f"{func} takes numbers of the host, which no replay would renew")
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [tensor for tensor in made if _storage(tensor) not in {_storage(t) for t in given}]
        is_host = all(on_host) if given else kwargs.get("device") is None
        if is_host or name in _FROM_NUMBERS:
            self._host |= {_storage(tensor): tensor.untyped_storage() for tensor in tree_leaves(result)}
            return result
        self._pool |= {_storage(tensor): tensor.detach() for tensor in made}
        if not made and not any(argument.is_write for argument in func._schema.arguments):
            return result  # a view
        own_args, own_kwargs, own_made = _aliases((args, kwargs, made))

        def run() -> None:
            again = [leaf for leaf in tree_leaves(func(*own_args, **own_kwargs)) if isinstance(leaf, Tensor)]
            storages = {
                _storage(tensor) for tensor in tree_leaves((own_args, own_kwargs)) if isinstance(tensor, Tensor)
            }
            again = [tensor for tensor in again if _storage(tensor) not in storages]
            for old, new in zip(own_made, again, strict=True):
                old.copy_(new)

        self._recorded.append(run)
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _aliases(tree: Any) -> Any:
    """The same memory in other tensors: autograd takes a gradient for its own only where nobody else has the object."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach(), tree)


def _live_tensors() -> list[Tensor]:
    """All tensors that Python knows, once for each storage."""
    tensors = [
        t.detach() for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu"
    ]
    whole = {
        _storage(t): torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        for t in tensors
        if t.layout == torch.strided
    }
    return list(whole.values())

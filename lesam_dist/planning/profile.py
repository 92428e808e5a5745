"""What a forward and backward pass of a network does: operations and bytes of each kernel, and what it keeps.

The pass really runs, but on tensors that have shapes and nothing else (torch's fake tensors), so that a ViT-L/16 takes
a second on a laptop. Each of torch's operators is taken for one kernel, which reads its inputs and writes its outputs
in memory; only views are free. All of it grows linearly with the batch: two passes give every other batch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError
from lesam_dist.parallel.blocks import find_blocks
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.data import resolve_num_classes
from lesam_dist.train.build import build_network

_BATCHES = (2, 4)  # BatchNorm needs two images
_FREE = ("empty", "new_empty", "detach", "_unsafe_view", "_local_scalar_dense")


@dataclass(frozen=True)
class Kernels:
    """Operators of a pass in their order, for one batch.

    Attributes:
        flops: operations of matrix products and convolutions, (K,).
        nbytes: read and written, (K,).
        ready: for each parameter, in their order, after how many of them its gradient is final.
        order: the parameters' places in the order in which their gradients become final.
        blocks: for each block, how many of them come before its forward, and before its end.
        forward: how many belong to the forward.
        kept: bytes of activations that exist when the backward begins.
    """

    flops: NDArray[np.float64]
    nbytes: NDArray[np.float64]
    ready: list[int]
    order: tuple[int, ...]
    blocks: list[tuple[int, int]]
    forward: int
    kept: float

    def clock(self, rate: float, bandwidth: float, floor: float) -> NDArray[np.float64]:
        """Seconds from the start to the end of each, (K + 1,): the slower one of arithmetic and memory for each."""
        each = np.maximum(np.maximum(self.flops / rate, self.nbytes / bandwidth), floor)
        return np.concatenate([[0.0], np.cumsum(each)])


@dataclass(frozen=True)
class Profile:
    """A network, and its pass at any batch.

    Attributes:
        model: on the meta device, not wrapped.
        found: the kernels at two batches.
    """

    model: nn.Module
    found: tuple[Kernels, Kernels]

    def at(self, images: float) -> Kernels:
        """The kernels for so many images."""
        low, high = self.found
        share = (images - _BATCHES[0]) / (_BATCHES[1] - _BATCHES[0])
        flops = low.flops + share * (high.flops - low.flops)
        nbytes = low.nbytes + share * (high.nbytes - low.nbytes)
        return replace(low, flops=flops, nbytes=nbytes, kept=low.kept + share * (high.kept - low.kept))

    @property
    def flops(self) -> float:
        """Operations of a forward and backward pass, for each image."""
        return float(self.found[1].flops.sum() / _BATCHES[1])


def profile(config: Config, processes: int) -> Profile:
    """The network of a config; ``processes``: the most among which its batch is divided.

    Raises:
        UserError: as `lesam_dist.train.build.build_network`.
    """
    if config.task != "classification":
        raise UserError(f"task is {config.task}: plan knows what passes cost for classification alone.")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        world = Distributed(0, 0, processes, torch.device("meta"))
        offline = replace(config, dry_run=True, model=replace(config.model, compile=False))  # no weights are fetched
        model = build_network(offline, resolve_num_classes(config, None), world).train()
    half = None if config.precision.compute == "fp32" else torch.bfloat16
    size = config.data.image_size
    low, high = (_record(copy.deepcopy(model), config.parallel.wrap_classes, n, size, half) for n in _BATCHES)
    return Profile(model, (low, high))


def _record(model: nn.Module, wrap_classes: list[str], batch: int, size: int, half: torch.dtype | None) -> Kernels:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # autocast does not know the meta device
        blocks = find_blocks(model, wrap_classes)
        recorder = Recorder()
        begun, done = [-1] * len(blocks), [-1] * len(blocks)
        ready = [-1] * len(params := list(model.parameters()))
        order: list[int] = []
        for i, block in enumerate(blocks):
            _when(block.register_forward_pre_hook, begun, i, recorder)
            _when(block.register_forward_hook, done, i, recorder)
        for i, p in enumerate(params):
            _when(p.register_post_accumulate_grad_hook, ready, i, recorder)
            p.register_post_accumulate_grad_hook(lambda _, i=i: order.append(i))
        images, labels = torch.empty(batch, 3, size, size), torch.empty(batch, dtype=torch.int64)
        kept: dict[int, int] = {}
        own = {t.untyped_storage()._cdata for t in (*params, *model.buffers())}

        def keep(t: Tensor) -> Tensor:
            if t.untyped_storage()._cdata not in own:
                kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with recorder, torch.autocast("cpu", half, enabled=half is not None):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = F.cross_entropy(model(images), labels)
            forward = len(recorder.flops)
        with recorder:
            loss.backward()
    end = len(recorder.flops)
    ready = [end if at < 0 else at for at in ready]
    flops, nbytes = np.array(recorder.flops, dtype=float), np.array(recorder.nbytes, dtype=float)
    return Kernels(
        flops, nbytes, ready, tuple(order), list(zip(begun, done, strict=True)), forward, float(sum(kept.values()))
    )


def _when(register: Any, times: list[int], index: int, recorder: Recorder) -> None:
    """Let a hook write down how many kernels there were when it was called last."""

    def note(*_: Any) -> None:
        times[index] = len(recorder.flops)

    register(note)


class Recorder(TorchDispatchMode):
    """Writes down every operator's arithmetic and bytes, but for views, and while it is paused."""

    def __init__(self, least: int = 0) -> None:
        """``least``: elements of the largest tensor of an operator that counts."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: list[float] = []
        self.nbytes: list[float] = []
        self.paused = False
        self._least = least

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if self.paused or func.is_view or func.namespace != "aten" or packet.__name__.startswith(_FREE):
            return result
        read, written = _touched(func, args, kwargs, result)
        if max((t.numel() for t in (*read, *written)), default=0) >= self._least:
            count = flop_registry.get(packet)
            self.flops.append(count(*args, **kwargs, out_val=result) if count else 0)
            self.nbytes.append(sum(t.numel() * t.itemsize for t in (*read, *written)))
        return result


def _touched(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operator reads, and those that it writes."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        written += tensors if argument.is_write else []
        read += (
            [] if argument.is_write and func.overloadpacket.__name__.endswith(("copy_", "zero_", "fill_")) else tensors
        )
    if "batch_norm" in func.overloadpacket.__name__:
        read.append(read[0])  # once for the statistics, once to normalise
    if not written:
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return read, written

"""Who writes which part of which tensor: torch's planner decides, here it is remembered from save to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from lesam_dist.train.checkpoint.channel import Channel, on_first
from lesam_dist.train.checkpoint.index import Chunk, Entry, Index


@dataclass(frozen=True)
class Share:
    """What this rank writes, and on rank 0 the index of all.

    ``tensors``: those of its file, by the keys in it. They are views of what is to be saved, on its device.
    """

    tensors: dict[str, Tensor]
    index: Index


class Planner:
    """Finds each rank's share of the tensors; only the first time, and when they have changed, is it agreed anew."""

    def __init__(self) -> None:
        self._local: SavePlan | None = None
        self._plans: list[SavePlan] = []

    def share(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], channel: Channel) -> Share:
        """This rank's share; every rank takes part.

        Args:
            tensors: whole or sharded, of the same names on all ranks. What several ranks have is written by one.
            own: of this rank alone.
        """
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), is_coordinator=channel.rank == 0)
        plan = planner.create_local_plan()
        # Shards without an element have nothing to write, and the same place on several ranks.
        plan = SavePlan([item for item in plan.items if _volume(item)])
        is_known = self._local is not None and plan.items == self._local.items
        if not all(channel.gather(is_known)):
            plans = channel.gather(plan)
            self._plans = on_first(channel, lambda: planner.create_global_plan(plans)[0])
            self._local = plan
        mine = self._plans[channel.rank].items
        share = {_key(item): _resolved(planner, item) for item in mine}
        share |= {_own_key(name): tensor.detach() for name, tensor in own.items() if tensor.numel()}
        owned = channel.gather({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in own.items()})
        entries = self._entries(tensors) if channel.rank == 0 else {}
        parts = [
            {name: _whole(file_of(rank), _own_key(name), *kind) for name, kind in part.items()}
            for rank, part in enumerate(owned)
        ]
        return Share(share, Index(entries, parts))

    def _entries(self, tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
        chunks: dict[str, list[Chunk]] = {name: [] for name in tensors}
        for rank, plan in enumerate(self._plans):
            for item in plan.items:
                offsets, sizes = _box(item)
                chunks[item.index.fqn].append(Chunk(file_of(rank), _key(item), offsets, sizes))
        return {name: Entry(tensor.dtype, tuple(tensor.shape), tuple(chunks[name])) for name, tensor in tensors.items()}


def file_of(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def _resolved(planner: DefaultSavePlanner, item: WriteItem) -> Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor)
    return data.detach()


def _box(item: WriteItem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return tuple(chunk.offsets), tuple(chunk.sizes)


def _volume(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel()


def _key(item: WriteItem) -> str:
    """The tensor's name; with the offsets where it is a part."""
    assert item.tensor_data is not None
    offsets, sizes = _box(item)
    is_whole = sizes == tuple(item.tensor_data.size)
    return item.index.fqn if is_whole else f"{item.index.fqn}@{','.join(map(str, offsets))}"


def _own_key(name: str) -> str:
    return f"own.{name}"


def _whole(file: str, key: str, dtype: object, shape: Sequence[int]) -> Entry:
    zeros, shape = (0,) * len(shape), tuple(shape)
    has_elements = 0 not in shape
    return Entry(dtype, shape, (Chunk(file, key, zeros, shape),) if has_elements else ())  # type: ignore[arg-type]

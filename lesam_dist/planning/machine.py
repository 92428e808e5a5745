"""The machine that a run is predicted for: a device and its links, with the shares of them that a run reaches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lesam_dist.config.schema import PrecisionConfig
from lesam_dist.planning.collectives import Group, Network, seconds
from lesam_dist.planning.communication import Call, Layout, Over
from lesam_dist.planning.hardware import Device, Shares
from lesam_dist.planning.profile import Kernels


@dataclass(frozen=True)
class Machine:
    """What a run is predicted for.

    Attributes:
        device: of each process.
        network: as far as it is expected to be used: links times `Shares.link`.
        per_node: devices of a node.
        shares: of the data sheet that are reached.
        cores: of the CPU, for each device.
        decode_rate: images per second that a core reads, decodes and augments; None: not known.
        hourly: price of a device's hour; None: not known.
    """

    device: Device
    network: Network
    per_node: int
    shares: Shares
    cores: float
    decode_rate: float | None = None
    hourly: float | None = None

    def clock(self, kernels: Kernels, precision: PrecisionConfig) -> NDArray[np.float64]:
        """Seconds from the start of a pass to the end of each kernel, see `Kernels.clock`."""
        rate = self.device.rate(precision.compute, precision.tf32) * self.shares.products
        return kernels.clock(rate, self.bandwidth, self.device.floor)

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a kernel is assumed to move."""
        return self.device.bandwidth * self.shares.memory

    def seconds(self, call: Call, layout: Layout) -> float:
        """How long a collective takes."""
        return seconds(call.operation, call.nbytes, self._group(layout, call.over), self.network)

    def _group(self, layout: Layout, over: Over) -> Group:
        """Ranks are given to nodes in their order, and to shards in their order."""
        size = layout.size(over)
        if over == "replicas":
            return Group(size, min(size, max(1, self.per_node // layout.shard)))
        return Group(size, min(size, self.per_node))

"""How long a collective takes: a latency for each message, and bytes over a bandwidth.

Ring algorithms, over a group of n processes on N nodes and S bytes (of the whole tensor, as everybody has it before an
all-reduce or a reduce-scatter, or after an all-gather):

    all-gather, reduce-scatter   n - 1 messages,      (n - 1)/n S  bytes sent and received by each process
    all-reduce                   2 (n - 1) messages,  2 (n - 1)/n S

A ring crosses each node's border once, over all network links of its members together, so that the slower of two
bandwidths counts: a process's link inside the node, and the node's to the others. NCCL can also reduce along two trees:
2 (log2 N + members - 1) messages and 2 S bytes, which large jobs need for their latency; the faster one is taken.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Operation = Literal["all_reduce", "all_gather", "reduce_scatter"]


class Link(NamedTuple):
    """``latency``: seconds of a message; ``bandwidth``: bytes per second in one direction."""

    latency: float
    bandwidth: float


class Network(NamedTuple):
    """``inside`` a node, ``outside`` it, from each process; ``backend`` of torch.distributed."""

    inside: Link
    outside: Link
    backend: str = "nccl"


class Group(NamedTuple):
    """Processes that communicate: ``members`` of each node, on as many nodes as it takes for ``size``."""

    size: int
    members: int

    @property
    def nodes(self) -> int:
        return -(-self.size // self.members)


def sent(operation: Operation, nbytes: float, size: int) -> float:
    """Bytes that each process sends in a ring of ``size``, with ``nbytes`` of the whole tensor."""
    return (2 if operation == "all_reduce" else 1) * (size - 1) / size * nbytes


def seconds(operation: Operation, nbytes: float, group: Group, network: Network) -> float:
    """How long a collective takes that has the links for itself."""
    if group.size == 1:
        return 0.0
    rounds = 2 if operation == "all_reduce" else 1
    if network.backend == "gloo":
        return _gloo(operation, nbytes, group, network)
    hops_outside = group.nodes if group.nodes > 1 else 0
    hops_inside = group.size - max(group.nodes, 1)
    latency = rounds * (hops_inside * network.inside.latency + max(hops_outside - 1, 0) * network.outside.latency)
    moved = sent(operation, nbytes, group.size)
    ring = latency + moved / _bandwidth(group, network)
    if operation != "all_reduce" or group.nodes == 1:
        return ring
    depth = math.ceil(math.log2(group.nodes)) * network.outside.latency
    chain = (group.members - 1) * network.inside.latency
    return min(ring, 2 * (depth + chain) + 2 * nbytes / _bandwidth(group, network))


def _bandwidth(group: Group, network: Network) -> float:
    """Of the slowest part of a ring, from each process."""
    if group.nodes == 1:
        return network.inside.bandwidth
    outside = group.members * network.outside.bandwidth
    return outside if group.members == 1 else min(network.inside.bandwidth, outside)


def _gloo(operation: Operation, nbytes: float, group: Group, network: Network) -> float:
    """One ring for all, where each process sends to the next; that between two nodes is the slowest.

    Torch builds its reduce-scatter of gloo's all-reduce.
    """
    link = network.outside if group.nodes > 1 else network.inside
    if operation == "reduce_scatter":
        operation = "all_reduce"
    messages = (2 if operation == "all_reduce" else 1) * (group.size - 1)
    return messages * link.latency + sent(operation, nbytes, group.size) / link.bandwidth

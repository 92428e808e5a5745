"""Alpha-beta times and timelines: closed forms, limits and bounds, on random durations."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from lesam_dist.errors import UserError
from lesam_dist.planning.collectives import Group, Link, Network, Operation, seconds, sent
from lesam_dist.planning.hardware import DEVICES, NETWORK_LATENCY, device_of, interconnect_of
from lesam_dist.planning.timeline import Block, gather_ahead, in_turn, reduce_behind

OPERATIONS: tuple[Operation, ...] = ("all_reduce", "all_gather", "reduce_scatter")
FREE = Network(Link(0.0, 4.0), Link(0.0, 1.0))  # no latency; a process's link inside a node is four times as fast
WAITING = Network(Link(2.0, 1e30), Link(100.0, 1e30))  # nothing but latency


def test_a_ring_inside_a_node() -> None:
    for n in (2, 3, 8):
        assert sent("all_gather", 1.0, n) == sent("reduce_scatter", 1.0, n) == (n - 1) / n
        assert sent("all_reduce", 1.0, n) == 2 * (n - 1) / n
        for operation in OPERATIONS:
            group = Group(n, n)
            assert seconds(operation, 8.0, group, FREE) == pytest.approx(sent(operation, 8.0, n) / 4)
            rounds = 2 if operation == "all_reduce" else 1
            assert seconds(operation, 8.0, group, WAITING) == pytest.approx(rounds * (n - 1) * 2)
    assert all(seconds(operation, 8.0, Group(1, 1), WAITING) == 0 for operation in OPERATIONS)


def test_a_ring_over_nodes_is_as_fast_as_its_slowest_part() -> None:
    """Two members of a node have two network links together: 2 < 4; eight have 8, and the link inside is slower."""
    for members, slowest in ((1, 1.0), (2, 2.0), (8, 4.0)):
        group = Group(4 * members, members)
        assert seconds("all_gather", 6.0, group, FREE) == pytest.approx(sent("all_gather", 6.0, 4 * members) / slowest)


def test_large_groups_reduce_along_trees() -> None:
    """Latency then grows with the logarithm; a ring's bytes are fewer, which counts for large tensors."""
    group = Group(1024, 1)
    assert seconds("all_reduce", 8.0, group, WAITING) == pytest.approx(2 * 10 * 100)
    assert seconds("all_gather", 8.0, group, WAITING) == pytest.approx(1023 * 100)
    assert seconds("all_reduce", 1e9, group, FREE) == pytest.approx(sent("all_reduce", 1e9, 1024))


def test_gloo_scatters_what_it_has_reduced_everywhere() -> None:
    gloo = FREE._replace(backend="gloo")
    group = Group(4, 1)
    assert seconds("reduce_scatter", 8.0, group, gloo) == seconds("all_reduce", 8.0, group, gloo) == 12.0
    assert seconds("all_gather", 8.0, group, gloo) == 6.0


def test_reductions_behind_a_backward(seed: int) -> None:
    draw = random.Random(seed)
    assert reduce_behind([1.0, 2.0, 3.0], [0.5, 0.5, 0.5], 3.0).exposed == 0.5  # the last alone
    assert reduce_behind([1.0, 2.0, 3.0], [5.0, 1.0, 1.0], 3.0).exposed == 5.0  # one after the other, from 1.0 on
    for _ in range(200):
        compute = draw.uniform(0, 3)
        ready = sorted(draw.uniform(0, compute) for _ in range(6))
        times = [draw.uniform(0, 1) for _ in ready]
        span = reduce_behind(ready, times, compute)
        ends = [at + sum(times[i:]) for i, at in enumerate(ready)]  # whichever bucket the link last waited for
        assert span.total == pytest.approx(max(compute, *ends))


def blocks_of(draw: random.Random, compute: float, communication: float) -> tuple[Block, list[Block]]:
    def block() -> Block:
        a, b, c, d = (draw.uniform(0, 1) for _ in range(4))
        return Block(compute * a, compute * b, communication * c, draw.random() < 0.7, communication * d)

    return block(), [block() for _ in range(draw.randint(1, 6))]


def test_gathering_ahead(seed: int) -> None:
    """Alone, arithmetic or communication takes its own time; together more than either, and less than both."""
    draw = random.Random(seed)
    for compute, communication in ((1.0, 0.0), (0.0, 1.0), *((1.0, draw.uniform(0, 3)) for _ in range(200))):
        root, blocks = blocks_of(draw, compute, communication)
        span, slow = gather_ahead(root, blocks), in_turn(root, blocks)
        total = span.compute + span.communication
        assert slow.total == pytest.approx(total)
        assert max(span.compute, span.communication) <= span.total + 1e-9
        assert span.total <= total + 1e-9
        if not compute * communication:
            assert span.total == pytest.approx(total)
    steady = [Block(1.0, 2.0, 0.5, True, 0.5)] * 4  # all is hidden but the first gather and the last reduction
    assert gather_ahead(Block(0.0, 0.0, 0.0, False, 0.0), steady).exposed == pytest.approx(0.5 + 0.5 + 0.5)


def test_the_table_of_devices() -> None:
    """Half precision is faster than float32, and each generation than the one before."""
    gpus = [DEVICES[name] for name in ("a100", "h100", "b200")]
    for device in gpus:
        assert device.rate("fp32", False) < device.rate("fp32", True) < device.rate("bf16", True)
    for older, newer in pairwise(gpus):
        assert older.rate("bf16", False) < newer.rate("bf16", False)
        assert older.bandwidth < newer.bandwidth
    assert DEVICES["h200"].bandwidth > DEVICES["h100"].bandwidth
    assert device_of("H100") is DEVICES["h100"]


@pytest.mark.parametrize(
    ("text", "bandwidth"),
    [("400gbit", 50e9), ("50GB/s", 50e9), (" 100Gbit/node ", 100e9 / 8 / 8), ("250mbit", 250e6 / 8), ("64KB/s", 64e3)],
)
def test_bandwidths(text: str, bandwidth: float) -> None:
    assert interconnect_of(text, 8) == Link(NETWORK_LATENCY, bandwidth)


@pytest.mark.parametrize("text", ["400", "gbit", "-4gbit", "nangbit", "infgbit", "0gbit", "400 parsecs", ""])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--interconnect is"):
        interconnect_of(text, 8)

"""The models behind the predictions, against closed forms and other ways to count."""

from __future__ import annotations

import itertools
import math
import random

import predict
import pytest
import torch
from lib import hidden, ideas, l2, machine, traffic, waves
from lib.l2 import TILE_BYTES, WALKS, Walk

from lesam_dist.optim.engine import early_sums

ONE_TILE = TILE_BYTES // 4  # elements of float32


def found(tiles: int, tensors: int, walk: Walk, cache_tiles: int, chunk_tiles: int = 1) -> float:
    """Tiles of the gradient that are found; of whole tiles, so that nothing is rounded."""
    cache, chunk = cache_tiles * TILE_BYTES, chunk_tiles * ONE_TILE
    return tiles * l2.found(tiles * ONE_TILE, 4, tensors, walk, cache, chunk=chunk)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program at a time, for which an LRU cache has closed forms."""
    monkeypatch.setattr(l2, "slots", lambda kernel: 1)


@pytest.mark.parametrize("tensors", [1, 3, 4, 5])
def test_back_to_front_an_lru_cache_keeps_its_share(one_by_one: None, tensors: int) -> None:
    """d tiles from the end, d tiles of each tensor were used since; the whole cache with hints."""
    walk = Walk(blocks=True)
    assert found(600, tensors, walk, 60) == pytest.approx(60 // tensors, abs=1)
    assert found(600, tensors, walk._replace(hints=True), 60) == pytest.approx(60, abs=1)
    assert found(600, tensors, walk._replace(chunks=True), 60, chunk_tiles=6) == pytest.approx(60 // tensors, abs=1)
    assert found(15, tensors, walk, 15 * tensors) == 15


def test_front_to_back_nothing_is_left_of_what_does_not_fit(one_by_one: None) -> None:
    """x tiles from the start, the whole gradient and x tiles of the other tensors were used since."""
    assert found(61, 3, Walk(), 60) == 0
    assert found(40, 3, Walk(), 60) == pytest.approx((60 - 40) / 2, abs=1)
    assert found(20, 3, Walk(), 60) == 20


def test_a_large_gradient_is_not_walked_to_its_end(one_by_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Walk(blocks=True)
    whole = found(900, 3, walk, 60)
    monkeypatch.setattr(l2, "_MOST_TILES", 300)
    assert found(900, 3, walk, 60) == pytest.approx(whole)


def test_programs_take_turns(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile once, chunks from their end, and a program only when one before it is done; hits by counting what was
    used in between."""
    rng = random.Random(seed)
    blocks, tiles, under_way = rng.randint(1, 40), rng.randint(1, 5), rng.randint(1, 12)
    for walk in WALKS:
        turns = list(l2._turns(blocks, tiles, under_way, walk))
        assert sorted(turns) == list(itertools.product(range(blocks), range(tiles)))
        started = list(dict.fromkeys(block for block, _ in turns))
        assert started == sorted(started, reverse=walk.blocks)
        for block in range(blocks):
            assert [tile for b, tile in turns if b == block] == sorted(range(tiles), reverse=walk.chunks)
        for moment in range(len(turns)):
            begun = {block for block, _ in turns[: moment + 1]}
            over = sum(turns[:moment].count((block, 0 if walk.chunks else tiles - 1)) for block in begun)
            assert len(begun) - over <= under_way

        monkeypatch.setattr(l2, "slots", lambda kernel: under_way)
        cache, tensors = rng.randint(1, 3 * blocks * tiles), rng.randint(1, 4)
        used = [(0, *turn) for turn in l2._turns(blocks, tiles, under_way, Walk())]
        hits = 0
        for turn in turns:
            since = used[len(used) - used[::-1].index((0, *turn)) :]
            hits += len(set(since)) < cache
            used += [(tensor, *turn) for tensor in range(1 if walk.hints else tensors)]
        assert found(blocks * tiles, tensors, walk, cache, chunk_tiles=tiles) == pytest.approx(hits)


def test_a_walk_saves_at_most_the_two_reads_of_gradients() -> None:
    for walk in WALKS:
        assert ideas.walk("sgd", 300_000, 4, walk, machine.L2) == 2
    saves = [ideas.walk("adamw", 20_000_000, 4, walk, machine.L2) for walk in WALKS]
    assert saves[0] == 0 < saves[2] <= saves[4] < 2


def test_ideas() -> None:
    assert (ideas.SWAP.passes, ideas.AVERAGE.passes, ideas.SCALED.passes) == (1, 1, 4)


def test_hidden_norms_save_what_two_reads_take() -> None:
    """8 bytes of each element; of a step of 12 operations per element and token where no one else is waited for."""
    tokens, rate, bandwidth = 1000, 4e14, 3e12
    large = hidden.Setting("large", 1e9, 100, 1e9 * tokens, 1, rate)
    alone = hidden.predict(large, bandwidth)
    norms, passes, phase = 8e9 / bandwidth, 12e9 * tokens / rate, 44e9 / bandwidth
    assert alone[:3] == pytest.approx((passes, phase, norms))
    assert alone.share == pytest.approx(norms * 7 / 8 / (passes + phase), rel=1e-3)
    slow = hidden.predict(large._replace(wrapper="ddp", processes=4, link=1e10), bandwidth)
    assert slow.passes == pytest.approx(2 * 8e9 * 3 / 4 / 1e10)
    split = hidden.predict(large._replace(wrapper="fsdp", processes=4, link=1e10), bandwidth)
    assert (split.norms, split.passes) == pytest.approx((norms / 4, slow.passes))
    tiny = hidden.predict(large._replace(params=1e6), bandwidth)
    assert tiny.saved == pytest.approx(-tiny.norms / 8)  # L2 had saved both norms' worth


def test_hidden_norms_have_the_groups_of_the_library() -> None:
    assert hidden.GROUPS == early_sums.GROUPS


def test_places_on_the_chip() -> None:
    """By threads, 8 blocks of 256; by registers, 65536 / (64 * 256) = 4."""
    assert machine.slots("sum_sq") == 132 * 8
    assert machine.slots("perturb") == 132 * 6
    assert machine.slots("restore_adamw") == 132 * 4


def test_launches_are_bound_by_bytes_or_by_latencies() -> None:
    kernel, bandwidth = traffic.perturb(), 2.9e12
    large = waves.launch(kernel, [10**9, 5], bandwidth)
    assert large.seconds == pytest.approx(16e9 / bandwidth)
    assert large.blocks == math.ceil(10**9 / 16384) + 1
    alone = waves.launch(kernel, [1], bandwidth)
    assert (alone.blocks, alone.elements, alone.seconds) == (1, 1, pytest.approx(5 * machine.LATENCY))
    assert alone.idle == pytest.approx(1 - 1 / machine.slots("perturb"))
    many = waves.launch(kernel, [1, 0] * 7920, bandwidth)
    assert (many.blocks, many.idle) == (7920, 0)
    assert many.seconds == pytest.approx(10 * 5 * machine.LATENCY)
    packed = waves.launch(kernel, [1] * 7920, bandwidth, packed=True)
    assert (packed.blocks, packed.elements) == (990, 7920)


def test_lists() -> None:
    """Llama 3 8B has 8,030,261,248 parameters; the first of 64 processes has a 64th, rounded up."""
    shapes = waves.llama()
    assert (sum(map(math.prod, shapes)), len(shapes)) == (8_030_261_248, 291)
    assert sum(len(shape) == 1 for shape in shapes) == 65
    assert waves.shard([(130, 7), (5,), ()], 64) == [(3, 7), (1,), ()]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    predict.main(["--bandwidth", "2.9", "--models", "resnet50", "--tables", "kernels,ideas,walks,norms,small"])
    text = capsys.readouterr().out
    seconds = 25_557_032 * 4 / 2.9e12
    assert f"| perturb | 4 | {4 * seconds * 1e3:.3f} |" in text
    assert f"| swapped storages | 1 | {seconds * 1e3:.3f}, 0 |" in text
    assert "| resnet50 / 64 | 1.6 | 2.00 to 2.00 |" in text
    assert "| vit_l_16 | 8 | 2 fsdp, 360 GB/s | 350 |" in text
    assert "| 5000 scalars | 5000 | 5000 | 5000 | 1 |" in text
    assert torch.float32.itemsize == waves._ITEMSIZE

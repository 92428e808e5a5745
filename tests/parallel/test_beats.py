"""Who holds the others up, from made-up beats."""

from __future__ import annotations

import random

import pytest

from lesam_dist.parallel import beats
from lesam_dist.parallel.beats import Beat, Look, RunningClock, behind, usual
from lesam_dist.parallel.progress import At, Progress


def test_a_silent_rank_is_found_whatever_the_others_do(seed: int) -> None:
    """In ticks of a second, each rank's beat counts up in most; one stops for good."""
    draw = random.Random(seed)
    world_size, patience = draw.randint(2, 9), draw.randint(4, 9)
    victim, stops = draw.randrange(world_size), draw.randint(0, 20)
    look, numbers, last = Look(world_size, patience), [0] * world_size, [0] * world_size
    for now in range(stops + patience + 5):
        for rank in range(world_size):
            late = now - last[rank] < patience - 2 and draw.random() < 0.3  # a beat may come late, not too late
            if not late and not (rank == victim and now >= stops):
                numbers[rank] += 1
                last[rank] = now
        found = look.silent([Beat(number, At(0, "", None)) for number in numbers], now)
        if now < stops:
            assert found == []
        elif now >= stops + patience:
            assert found == [victim]


def test_those_behind_have_made_the_fewest_moves(seed: int) -> None:
    draw = random.Random(seed)
    moves = [draw.randint(3, 5) for _ in range(draw.randint(1, 8))]
    found = behind([Beat(0, At(count, "", None)) for count in moves])
    assert found == [rank for rank, count in enumerate(moves) if count == min(moves) != max(moves)]


def test_progress_keeps_what_is_not_said_anew_and_a_beat_carries_it() -> None:
    progress = Progress()
    assert str(progress.at) == "starting"
    progress.move("pass 1", 12)
    progress.move("pass 2")
    assert str(progress.at) == "step 12: pass 2"
    progress.move()
    assert progress.at == At(3, "pass 2", 12)
    assert Beat.load(Beat(7, progress.at).dump()) == Beat(7, progress.at)
    assert usual([Beat(n, progress.at) for n in range(2)] + [Beat(9, At(0, "starting", None))]) == progress.at


def test_the_clock_stands_still_while_the_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(beats.time, "monotonic", lambda: now)
    clock, total = RunningClock(longest=5), 0.0
    for pause in (1, 4, 1000, 2):
        now += pause
        total += min(pause, 5)
        assert clock.now() == total

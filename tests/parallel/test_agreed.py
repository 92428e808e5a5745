"""All processes act on a wish at the same call, whoever asks when, and however many steps they are apart."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from lesam_dist import parallel
from lesam_dist.parallel import agreed as module
from lesam_dist.parallel.agreed import Agreed, AgreedByAll, Wish
from tests.parallel import processes

Acts = list[tuple[int, Wish]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads look for rounds a hundred times as often."""
    monkeypatch.setattr(module, "_TICK", 0.01)
    monkeypatch.setattr(module, "_SOON", 0.0005)


@pytest.fixture
def group(quick: None) -> Iterator[Callable[..., list[AgreedByAll]]]:
    """Makes the ends of several ranks, which are threads here."""
    made: list[AgreedByAll] = []

    def make(world_size: int, timeout: float = 60) -> list[AgreedByAll]:
        store = dist.HashStore()
        ends = [AgreedByAll(store, rank, world_size, timeout) for rank in range(world_size)]
        made.extend(ends)
        for end in ends:
            end.start()
        return ends

    yield make
    for end in made:
        end.close()


def on_threads(ranks: int, function: Callable[[int], None]) -> None:
    """``function(rank)`` on each; none may hang, and the first error is raised."""
    errors: list[BaseException] = []

    def call(rank: int) -> None:
        try:
            function(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"


def test_alone() -> None:
    agreed = Agreed()
    assert (agreed.due(1), agreed.stopping) == (None, False)
    agreed.request("save")
    assert (agreed.due(2), agreed.due(3), agreed.stopping) == ("save", None, False)
    agreed.request("stop", "SIGTERM")
    agreed.request("save")
    assert (agreed.stopping, agreed.due(4), agreed.reason) == (True, "stop", "SIGTERM")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("ahead", [0, 5])
def test_all_act_at_one_call(group: Callable[..., list[AgreedByAll]], seed: int, ranks: int, ahead: int) -> None:
    """Hundreds of rounds; no rank gets more than ``ahead`` steps away from another, as with collectives on a device.

    A save is a collective, in which all wait for each other.
    """
    ends = group(ranks)
    steps = 2000
    reached = [0] * ranks
    moved = threading.Condition()
    saving = threading.Barrier(ranks)
    acts: list[Acts] = [[] for _ in range(ranks)]

    def train(rank: int) -> None:
        draw = random.Random(f"{seed} {rank}")
        for step in range(1, steps + 1):
            with moved:
                reached[rank] = step
                moved.notify_all()
                assert moved.wait_for(lambda step=step: min(reached) >= step - ahead, 60)  # type: ignore[misc]
            if draw.random() < 0.1:
                time.sleep(draw.random() * 0.004)
            if draw.random() < 0.2 / ranks:
                ends[rank].request("save")
            if step == steps - 100 and rank == ranks - 1:
                ends[rank].request("stop", "enough")
            wish = ends[rank].due(step)
            if wish:
                acts[rank].append((step, wish))
                saving.wait(60)
                if wish == "stop":
                    reached[rank] = 2 * steps
                    return

    on_threads(ranks, train)
    print(len(acts[0]), "rounds")
    assert all(of_rank == acts[0] for of_rank in acts)
    assert len(acts[0]) > 20
    assert acts[0][-1][1] == "stop"
    assert [wish for _, wish in acts[0][:-1]] == ["save"] * (len(acts[0]) - 1)
    assert all(end.stopping and end.reason == "enough" for end in ends)


def test_wishes_at_one_time_are_one_round(group: Callable[..., list[AgreedByAll]]) -> None:
    ends = group(3)
    together = threading.Barrier(3)
    acts: list[Acts] = [[], [], []]

    def train(rank: int) -> None:
        together.wait()
        ends[rank].request("stop" if rank == 1 else "save", f"by {rank}")
        for step in range(1, 400):
            time.sleep(0.001)
            wish = ends[rank].due(step)
            if wish:
                acts[rank].append((step, wish))

    on_threads(3, train)
    assert acts[0] == acts[1] == acts[2]
    # A wish that comes a moment too late makes a round of its own, and the stop is in one of the two.
    assert len(acts[0]) <= 2
    assert sum(wish == "stop" for _, wish in acts[0]) == 1
    assert {end.reason for end in ends} == {"by 1"}


def test_a_round_that_is_open_at_the_end_holds_nobody_up(group: Callable[..., list[AgreedByAll]]) -> None:
    ends = group(2)
    assert [end.due(1) for end in ends] == [None, None]
    ends[0].due(2)  # its last
    ends[1].request("stop")
    while not ends[0].stopping or ends[0]._target is None:
        time.sleep(0.001)
    assert ends[1].due(2) is None, "rank 0 has passed this one"
    # Another run of the same processes comes to it.
    assert [end.due(1) for end in ends] == ["stop", "stop"]


def test_who_waits_for_an_answer_in_vain_says_so(group: Callable[..., list[AgreedByAll]]) -> None:
    first, second = group(2, timeout=0.3)
    second._answer_round = lambda number, wanted: False  # type: ignore[method-assign]  # killed when it had noticed
    first.request("save")
    while first._answer is None:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="timed out waiting for the others' answers after step 7"):
        first.due(7)


def in_lockstep(world: parallel.Distributed, seed: int) -> tuple[Acts, bool]:
    """Steps with a barrier each, in real processes; each rank asks for saves, and the last for the end."""
    module._TICK, module._SOON = 0.02, 0.001
    draw = random.Random(f"{seed} {world.rank}")
    acts: Acts = []
    for step in range(1, 100_000):
        world.barrier()
        if draw.random() < 0.05:
            time.sleep(draw.random() * 0.01)
        if draw.random() < 0.02:
            world.agreed.request("save")
        if step == 500 and world.rank == world.world_size - 1:
            world.agreed.request("stop")
        if wish := world.agreed.due(step):
            acts.append((step, wish))
            world.barrier()
            if wish == "stop":
                break
    return acts, world.agreed.stopping


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_in_lockstep(seed: int, ranks: int) -> None:
    results = processes.run(in_lockstep, ranks, seed)
    assert all(result == results[0] for result in results)
    acts, stopping = results[0]
    assert stopping
    assert acts[-1][1] == "stop"
    assert len(acts) > 3

"""A run whose loss jumps goes back and leaves the batch out; whenever it is stopped, it decides the same."""

from __future__ import annotations

import json
import math
import random
from contextlib import suppress
from typing import Any

import pytest
import torch

from lesam_dist.config.schema import GuardConfig
from lesam_dist.errors import SharedError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.guard import LossGuard
from tests.parallel.processes import run

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
STEPS, EVERY = 120, 15  # of the toy run, and from one checkpoint to the next


class KilledError(Exception):
    """The process is gone."""


class Toy:
    """A run whose weight is the sum of the batches that it has learned from, and whose loss jumps with some of them."""

    def __init__(self, world: Distributed, seed: int, config: GuardConfig, disk: dict[str, str]) -> None:
        draw = random.Random(seed)
        self.world, self.config, self.disk = world, config, disk
        self.batches = [draw.random() for _ in range(STEPS)]
        self.bad = sorted(draw.sample(range(25, STEPS + 1), 4))
        self.skipped = set(draw.sample(range(1, STEPS), 10)) - set(self.bad)  # nan, or a jump that changes nothing
        self.trained: list[int] = []
        self.messages: list[str] = []
        self.guard = LossGuard(config, world)
        self.step, self.weight = 0, 0.0
        if "checkpoint" in disk:
            saved = json.loads(disk["checkpoint"])
            self.step, self.weight = saved["step"], saved["weight"]
            self.guard.load(saved["guard"])
        else:
            self.save()

    def save(self) -> None:
        state = {"step": self.step, "weight": self.weight, "guard": self.guard.state()}
        self.disk["checkpoint"] = json.dumps(state)

    def roll_back(self) -> None:
        saved = json.loads(self.disk["checkpoint"])
        self.messages.append(self.guard.remark())
        self.step, self.weight = saved["step"], saved["weight"]
        self.guard.load(saved["guard"])
        self.disk["checkpoint"] = json.dumps({**saved, "guard": self.guard.state()})

    def train(self, killed_after: float = math.inf) -> None:
        """To the end, or for so many turns of the loop, some of which are made again after a jump."""
        turns = 0
        while self.step < STEPS:
            if turns >= killed_after:
                raise KilledError
            turns += 1
            step = self.step + 1
            if not self.guard.leaves_out(step):
                self.learn(step)
            self.step = step
            due = step % EVERY == 0 or step == STEPS
            if self.guard.verdict(final=due) is not None:
                self.roll_back()
            elif due:
                self.save()

    def learn(self, step: int) -> None:
        loss = 3.0 - 0.01 * step + 0.1 * self.batches[step - 1] + 0.001 * self.world.rank
        loss += 5.0 if step in self.bad else 0.0
        skipped = step in self.skipped
        if skipped:
            loss = random.choice([math.nan, math.inf, 50.0])
        else:
            self.weight += self.batches[step - 1]
        self.trained.append(step)
        self.guard.observe(step, torch.tensor(loss), torch.tensor(float(skipped)))


def undisturbed(world: Distributed, seed: int) -> tuple[Any, ...]:
    toy = Toy(world, seed, GuardConfig(max_loss_increase=1.0), {})
    toy.train()
    kept = [b for step, b in enumerate(toy.batches, 1) if step not in toy.skipped and step not in toy.bad]
    assert toy.weight == pytest.approx(sum(kept), rel=1e-12)
    return toy.weight, toy.bad, toy.guard.state(), toy.trained, toy.messages


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_with_a_jump_are_left_out_one_after_the_other(seed: int, world_size: int) -> None:
    ranks = run(undisturbed, world_size, seed)
    assert all(rank == ranks[0] for rank in ranks)
    _, bad, state, trained, messages = ranks[0]
    assert [step for step, _, _ in state["left_out"]] == bad
    assert len(messages) == len(bad)
    assert f"step {bad[0]} (loss " in messages[0]
    assert "rollback 1 of 10" in messages[0]
    for step in bad:
        is_late = step % EVERY != 0  # it was known while the next one was computed, or before a checkpoint at once
        at = len(trained) - 1 - trained[::-1].index(step)
        assert (trained[at + 1 :][:1] == [step + 1]) == is_late
        after_bad = step - 1 in bad and (step - 1) % EVERY != 0
        assert trained.count(step) == 1 + after_bad, "a batch that was decided on cannot come again"


def test_a_run_that_is_stopped_anywhere_decides_the_same(seed: int) -> None:
    config, draw = GuardConfig(max_loss_increase=1.0), random.Random(seed)
    whole = Toy(ALONE, seed, config, {})
    whole.train()
    for _ in range(20):
        disk: dict[str, str] = {}
        for _ in range(draw.randrange(1, 5)):
            with suppress(KilledError):
                Toy(ALONE, seed, config, disk).train(killed_after=draw.randrange(EVERY, STEPS))
        last = Toy(ALONE, seed, config, disk)
        last.train()
        assert (last.weight, last.guard.state()) == (whole.weight, whole.guard.state())


def test_the_average_is_the_formula(seed: int) -> None:
    guard = LossGuard(GuardConfig(max_loss_increase=100.0), ALONE)
    losses = [random.random() for _ in range(70)]
    for step, loss in enumerate(losses, 1):
        guard.observe(step, torch.tensor(loss, dtype=torch.float64))
        assert guard.verdict() is None
    assert guard.verdict(final=True) is None
    weights = [0.98 ** (len(losses) - 1 - i) for i in range(len(losses))]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert guard.average == pytest.approx(expected, rel=1e-12)


def test_the_first_twenty_losses_are_only_taken_in() -> None:
    guard = LossGuard(GuardConfig(max_loss_increase=0.5), ALONE)
    for step in range(1, 21):
        guard.observe(step, torch.tensor(float(step)))
    assert guard.verdict(final=True) is None
    guard.observe(21, torch.tensor(guard.average + 0.49))
    assert guard.verdict(final=True) is None
    limit = guard.average + 0.51
    guard.observe(22, torch.tensor(limit))
    with pytest.raises(RuntimeError, match="verdict"):
        guard.state()
    guard.observe(23, torch.tensor(1e9))
    assert guard.verdict() == 22
    guard.load({"sum": 1.0, "count": 30, "left_out": [[7, 9.0, 2.0]]})
    assert guard.leaves_out(22)
    assert guard.leaves_out(7)
    assert not guard.leaves_out(23), "it was computed at weights that are gone"


def test_after_too_many_jumps_the_run_stops() -> None:
    guard = LossGuard(GuardConfig(max_loss_increase=0.5, max_rollbacks=2), ALONE)
    for step in range(1, 31):
        guard.observe(step, torch.tensor(2.0))
    assert guard.verdict(final=True) is None
    state = guard.state()
    for step in (31, 32):
        guard.observe(step, torch.tensor(3.25))
        assert guard.verdict(final=True) == step
        guard.load(state)
    assert guard.rollbacks == 2
    guard.observe(33, torch.tensor(4.5))
    with pytest.raises(SharedError) as caught:
        guard.verdict(final=True)
    message = str(caught.value)
    assert "3 times, and guard.max_rollbacks is 2: at step 31 (loss 3.25, average before it 2), step 32" in message
    assert "step 33 (loss 4.5" in message
    assert len(message.splitlines()) == 1


def test_switched_off_it_looks_at_nothing() -> None:
    guard = LossGuard(GuardConfig(), ALONE)
    for step in range(1, 100):
        guard.observe(step, torch.tensor(10.0**step if step < 30 else math.nan))
        assert guard.verdict() is None
        assert not guard.leaves_out(step)
    assert not guard.is_on
    assert guard.state() == {"sum": 0.0, "count": 0, "left_out": []}

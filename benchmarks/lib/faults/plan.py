"""Draws the faults: a chain of them is a function of the campaign's seed and the chain's number alone."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lib.faults.damage import can_mount
from lib.faults.images import TRAIN
from lib.faults.points import Action, Place, Point
from lib.faults.scenarios import BATCH, SCENARIOS, STEPS, Scenario

STARTING: tuple[Place, ...] = ("start", "joined", "claimed", "built", "loading", "loaded")
_SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigusr1": signal.SIGUSR1, "sigusr2": signal.SIGUSR2}
_DAMAGES = ("truncated", "bit-flip", "zeros", "missing", "garbage", "pointer", "torn-log")
BAD_IMAGES = ("empty", "truncated", "header", "garbage", "zeros", "html", "flipped", "swapped")
Parent = Literal["continue", "kill", "second-job", "damage", "remount", "cut"]


@dataclass(frozen=True)
class Fault:
    """One fault, and the start of the run that it strikes.

    Attributes:
        kind: for the table.
        actions: what the processes do to themselves.
        parent: what the parent does when a process has stopped itself (continue, kill, second-job) or asks for it
            (cut: the network), before the start (remount: the disk is read-only), or when it is over (damage).
        value: of it: seconds, or the seed of a damage.
        as_torchrun: whether survivors are ended by the launcher, or find out by themselves.
        outside: a signal from outside: (time as a part of an undisturbed run's, number, ranks).
        small_disk: the run lies on a disk of its own that has room for little.
        asks: it only asks the run to end, which saves what it has, and loses no step.
        resize: processes from the next start on.
    """

    kind: str
    actions: tuple[Action, ...] = ()
    parent: Parent | None = None
    value: float = 0.0
    as_torchrun: bool = True
    outside: tuple[float, int, tuple[int, ...]] | None = None
    small_disk: bool = False
    asks: bool = False
    resize: int | None = None


@dataclass(frozen=True)
class Variant:
    """What is wrong with the data of all starts of a chain, and of the run that it is compared with.

    Attributes:
        bad: number of the training image that is broken, and how.
        spoilt: where the images become NaN, or the loss so large that the guard leaves the batch out.
        flags: of the run, on top of its scenario's.
    """

    bad: tuple[int, str] | None = None
    spoilt: Action | None = None
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A name for a folder."""
        if self.bad:
            return "bad-{}-{}".format(*self.bad)
        if self.spoilt:
            return f"{self.kind}-{self.spoilt.point.place}-{self.spoilt.point.step}-{self.spoilt.rank}"
        return "plain"

    @property
    def kind(self) -> str:
        """What it is in the table."""
        if self.spoilt:
            return "nan" if self.spoilt.deed == "nan" else "loss-jump"
        return "bad-image" if self.bad else "none"

    @property
    def left_out(self) -> int | None:
        """The step whose batch is read and not trained on."""
        return self.spoilt.point.step if self.spoilt and self.spoilt.deed == "jump" else None


@dataclass(frozen=True)
class Chain:
    """Faults of one run in a row, with a resume after each."""

    number: int
    scenario: Scenario
    variant: Variant
    faults: tuple[Fault, ...]

    def only(self, index: int) -> Chain:
        """The same with a single one of its faults."""
        return replace(self, faults=(self.faults[index],))


Draw = random.Random
Make = Callable[[Draw, Scenario, int], Fault]


def _rank(draw: Draw, scenario: Scenario) -> int:
    return draw.randrange(scenario.world_size)


def _kill(*places: Place, early: bool = False) -> Make:
    def make(draw: Draw, scenario: Scenario, step: int) -> Fault:
        point = Point(draw.choice(places), 0 if early else step)
        action = Action(point, "signal", signal.SIGKILL, _rank(draw, scenario))
        # Who waits for one that never came waits for the time limit, unless the launcher ends it.
        return Fault("", (action,), as_torchrun=draw.random() < 0.8 or point.place == "start")

    return make


def _kill_in_save(draw: Draw, scenario: Scenario, step: int) -> Fault:
    rank = _rank(draw, scenario)
    after = draw.randrange(20 if rank == 0 else 2)
    point = draw.choice([Point("save", step), Point("saved", step), *[Point("files", max(1, step), after)] * 4])
    return Fault("", (Action(point, "signal", signal.SIGKILL, rank),), as_torchrun=draw.random() < 0.8)


def _kill_anytime(draw: Draw, scenario: Scenario, step: int) -> Fault:
    ranks = tuple(range(scenario.world_size)) if draw.random() < 0.2 else (_rank(draw, scenario),)
    return Fault("", outside=(draw.uniform(0, 1), signal.SIGKILL, ranks), as_torchrun=draw.random() < 0.8)


def _ask_to_end(number: int) -> Make:
    def make(draw: Draw, scenario: Scenario, step: int) -> Fault:
        if draw.random() < 0.2:
            return Fault("", outside=(draw.uniform(0, 1), number, tuple(range(scenario.world_size))), asks=True)
        places: tuple[Place, ...] = ("pass1", "climbs", "perturbed", "stepped", "save", "evaluate", "files", "loaded")
        point = Point(draw.choice(places[: None if scenario.passes > 1 else 2]), step)
        if point.place == "loaded":
            point = replace(point, step=0)
        return Fault("", (Action(point, "signal", number, draw.choice([None, _rank(draw, scenario)])),), asks=True)

    return make


def _damage(name: str) -> Make:
    def make(draw: Draw, scenario: Scenario, step: int) -> Fault:
        # Late, so that there is an older checkpoint to go back to.
        point = Point(draw.choice(["pass1", "climbs"]), max(step, draw.randrange(2 * TRAIN // BATCH + 1, STEPS)))
        action = Action(point, "signal", signal.SIGKILL, _rank(draw, scenario))
        return Fault("", (action,), "damage", draw.randrange(2**31))

    return make


def _full_disk(draw: Draw, scenario: Scenario, step: int) -> Fault:
    fill = Action(Point("pass1", step), "fill", draw.choice([0, 4096, draw.randrange(400_000)]), 0)
    free = Action(Point("pass1", step + draw.randint(3, 8)), "free", 0.0, 0)
    return Fault("", (fill, free), small_disk=True)


def _read_only(draw: Draw, scenario: Scenario, step: int) -> Fault:
    if can_mount() and draw.random() < 0.3:
        return Fault("", parent="remount", small_disk=True)
    rank = draw.choice([None, 0])
    begin = Action(Point("pass1", step), "readonly", 0.0, rank)
    return Fault("", (begin, Action(Point("pass1", step + draw.randint(3, 8)), "writable", 0.0, rank)))


def _stall(draw: Draw, scenario: Scenario, step: int) -> Fault:
    place: Place = draw.choice(["pass1", "climbs", "save", "evaluate", "stepped"][: 4 if scenario.passes < 2 else 5])
    action = Action(Point(place, step), "stop", 0.0, _rank(draw, scenario))
    return Fault("", (action,), draw.choice(["continue", "kill"]), draw.uniform(0.1, 1.5))


def _second_job(draw: Draw, scenario: Scenario, step: int) -> Fault:
    place: Place = draw.choice(["claimed", "pass1", "save"])
    return Fault("", (Action(Point(place, 0 if place == "claimed" else step), "stop", 0.0, 0),), "second-job")


def _clock(draw: Draw, scenario: Scenario, step: int) -> Fault:
    jump = draw.choice([-1, 1]) * draw.choice([3600, 86400, 10 * 365 * 86400])
    return Fault("", (Action(Point("pass1", step), "clock", jump, draw.choice([None, _rank(draw, scenario)])),))


def _unplug(draw: Draw, scenario: Scenario, step: int) -> Fault:
    point = Point(draw.choice(["pass1", "climbs", "save", "evaluate"]), step)
    return Fault("", (Action(point, "unplug", 0.0, _rank(draw, scenario)),), as_torchrun=draw.random() < 0.5)


def _resize(draw: Draw, scenario: Scenario, step: int) -> Fault:
    action = Action(Point(draw.choice(["pass1", "climbs"]), step), "signal", signal.SIGKILL, _rank(draw, scenario))
    return Fault("", (action,), resize=draw.choice([1, 4]))


def _cut_link(draw: Draw, scenario: Scenario, step: int) -> Fault:
    point = Point(draw.choice(["pass1", "climbs", "save"]), step)
    return Fault("", (Action(point, "cut", 0.0, _rank(draw, scenario)),), "cut", as_torchrun=False)


KINDS: dict[str, tuple[Make | None, int]] = {
    "kill-start": (_kill(*STARTING, early=True), 4),
    "kill-pass1": (_kill("pass1", "climbs"), 6),
    "kill-perturbed": (_kill("perturbed"), 6),
    "kill-pass2": (_kill("stepped"), 6),
    "kill-save": (_kill_in_save, 12),
    "kill-evaluation": (_kill("evaluate", "evaluated"), 4),
    "kill-anytime": (_kill_anytime, 8),
    **{name: (_ask_to_end(number), 4) for name, number in _SIGNALS.items()},
    **{name: (_damage(name), 4) for name in _DAMAGES},
    "full-disk": (_full_disk, 4),
    "read-only": (_read_only, 4),
    "stall": (_stall, 4),
    "unplugged": (_unplug, 4),
    "clock-jump": (_clock, 4),
    "second-job": (_second_job, 2),
    "resized": (_resize, 2),
    "link-cut": (_cut_link, 1),
    "bad-image": (None, 6),
    "nan": (None, 6),
    "loss-jump": (None, 2),
}
"""How each kind is drawn, and how often, relative to the others. None: a `Variant` of the whole chain."""

_MOST = 4  # faults of a chain


def draw_chain(seed: int, number: int, kinds: Sequence[str], scenarios: Sequence[Scenario] = SCENARIOS) -> Chain:
    """Chain ``number`` of the campaign with this seed."""
    draw = random.Random(f"{seed}/{number}")
    scenario = draw.choices(scenarios, [s.share for s in scenarios])[0]
    weights = {kind: KINDS[kind][1] for kind in kinds if kind not in scenario.without}
    chosen = draw.choices(list(weights), list(weights.values()), k=draw.randint(1, _MOST)) if weights else []
    variant = Variant()
    faults = []
    for kind in sorted(chosen, key=lambda kind: KINDS[kind][0] is not None):  # a variant first: it is of the whole run
        make = KINDS[kind][0]
        if make is not None:
            faults.append(kind)
        elif variant == Variant():
            variant = _variant(draw, kind, scenario)
    others = [kind for kind in weights if KINDS[kind][0] is not None]
    if not faults and others:  # what is wrong with the data shows in a resume
        faults.append(draw.choice(others))
    # In the order of their steps, so that a resume from an older checkpoint comes by all that follow.
    steps = sorted(draw.randrange(STEPS) for _ in faults)
    if "resized" in faults:  # once, and last: another number of processes gives other bits
        faults = [*(kind for kind in faults if kind != "resized"), "resized"]
        steps = steps[: len(faults)]
    made = [replace(KINDS[kind][0](draw, scenario, step), kind=kind) for kind, step in zip(faults, steps, strict=True)]  # type: ignore[misc]
    return Chain(number, scenario, variant, tuple(made))


def _variant(draw: Draw, kind: str, scenario: Scenario) -> Variant:
    """One of a few, since each needs an undisturbed run of its own."""
    if kind == "bad-image":
        how = draw.randrange(len(BAD_IMAGES))
        return Variant(bad=(5 * how + 1, BAD_IMAGES[how]))
    if kind == "loss-jump":  # every rank's images, and late: the guard looks from the 21st step on
        jump = Action(Point("pass1", draw.choice([20, 22])), "jump", 100.0, always=True)
        return Variant(spoilt=jump, flags=("--guard.max_loss_increase", "4"))
    place: Place = draw.choice(["pass1", "perturbed"]) if scenario.passes > 1 else "pass1"
    step = draw.choice([3, 7, 12])
    return Variant(spoilt=Action(Point(place, step), "nan", 0.0, step % scenario.world_size, always=True))

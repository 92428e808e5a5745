"""A run that does not get on: who holds the others up, what each is doing, and when it ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lesam_dist.parallel import stacks
from lesam_dist.parallel.beats import Beat, Look, RunningClock, behind, usual
from lesam_dist.parallel.board import Board
from lesam_dist.parallel.meeting import Member
from lesam_dist.parallel.place import Place
from lesam_dist.parallel.progress import Progress
from lesam_dist.parallel.report import name_of, some_of


class StallWatch:
    """Looks, again and again, whether one process holds the others up.

    Args:
        board: where all give their beats.
        members: all processes by rank.
        place: this process.
        progress: of this process.
        warn_after: seconds without a move after which a process that holds the others up is named.
        timeout: seconds after which it ends the run.
        clock: looked at once a look at least.
    """

    def __init__(
        self,
        board: Board,
        members: Sequence[Member],
        place: Place,
        progress: Progress,
        warn_after: float,
        timeout: float,
        clock: RunningClock,
    ) -> None:
        self._board, self._members, self._place, self._progress = board, members, place, progress
        self._warn_after, self._timeout, self._clock = warn_after, timeout, clock
        self._look = Look(place.world_size, warn_after / 2)
        self._dumped = ""

    def over(self) -> bool:
        """Look once; print what there is to say, unless another process has.

        Returns:
            Whether the run has to end, as one process has kept the others waiting for too long.
        """
        now = self._clock.now()
        waits = self._look.waits(self._progress.at, now)
        if waits >= self._warn_after:
            self._dump_stacks()
        if waits < self._warn_after / 2 or self._place.local_rank > 1:  # the second speaks where the first is silent
            return False
        beats = self._board.beats()
        silent, late = self._look.silent(beats, now), behind(beats)
        if waits < self._warn_after or not (silent or late):
            return False
        culprits = silent or late
        others = [rank for rank in range(len(beats)) if rank not in culprits] or [self._place.rank]
        ends = waits >= self._timeout
        key = f"{'end' if ends else 'warning'}/{min(beat.at.moves for beat in beats)}/{bool(silent)}"
        if self._board.is_first(key):
            limit = f", parallel.timeout_s is {self._timeout:g}" if ends else ""
            text = f"no step for {waits:.0f} s{limit}: {self._describe(beats, culprits, bool(silent))}; "
            text += f"the others wait ({usual([beats[rank] for rank in others])})."
            if not ends:
                text += self._ask_for_stacks(key, [*culprits[:1], others[0]])
            print(f"lesam-dist: {'error' if ends else 'warning'}: {text}", file=sys.stderr, flush=True)
        return ends

    def _describe(self, beats: Sequence[Beat], culprits: Sequence[int], silent: bool) -> str:
        texts = []
        for rank in culprits:
            name = name_of(rank, self._members[rank].host, self._place.world_size > self._place.local_world_size)
            state = "behind"
            if silent:
                is_stopped = self._members[rank].state() == "stopped"
                state = "silent, stopped by a signal" if is_stopped else "silent, stopped or cut off"
            texts.append(f"{name} is {state} ({'last seen in ' if silent else ''}{beats[rank].at})")
        return some_of(texts)

    def _ask_for_stacks(self, key: str, ranks: Sequence[int]) -> str:
        """Have these processes write down what their threads are doing; returns where that will be."""
        for rank in ranks:
            self._board.ask_for_stacks(rank, key)
        folder = self._progress.stacks
        names = " and ".join(stacks.file_name(rank) for rank in sorted(set(ranks)))
        return " Their stacks follow." if folder is None else f" Stacks: {names} in {folder}."

    def _dump_stacks(self) -> None:
        asked = self._board.asked_for_stacks()
        if asked != self._dumped:
            self._dumped = asked
            stacks.dump(self._place, self._progress)

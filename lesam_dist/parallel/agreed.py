"""What all processes do after one and the same step, at the wish of any of them: save, or save and stop.

Host threads may be steps apart (NCCL's collectives do not wait for the host), so a wish cannot simply take effect
"now", and a collective per step, which would settle it, costs time in every step of a week. Instead:

- A wish opens a round, in the store that the processes share.
- A thread of each process looks there once a second. When all have noticed the round, each answers with the call of
  `Agreed.due` that its main thread is heading for, and that binds: the main thread waits in that call until all answers
  are there.
- The latest of the answers is where all act. Nobody has passed it, and everybody can reach it: who waits has already
  taken part in all that the others still need of it, and answers come from threads, which wait for nobody.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Literal

from torch.distributed.distributed_c10d import PrefixStore, Store

Wish = Literal["save", "stop"]

_TICK = 1.0  # seconds between two looks for a round of another process
_SOON = 0.03  # the same while answers are missing
_PART = 5.0  # seconds that a process which stops waits for the others


class Agreed:
    """The wishes of a process that is alone."""

    def __init__(self) -> None:
        self._wish: Wish | None = None
        self._stopping = False
        self._reason = ""

    def request(self, wish: Wish, reason: str = "") -> None:
        """Ask for it, from any process, thread or signal handler. Of both at one time "stop" wins, which saves too.

        Args:
            wish: what to do.
            reason: why to stop, as `reason` tells it.
        """
        if wish == "stop":
            self._learn_of_stop(reason)
        if self._wish != "stop":
            self._wish = wish

    def due(self, step: int) -> Wish | None:
        """What is to be done now, the same on all processes; costs a lock and a look at an attribute.

        Every process calls it equally often: after each step, and anywhere else where all are in step. "stop" is due
        once; then the run ends.

        Args:
            step: steps made so far in this run, for messages.

        Raises:
            RuntimeError: another process did not answer within the time limit, or the store has gone.
        """
        wish, self._wish = self._wish, None
        return wish

    @property
    def stopping(self) -> bool:
        """Whether any process is known to have asked to stop: what saves nothing that the last checkpoint lacks may be
        left out. Another process may learn of it up to a second later, or, of this one's wish, earlier."""
        return self._stopping

    @property
    def reason(self) -> str:
        """Why to stop, by the first process that is known to have asked; "" where none has, or without a reason."""
        return self._reason

    def _learn_of_stop(self, reason: str) -> None:
        if not self._stopping:
            self._reason, self._stopping = reason, True


class AgreedByAll(Agreed):
    """The wishes of several processes.

    Args:
        store: of the group; a connection of its own is made.
        rank: of this process.
        world_size: number of processes.
        timeout: seconds that `due` waits for the others' answers.
        is_over: whether the run is known to end for a failure. The store may go then, of which torch would tell at
            length whoever asks it: nobody does.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, timeout: float, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__()
        self._is_over = is_over
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may outlive a restart
        self._store = PrefixStore(f"lesam_dist/{attempt}/agreed", store.clone())
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        # SimpleQueue.put may interrupt itself, so that a signal handler can ask while the main thread does.
        self._asked: SimpleQueue[tuple[Wish, str] | None] = SimpleQueue()
        self._over = False
        self._changed = threading.Condition()  # guards all below
        self._calls = 0  # of `due`
        self._round = 0  # the open one, or else the next
        self._answer: int | None = None  # of this process in the open round: a call of `due`
        self._target: int | None = None  # the call at which all act
        self._broken: str | None = None  # why there will be no target
        self._thread = threading.Thread(target=self._serve, name="agreed", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more; called when no process will call `due` again."""
        self._over = True
        self._asked.put(None)
        if self._thread.is_alive():
            self._thread.join(_TICK)

    def part(self) -> None:
        """After a stop: wait a little until all have come here, as the store may end with this process.

        No collective, since a process may leave where another is in one.
        """
        with suppress(RuntimeError):
            missing = self._store.add("parted", 1) < self._world_size
            until = time.monotonic() + _PART
            while missing and time.monotonic() < until:
                time.sleep(_SOON)
                missing = self._store.add("parted", 0) < self._world_size

    def request(self, wish: Wish, reason: str = "") -> None:
        """See `Agreed`."""
        if wish == "stop":
            self._learn_of_stop(reason)
        self._asked.put((wish, reason))

    def due(self, step: int) -> Wish | None:
        """See `Agreed`."""
        with self._changed:
            self._calls += 1
            if self._answer is None or self._calls < self._answer:
                return None
            if self._target is None:
                self._wait_for_target(step)
            if self._calls != self._target:
                return None
            wish = self._wish
            self._wish = self._answer = self._target = None
            self._round += 1
        self._asked.put(None)  # a wish that came too late for this round opens the next
        return wish

    def _wait_for_target(self, step: int) -> None:
        until = time.monotonic() + self._timeout
        while self._target is None:
            if self._broken is not None:
                raise RuntimeError(f"the connection was closed while ranks agreed on what to do: {self._broken}")
            if time.monotonic() >= until:
                raise RuntimeError(f"timed out waiting for the others' answers after step {step}")
            self._changed.wait(_TICK)

    def _serve(self) -> None:
        wanted: tuple[Wish, str] | None = None
        noticed = -1  # the last round that this process has said to know of
        try:
            while not self._over:
                with self._changed:
                    number, answered, settled = self._round, self._answer is not None, self._target is not None
                waits = number == noticed and not settled
                try:
                    asked = self._asked.get(timeout=_SOON if waits else _TICK)
                except Empty:
                    asked = None
                if self._is_over():
                    raise RuntimeError("another process has failed")
                if asked is not None and (wanted is None or wanted[0] != "stop"):
                    wanted = asked
                if number != noticed and self._notice(number, wanted):
                    noticed = number
                if number == noticed and not answered and self._answer_round(number, wanted):
                    answered, wanted = True, None
                if answered and not settled:
                    self._read_answers(number)
        except RuntimeError as error:  # the store has gone, and with it the run
            with self._changed:
                self._broken = str(error).strip().partition("\n")[0]
                self._changed.notify_all()

    def _notice(self, number: int, wanted: tuple[Wish, str] | None) -> bool:
        """Open a round with a wish, or find one that another process has opened."""
        opened = f"{number}/opened"
        if wanted is not None:
            self._store.set(opened, json.dumps(wanted))
        elif self._store.check([opened]):
            wish, reason = json.loads(self._store.get(opened))
            if wish == "stop":
                self._learn_of_stop(reason)
        else:
            return False
        self._store.add(f"{number}/noticed", 1)
        return True

    def _answer_round(self, number: int, wanted: tuple[Wish, str] | None) -> bool:
        """Answer it once all have noticed it: whoever answered before would wait for those who look once a second."""
        if self._store.add(f"{number}/noticed", 0) < self._world_size:
            return False
        with self._changed:
            self._answer = call = self._calls + 1
        self._store.set(f"{number}/{self._rank}", json.dumps([call, wanted]))
        return True

    def _read_answers(self, number: int) -> None:
        keys = [f"{number}/{rank}" for rank in range(self._world_size)]
        if not self._store.check(keys):
            return
        answers = [json.loads(text) for text in self._store.multi_get(keys)]
        wishes = [wanted for _, wanted in answers if wanted is not None]
        for wish, reason in wishes:
            if wish == "stop":
                self._learn_of_stop(reason)
        with self._changed:
            self._wish = "stop" if any(wish == "stop" for wish, _ in wishes) else "save"
            self._target = max(call for call, _ in answers)
            self._changed.notify_all()

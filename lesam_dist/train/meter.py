"""How fast a run trains, and what share of its time goes where."""

from __future__ import annotations

from typing import NamedTuple

from lesam_dist.train.flops import Flops
from lesam_dist.train.phases import COMMUNICATION, DATA, DRAW, OPTIMIZER, PASS_1, PASS_2, Clock

SHARE = "share_"
TIMED = (
    *("images_per_s", "images_per_s_per_device", DATA, f"{DATA}_max"),
    *(SHARE + phase for phase in (DRAW, PASS_1, PASS_2, OPTIMIZER, COMMUNICATION)),
    *("tflops_per_device", "mfu"),
)
"""What a run logs of its speed: of two equal runs, all that differs."""


class _Sums(NamedTuple):
    """What there has been until some moment."""

    seconds: dict[str, float]
    steps: int
    flops: float

    def since(self, before: _Sums) -> _Sums:
        seconds = {phase: value - before.seconds.get(phase, 0.0) for phase, value in self.seconds.items()}
        return _Sums(seconds, self.steps - before.steps, self.flops - before.flops)


class Meter:
    """Throughput and shares of the time, since the last reading.

    Args:
        clock: of the run; its phases are told by others.
        batch_size: images of a step, over all processes.
        processes: number of them, each of which has a device.
        shares: the phases, beside the wait for data, whose share is told. The same on all processes.
        flops: of the model, where they are known.
    """

    def __init__(
        self, clock: Clock, batch_size: int, processes: int, shares: tuple[str, ...], flops: Flops | None = None
    ) -> None:
        self._clock, self._batch_size, self._processes = clock, batch_size, processes
        self._shares, self._model = shares, flops
        self._steps, self._flops = 0, 0.0
        self._last = _Sums({}, 0, 0.0)
        self._warm: _Sums | None = None  # after the first reading

    def count_step(self) -> None:
        """One more step has its batch."""
        self._steps += 1

    def count_images(self, forward: float, backward: float) -> None:
        """So many images of this process went through the model, forward and backward, in the passes of a step."""
        if self._model is not None:
            self._flops += forward * self._model.forward + backward * self._model.backward

    def rates(self) -> dict[str, float]:
        """``images_per_s``, ``data_wait`` and more of `TIMED`; waits for the device, as reading a step's loss does."""
        now = self._read()
        since = now.since(self._last)
        self._last = now
        self._warm = self._warm or now
        elapsed = sum(since.seconds.values())
        images = self._images_per_s(since)
        rates = {"images_per_s": images, "images_per_s_per_device": images / self._processes}
        rates[DATA] = since.seconds.get(DATA, 0.0) / elapsed
        rates |= {SHARE + phase: since.seconds.get(phase, 0.0) / elapsed for phase in self._shares}
        return rates | (self._model.rates(since.flops, elapsed) if self._model else {})

    def steady_images_per_s(self) -> float:
        """Of all steps after the first reading, or of all where there are none; 0 before the first step."""
        now = self._read()
        late = now.since(self._warm) if self._warm else now
        chosen = late if late.steps else now
        return self._images_per_s(chosen) if chosen.steps else 0.0

    def _images_per_s(self, sums: _Sums) -> float:
        return sums.steps * self._batch_size / sum(sums.seconds.values())

    def _read(self) -> _Sums:
        return _Sums(self._clock.read(), self._steps, self._flops)

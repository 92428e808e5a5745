"""A trace of some steps of a run, by torch's profiler, for `--profile STEPS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, schedule

from lesam_dist.config.schema import Config
from lesam_dist.errors import SharedError
from lesam_dist.train.phases import Phases
from lesam_dist.train.profile_summary import Operation, Profiled, summarize
from lesam_dist.train.telemetry import RunLog

WARM_UP = 3  # steps before, in the last of which the profiler is on already, but keeps nothing


@contextmanager
def profiling(
    config: Config, phases: Phases, run_dir: Path | None, log: RunLog | None, steps_left: int
) -> Iterator[Callable[[], None]]:
    """Around the steps of a run; gives what is to be called after each of them.

    Args:
        config: the run.
        phases: of the steps, of this process; each writes its own trace.
        run_dir: where traces go, into the folder ``profile``.
        log: shows rank 0's summary.
        steps_left: that the run will make.

    Raises:
        SharedError: for a run that is too short for the steps that were asked for.
    """
    if config.profile is None or run_dir is None:
        yield lambda: None
        return
    wanted = WARM_UP + config.profile
    if steps_left < wanted:
        raise SharedError(
            f"profile is {config.profile} but the run has {steps_left} steps left, of which the first {WARM_UP} are "
            f"left out: profile at most {max(0, steps_left - WARM_UP)}, or raise epochs."
        )
    traced = _Traced(config, phases, run_dir / "profile", log)
    try:
        yield traced.after_step
    finally:
        traced.stop()


class _Traced:
    """Counts steps, and has some of them traced."""

    def __init__(self, config: Config, phases: Phases, folder: Path, log: RunLog | None) -> None:
        assert config.profile is not None
        self._config, self._world, self._phases, self._log = config, phases.world, phases, log
        self._steps, self._folder = config.profile, folder
        self._made, self._before = 0, dict[str, float]()
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler: Any = profile(
            activities=activities, schedule=schedule(wait=WARM_UP - 1, warmup=1, active=self._steps, repeat=1)
        )
        self._profiler.start()

    def after_step(self) -> None:
        """A step is over."""
        if self._profiler is None:
            return
        self._made += 1
        ends = self._made == WARM_UP + self._steps
        if self._made == WARM_UP:
            self._before = self._phases.clock.read()  # waits for the device, whose queue is then empty
            self._phases.trace(True)
        elif ends:
            self._phases.trace(False)
            seconds = self._phases.clock.read()
            seconds = {phase: value - self._before.get(phase, 0.0) for phase, value in seconds.items()}
        self._profiler.step()
        if ends:
            self._finish(seconds)

    def stop(self) -> None:
        """Also of a run that ends before."""
        if self._profiler is not None:
            self._phases.trace(False)
            self._profiler.stop()
            self._profiler = None

    def _finish(self, seconds: dict[str, float]) -> None:
        last = self._world.progress.at.step or 0
        profiler = self._profiler
        self.stop()
        steps = f"steps_{last - self._steps + 1}_to_{last}"
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / f"{steps}_rank_{self._world.rank}.json.gz"))
        if self._log:
            found = Profiled(self._steps, seconds, operations(profiler), str(self._folder / f"{steps}_rank_*.json.gz"))
            self._log.print(summarize(found, self._config, self._world))
        self._phases.clock.leave_out()  # what this took


def operations(profiler: Any) -> list[Operation]:
    """What was computed, the dearest first: a GPU's kernels, or the operations of a CPU, without what they call."""
    averages = [each for each in profiler.key_averages() if not each.is_user_annotation]
    kernels = [each for each in averages if each.device_type == DeviceType.CUDA]
    if kernels:
        found = [Operation(each.key, each.count, each.self_device_time_total / 1e6) for each in kernels]
    else:
        found = [Operation(each.key, each.count, each.self_cpu_time_total / 1e6) for each in averages]
    return sorted(found, key=lambda each: -each.seconds)

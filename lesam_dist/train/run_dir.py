"""The folder that a run writes to: claimed by one run at a time, and never another's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lesam_dist.config.command_line import dump, parse
from lesam_dist.config.same_run import check_same_run, differences, is_longer, require_longer
from lesam_dist.config.schema import Config
from lesam_dist.config.values import flatten
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.run_lock import Holder, Lock
from lesam_dist.train.telemetry import METRICS

CONFIG = "config.yaml"
_LOCK = ".lock"


@dataclass
class RunDir:
    """A folder that is this run's until `release`, or until the process ends in whatever way."""

    path: Path
    _lock: Lock | None = None  # on rank 0

    def release(self) -> None:
        """Let another run have it."""
        if self._lock is not None:
            self._lock.release()


def claim(config: Config, world: Distributed) -> RunDir:
    """Make the run's folder and write config.yaml, on rank 0. A file that is there stays as it is.

    Where torchrun has started this run's own processes again, ``config.resume`` becomes "auto" on every rank.

    Raises:
        UserError: another run is at it; it holds a run and nothing says to resume it; the resumed run's config or a
            config.yaml in it says something else; or it cannot be written.
    """
    run_dir = RunDir(Path(config.run_dir))
    if world.is_main:
        if config.resume is None and _is_restarted(run_dir.path):
            print(f"started again by torchrun: going on with the run in {run_dir.path}", flush=True)
            config.resume = "auto"
        try:
            run_dir = _claim(config, world, run_dir.path)
        except OSError as error:
            raise UserError(f"run_dir '{run_dir.path}' cannot be written: {error.strerror or error}.") from error
    config.resume = world.share(config.resume)
    return run_dir


def _is_restarted(path: Path) -> bool:
    holder = Holder.read(path / _LOCK)
    return holder is not None and holder.is_restarting


def _claim(config: Config, world: Distributed, path: Path) -> RunDir:
    checkpoints = Checkpointer(path / "checkpoints", world, config.checkpoint)
    if config.resume is None and ((path / METRICS).exists() or checkpoints.exist()):
        raise UserError(f"run_dir '{path}' already holds a run: go on with --resume auto, or choose another --run_dir.")
    path.mkdir(parents=True, exist_ok=True)
    lock = Lock(path / _LOCK, lambda text: print(f"warning: {text}", flush=True))
    try:
        saved = checkpoints.progress()
        if saved is not None and is_longer(config, saved["config"], saved["epoch"]):
            require_longer(config, saved["config"], "then")
            _replace_config(config, path / CONFIG)
        else:
            if saved is not None:
                check_same_run(config, saved["config"])
            _write_config(config, path / CONFIG)
    except BaseException:
        lock.release()
        raise
    return RunDir(path, lock)


def _write_config(config: Config, file: Path) -> None:
    text = dump(config)
    if not file.exists():
        file.write_text(text, encoding="utf-8")
    elif file.read_bytes() != text.encode():
        _require_same(config, file)


def _replace_config(config: Config, file: Path) -> None:
    """With that of a longer run; the old one stays beside it, as config.N_epochs.yaml."""
    if file.exists():
        there = _parsed(file)
        if there.epochs != config.epochs:
            require_longer(config, flatten(there), "there")
            file.replace(file.with_name(f"config.{there.epochs}_epochs.yaml"))
    _write_config(config, file)


def _require_same(config: Config, file: Path) -> None:
    """Refuse a config.yaml, of another run or written by hand, that does not say what this run does."""
    there = _parsed(file)
    if differing := differences(config, flatten(there), "there"):
        raise UserError(
            f"run_dir '{file.parent}' holds a {CONFIG} that says something else, and is not overwritten:\n  "
            + "\n  ".join(differing)
            + "\nUse its values, or choose another --run_dir."
        )


def _parsed(file: Path) -> Config:
    try:
        return parse(["--config", str(file)])
    except (UserError, ValueError) as error:  # ValueError: not even text
        raise UserError(f"'{file}' is in the way: {error}. Choose another --run_dir.") from error

"""Weights & Biases. Its own variables say which project, whose, and where: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, ...

Not accelerate's `WandBTracker`: it sends steps as they come, of which W&B drops those that a resumed run makes again
together with what is new in them, keeps no id to resume by, and an error in it is the run's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError
from lesam_dist.train.boards.board import Outcome
from lesam_dist.train.boards.memory import Memory

PROJECT = "lesam-dist"
_LIMITS = {"init_timeout": 30, "finish_timeout": 20}  # seconds, which hold where its own hook waits at exit too
_STATUS = {"finished": 0, "stopped": 75, "failed": 1}


def require_wandb() -> None:
    """Raise a UserError where a run could not be logged: W&B would ask for a key at the terminal, in mid-run."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return
    try:
        if wandb.login(prompt=False, verify=False):
            return
    except wandb.errors.AuthenticationError as error:
        raise UserError(f"logging.wandb is true but W&B does not take the key: {error}") from error
    raise UserError(
        "logging.wandb is true but nobody is logged in to W&B: give the command `wandb login` or set WANDB_API_KEY, or "
        "set WANDB_MODE=offline and send the run later."
    )


class Wandb:
    """A run at W&B, or in RUN_DIR/wandb where WANDB_MODE is offline.

    W&B's own step only goes up. So each row has the run's step as "step" too, which is the x-axis of all charts: an
    evaluation that a resumed run makes up for lands where it belongs, in a row of its own.

    Args:
        config: of the run, sent once.
        run_dir: its folder.
        memory: the run's id, where it has one.
    """

    def __init__(self, config: Config, run_dir: Path, memory: Memory) -> None:
        import wandb

        is_new = memory.id is None
        settings = {"console": "off", **_LIMITS}
        self._run: Any = wandb.init(
            project=_unless_set("WANDB_PROJECT", PROJECT),
            name=_unless_set("WANDB_NAME", str(config.run_dir)) if is_new else None,
            dir=_unless_set("WANDB_DIR", str(run_dir)),
            id=memory.id,
            resume="allow",
            config=asdict(config) if is_new else None,
            reinit="create_new",
            settings=wandb.Settings(**{k: v for k, v in settings.items() if f"WANDB_{k.upper()}" not in os.environ}),
        )
        if not self._run.disabled:
            memory.named(self._run.id)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step}, step=max(step, self._run.step))

    def close(self, outcome: Outcome) -> None:
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=_STATUS[outcome])


def _unless_set(variable: str, value: str) -> str | None:
    return None if os.environ.get(variable) else value

"""MLflow. Its own variables say where to and what as: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.

Not accelerate's `MLflowTracker`: a step waits for the server, steps that a resumed run makes again are there twice, it
keeps no id to resume by, and an error in it is the run's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from lesam_dist.config.schema import Config
from lesam_dist.config.values import flatten
from lesam_dist.errors import UserError
from lesam_dist.train.boards.board import Outcome
from lesam_dist.train.boards.memory import Memory

EXPERIMENT = "lesam-dist"
_FILES = "MLFLOW_ALLOW_FILE_STORE"
_AT_ONCE = 100  # parameters that a server takes in one request
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def require_mlflow() -> None:
    """Raise a UserError where a run could not be logged; no server is asked.

    mlflow-skinny, MLflow's own package for clients, has no database: without an address, where MLflow would make one
    in the working directory, it can only fail.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if not os.environ.get("MLFLOW_TRACKING_URI") and find_spec("sqlalchemy") is None:
        raise UserError(
            "logging.mlflow is true but MLFLOW_TRACKING_URI is not set: give the address of a server, as "
            "http://localhost:5000, or install mlflow itself, which keeps runs in a database here."
        )
    try:
        MlflowClient()
    except (MlflowException, ImportError) as error:
        reason = str(error).partition("\n")[0]
        if _FILES in reason:  # at the end of a paragraph
            reason = f"MLflow gives folders up; set {_FILES}=true to write to one all the same, or give a server."
        raise UserError(f"logging.mlflow is true but MLFLOW_TRACKING_URI cannot be used: {reason}") from error


class Mlflow:
    """A run at a tracking server, or in another of MLflow's stores.

    Args:
        config: of the run, sent once, as parameters.
        memory: the run's id, where it has one.
    """

    def __init__(self, config: Config, memory: Memory) -> None:
        from mlflow import MlflowClient

        self._client: Any = MlflowClient()
        if memory.id is not None:
            self._id = memory.id
            self._client.update_run(self._id, status="RUNNING")
            return
        run = self._client.create_run(self._experiment(), run_name=str(config.run_dir))
        self._id = str(run.info.run_id)
        memory.named(self._id)
        self._log_config(config)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, outcome: Outcome) -> None:
        self._client.set_terminated(self._id, _STATUS[outcome])

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run, as of an array of seeds, was quicker
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _log_config(self, config: Config) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)) for name, value in flatten(config).items()]
        for first in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._id, params=params[first : first + _AT_ONCE])

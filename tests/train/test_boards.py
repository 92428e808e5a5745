"""TensorBoard, W&B and MLflow show what metrics.jsonl has, once each, and none of them can hold a run up."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import LoggingConfig
from lesam_dist.config.values import flatten
from lesam_dist.errors import UserError
from lesam_dist.train import trainer
from lesam_dist.train.boards import boards as opening
from lesam_dist.train.boards import mlflow as ours
from lesam_dist.train.boards.background import Background
from lesam_dist.train.boards.boards import Boards, require_boards
from lesam_dist.train.boards.memory import Memory
from lesam_dist.train.meter import TIMED
from lesam_dist.train.telemetry import read_metrics
from tests.conftest import Command

Rows = dict[str, list[tuple[int, float]]]  # steps and values of each scalar, in the order in which they came
KEY = "5ec7e7" * 7


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Both services without a network, and without their own telemetry; what they write lies in the folder."""
    variables = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_API_KEY": KEY,
        "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_EXPERIMENT_NAME": "digits",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    import wandb

    wandb.teardown()
    assert not children("wandb-core")


def children(name: str) -> list[int]:
    """Processes of a name that this one has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = status.read_text().partition(" (")
        except OSError:  # ended meanwhile
            continue
        command, _, rest = rest.rpartition(") ")
        if command == name and int(rest.split()[1]) == os.getpid():
            found.append(int(pid))
    return found


def of_metrics(run_dir: Path) -> Rows:
    rows: Rows = {}
    for line in read_metrics(run_dir):
        for name in line.keys() - {"step", "epoch", "split"}:
            rows.setdefault(f"{line['split']}/{name}", []).append((line["step"], line[name]))
    return rows


def of_tensorboard(run_dir: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_mlflow(run_id: str) -> Rows:
    from mlflow import MlflowClient

    client = MlflowClient()
    names = client.get_run(run_id).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names}


def records(file: Path) -> Iterator[Any]:
    """What W&B keeps of an offline run: LevelDB's log format, in blocks of 32 KiB, of protobuf's messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = file.read_bytes(), 7, b""  # after a header
    while at < len(data):
        if (left := -at % 32768) and left < 7:
            at += left
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield Record.FromString(message)
            message = b""


def of_wandb(run_dir: Path) -> tuple[Rows, list[Any]]:
    """Scalars, and what was said of the run, over all of its starts."""
    rows: Rows = {}
    runs = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append(record.run)
            if kind == "history":
                row = {
                    "/".join(item.nested_key) or item.key: yaml.safe_load(item.value_json)
                    for item in record.history.item
                }
                for name in [name for name in row if name.startswith(("train/", "val/"))]:
                    rows.setdefault(name, []).append((row["step"], row[name]))
    return rows, runs


def timeless(rows: Rows) -> Rows:
    """Without what depends on the clock."""
    return {name: pairs for name, pairs in rows.items() if name.partition("/")[2] not in TIMED}


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer.Trainer._log_step

    def cut(self: trainer.Trainer, *args: Any) -> None:
        original(self, *args)
        if self.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "_log_step", cut)


def test_all_show_what_metrics_has_also_of_a_run_that_was_cut_off(
    command: Command, small: tuple[str, ...], services: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = services / "run"
    flags = (*small, "--run_dir", run_dir, "--logging.wandb", "true", "--logging.mlflow", "true")
    with monkeypatch.context() as patch:
        cut_at(8, patch)  # after the checkpoint of step 6
        status, out, _ = command(*flags)
        assert (status, "warning" in out) == (130, False), out
    status, out, err = command(*flags, "--resume", "auto")
    assert (status, err, "warning" in out) == (0, "", False), out
    expected = of_metrics(run_dir)
    assert [step for step, _ in expected["train/loss"]] == [*range(1, 10)]
    assert [step for step, _ in expected["val/loss"]] == [3, 6, 9]

    shown = of_tensorboard(run_dir)
    assert shown.keys() == expected.keys()
    for name, pairs in expected.items():
        assert shown[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs], "float32"

    from mlflow import MlflowClient

    (experiment,) = MlflowClient().search_experiments(filter_string="name = 'digits'")
    (run,) = MlflowClient().search_runs([experiment.experiment_id])
    assert of_mlflow(run.info.run_id).keys() == expected.keys()
    assert timeless(of_mlflow(run.info.run_id)) == timeless(expected)
    assert (run.info.status, run.info.run_name) == ("FINISHED", str(run_dir))
    config = flatten(parse(["--config", str(run_dir / "config.yaml")]))
    assert run.data.params == {name: str(value) for name, value in config.items()}

    sent, runs = of_wandb(run_dir)
    assert sent.keys() == expected.keys()
    assert timeless(sent) == timeless(expected)
    assert len({started.run_id for started in runs}) == 1, "one run, started twice"
    first = {item.key: yaml.safe_load(item.value_json) for item in runs[0].config.update}
    assert first["optimizer"]["args"]["sigma"] == config["optimizer.args.sigma"]

    for file in run_dir.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), f"{file} has the key"


class Remembers:
    """A service that keeps what it gets, and does what it is told to on a step."""

    def __init__(self, on_step: Mapping[int, Callable[[], object]] | None = None) -> None:
        self.got: list[tuple[int, dict[str, float]]] = []
        self.outcome, self._on_step = "", on_step or {}

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._on_step.get(step, lambda: None)()
        self.got.append((step, dict(values)))

    def close(self, outcome: str) -> None:
        self.outcome = outcome


def background(service: Remembers, file: Path, *, fresh: bool = False) -> Background:
    return Background(lambda: service, Memory(file, fresh=fresh))


def test_each_scalar_of_a_step_is_sent_once(tmp_path: Path) -> None:
    file, service = tmp_path / "boards" / "it.json", Remembers()
    board = background(service, file)
    board.scalars({"train/loss": 1.0}, 10)
    board.scalars({"val/loss": 2.0}, 10)
    board.scalars({"train/loss": 1.5}, 20)
    board.go_back(10)
    board.scalars({"train/loss": 7.0}, 20)
    board.scalars({"train/loss": 1.7, "train/new": 3.0}, 30)
    board.close("stopped", 10)
    again = Remembers()
    board = background(again, file)
    board.scalars({"train/loss": 9.0, "val/loss": 9.5}, 30)  # it stopped before this evaluation was sent
    board.close("finished", 10)
    assert service.got == [
        (10, {"train/loss": 1.0}),
        (10, {"val/loss": 2.0}),
        (20, {"train/loss": 1.5}),
        (30, {"train/loss": 1.7, "train/new": 3.0}),
    ]
    assert again.got == [(30, {"val/loss": 9.5})]
    assert (service.outcome, again.outcome) == ("stopped", "finished")
    anew = Remembers()
    board = background(anew, file, fresh=True)
    board.scalars({"train/loss": 0.5}, 1)
    board.close("finished", 10)
    assert anew.got == [(1, {"train/loss": 0.5})]


def test_one_that_fails_is_told_of_once_and_left_out(tmp_path: Path) -> None:
    def fails() -> None:
        raise RuntimeError("quota is used up\nand a page of advice")

    spoilt, well = Remembers({2: fails}), Remembers()
    both = Boards({"It": background(spoilt, tmp_path / "a.json"), "Other": background(well, tmp_path / "b.json")})
    told: list[str] = []
    step = 0
    while not told and step < 1000:  # the thread is as quick as it is
        step += 1
        told += both.scalars({"loss": 1.0}, step)
        time.sleep(0.01)
    assert told == [f"warning: no more It events from step {step} on (quota is used up)."]
    told = [*both.scalars({"loss": 1.0}, step + 1), *both.close("finished", 10)]
    assert told == []
    assert [step for step, _ in spoilt.got] == [1]
    assert [step for step, _ in well.got] == [*range(1, step + 2)]


def test_one_that_does_not_answer_holds_nobody_up(tmp_path: Path) -> None:
    released = Event()
    board = Boards({"It": background(Remembers({1: released.wait}), tmp_path / "it.json")})
    start = time.monotonic()
    assert board.scalars({"loss": 1.0}, 1) == board.scalars({"loss": 1.0}, 2) == []
    (told,) = board.close("finished", 0.2)
    assert time.monotonic() - start < 5
    released.set()
    assert told == ("warning: It may lack events that metrics.jsonl has (it has not answered for 0.2 s).")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_written(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(opening, "find_spec", lambda _: None)
    status, _, err = command(*small, "--run_dir", tmp_path / "run", f"--logging.{name}", "true")
    assert status == 2
    assert err == (
        f"lesam-dist: error: logging.{name} is true but the package {name} is not installed: "
        f"pip install 'lesam-dist[{name}]'.\n"
    )
    assert not (tmp_path / "run").exists()


def test_what_a_service_lacks_is_named(services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged_in = [True]
    fake = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=os.environ["WANDB_MODE"])),
        login=lambda **_: logged_in[0],
        errors=SimpleNamespace(AuthenticationError=ValueError),
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", fake)
        patch.setattr(opening, "find_spec", lambda _: True)
        require_boards(LoggingConfig(wandb=True))
        logged_in[0] = False
        require_boards(LoggingConfig(wandb=True))
        patch.setenv("WANDB_MODE", "online")
        with pytest.raises(UserError, match="nobody is logged in to W&B: give the command `wandb login`"):
            require_boards(LoggingConfig(wandb=True))
    require_boards(LoggingConfig(mlflow=True))
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (services / "other").as_uri())  # a store is made once
    with pytest.raises(UserError, match="set MLFLOW_ALLOW_FILE_STORE=true"):
        require_boards(LoggingConfig(mlflow=True))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(ours, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
        require_boards(LoggingConfig(mlflow=True))

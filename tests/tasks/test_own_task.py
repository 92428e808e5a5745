"""A task of one's own: trained, compared, resumed and spread over processes like ours; what is wrong in it is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lesam_dist.config.command_line import parse
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks import At
from lesam_dist.train.run import train_here
from lesam_dist.train.telemetry import read_metrics
from tests.checkpoints import read_checkpoint
from tests.conftest import Command
from tests.parallel.processes import run

EXAMPLES = Path(__file__).parents[2] / "examples"
FLAGS = (
    *("--task", "own_task.Tumours", "--data.batch_size", "64", "--optimizer.name", "lesam", "--optimizer.lr", "0.1"),
    *("--optimizer.rho_max", "null", "--logging.every_steps", "1", "--logging.tensorboard", "false"),
    *("--parallel.device", "cpu"),
)


@pytest.fixture(autouse=True)
def own_task(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import own_task

    yield own_task
    sys.modules.pop("own_task", None)


def last(folder: Path) -> dict[str, Any]:
    return [line for line in read_metrics(folder) if line["split"] == "val"][-1]


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = sorted((folder / "checkpoints").glob("step_*"))[-1]
    return read_checkpoint(checkpoint)["model"]


def test_the_example_learns(command: Command, tmp_path: Path) -> None:
    assert len((EXAMPLES / "own_task.py").read_text().splitlines()) < 60
    status, out, err = command(*FLAGS, "--epochs", "12", "--run_dir", tmp_path, "--optimizer.rho_max", "0.2")
    assert (status, err) == (0, "")
    assert last(tmp_path)["accuracy"] > 92  # 63 % of them are benign
    assert "Sequential (0.00 M parameters), lesam on sgd" in out
    assert f"accuracy {last(tmp_path)['accuracy']:.2f} % of 114 validation samples after epoch 12" in out


def test_a_step_is_algorithm_1_in_float64(own_task: Any, tmp_path: Path) -> None:
    """The first step, with the noise drawn once for both passes."""
    torch.manual_seed(0)
    world = Distributed(0, 0, 1, torch.device("cpu"))
    config = parse([*FLAGS, "--epochs", "1", "--run_dir", str(tmp_path), "--checkpoint.every_steps", "1"])
    config.optimizer.weight_decay, config.optimizer.momentum = 0.0, 0.0
    seen: list[dict[str, Tensor]] = []

    class Seen(own_task.Tumours):  # type: ignore[misc]
        def build_model(self) -> nn.Module:
            self.start = super().build_model()
            seen.append({name: p.detach().double().clone() for name, p in self.start.named_parameters()})
            return self.start

        def draw(self, batch: Any, at: At) -> Any:
            drawn = super().draw(batch, at)
            if at.step < 2:
                seen.append({name: p.detach().double().clone() for name, p in self.start.named_parameters()})
                seen.append({name: value.clone() for name, value in drawn.items()})
            return drawn

    own_task.Seen = Seen
    config.task = "own_task.Seen"
    train_here(config, world)
    start, before, tried, again, first, after, _ = seen  # the loss is tried before the first step, and changes nothing
    for name, value in first.items():
        assert torch.equal(tried[name], value)
    for name, value in start.items():
        assert torch.equal(before[name], value)
        assert torch.equal(again[name], value)
    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2)).double()

    def gradient(w: dict[str, Tensor]) -> dict[str, Tensor]:
        model.load_state_dict(w)
        model.zero_grad()
        nn.functional.cross_entropy(model(first["x"].double()), first["y"]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    g = gradient(start)
    norm = torch.sqrt(sum((v**2).sum() for v in g.values()))  # type: ignore[arg-type]
    rho = config.optimizer.args["sigma"] / norm
    hat = gradient({name: w + rho * g[name] / norm for name, w in start.items()})
    lr = 0.1  # the first of a cosine
    for name, w in start.items():
        np.testing.assert_allclose(after[name].numpy(), (w - lr * hat[name]).numpy(), rtol=0, atol=2e-6)


def test_it_is_resumed_bit_for_bit(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = (*FLAGS, "--epochs", "3", "--checkpoint.every_steps", "1")
    assert command(*flags, "--run_dir", whole)[0] == 0
    with monkeypatch.context() as patch:
        from lesam_dist.train import trainer

        original = trainer.Trainer._step

        def cut_off(self: trainer.Trainer, batch: Any) -> Tensor:
            if self.step == 9:
                raise KeyboardInterrupt
            return original(self, batch)

        patch.setattr(trainer.Trainer, "_step", cut_off)
        assert command(*flags, "--run_dir", cut)[0] == 130
    assert command(*flags, "--run_dir", cut, "--resume", "auto")[0] == 0
    torch.testing.assert_close(weights(cut), weights(whole), rtol=0, atol=0)
    status, _, err = command(*flags, "--run_dir", cut, "--resume", "auto", "--task_args.hidden", "8")
    assert status == 2
    assert "task_args: {} then, {'hidden': 8} now" in err


def train_on(world: Distributed, folder: str, strategies: tuple[str, ...]) -> list[dict[str, float]]:
    sys.path.insert(0, str(EXAMPLES))
    flags = [*FLAGS, "--epochs", "1", "--task_args.noise", "0"]  # each process draws its own
    return [
        train_here(parse([*flags, "--run_dir", f"{folder}/{name}", "--parallel.strategy", name]), world)
        for name in strategies
    ]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (alone,) = train_on(Distributed(0, 0, 1, torch.device("cpu")), str(tmp_path), ("none",))
    first, second = run(train_on, 2, str(tmp_path), ("ddp", "fsdp"))
    assert first == second
    one = weights(tmp_path / "none")
    for strategy, evaluation in zip(("ddp", "fsdp"), first, strict=True):
        assert evaluation == pytest.approx(alone, rel=1e-5)
        for name, value in weights(tmp_path / strategy).items():
            torch.testing.assert_close(value, one[name], rtol=0, atol=1e-5)


def test_compare_looks_at_its_metric(call: Command, tmp_path: Path) -> None:
    config = tmp_path / "tumours.yaml"
    config.write_text("task: own_task.Tumours\ntask_args: {hidden: 8}\nepochs: 1\ndata: {batch_size: 64}\n")
    status, out, err = call(
        *("compare", "--config", config, "--methods", "sgd,lesam", "--seeds", "1", "--run_dir", tmp_path / "runs")
    )
    assert (status, err) == (0, "")
    assert "accuracy (%)" in out
    numbers = json.loads((tmp_path / "runs" / "compare.json").read_text())["methods"]
    for method in ("sgd", "lesam"):
        assert numbers[method]["accuracy"] == [last(tmp_path / "runs" / method / "seed_0")["accuracy"]]
    assert call("report", tmp_path / "runs")[0] == 0
    page = (tmp_path / "runs" / "report.html").read_text()
    best = max(numbers, key=lambda method: numbers[method]["mean"])
    assert f"Highest is {best} ({numbers[best]['mean']:.2f}\xa0%)" in page
    assert "accuracy, last epoch" in page
    assert "top-1" not in page


def test_the_best_checkpoint_is_the_one_of_the_lowest_loss(
    own_task: Any, command: Command, call: Command, tmp_path: Path
) -> None:
    from lesam_dist.tasks import Metric

    class ByLoss(own_task.Tumours):  # type: ignore[misc]
        metric = Metric("loss", "loss", higher_is_better=False)

    own_task.ByLoss = ByLoss
    flags = (*FLAGS, "--task", "own_task.ByLoss", "--epochs", "6", "--optimizer.lr", "3", "--checkpoint.keep", "1")
    assert command(*flags, "--run_dir", tmp_path)[0] == 0
    losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path) if line["split"] == "val"}
    kept = {int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").glob("step_*")}
    best = min(losses, key=lambda step: losses[step])
    assert kept == {best, max(losses)}
    lines = call("checkpoints", tmp_path)[1].splitlines()
    assert "loss" in lines[0]
    assert f"{losses[best]:.2f}" in next(line for line in lines if "best" in line)


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def none(model: nn.Module, batch: Any) -> Any:
    model(batch["x"])


def unreduced(model: nn.Module, batch: Any) -> Any:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def nan(model: nn.Module, batch: Any) -> Any:
    return model(batch["x"]).mean() * float("nan")


def counted(model: nn.Module, batch: Any) -> Any:
    return (model(batch["x"]).argmax(dim=1) != batch["y"]).sum()


def pops(model: nn.Module, batch: Any) -> Any:
    return nn.functional.cross_entropy(model(batch["x"]), batch.pop("y"))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (none, "returned NoneType: return the loss, a tensor."),
        (unreduced, "returned a tensor of shape [64]: return their mean, without dimensions."),
        (counted, "returned torch.int64: a loss is a floating-point number."),
        (nan, "is nan for the first batch, before any update: look at what build_model and the loaders give."),
        (
            pops,
            "changed its batch, which was {x: float32[64, 30], y: int64[64]} and is {x: float32[64, 30]} now: the next "
            "pass must see the same. Change a copy, or change it in draw.",
        ),
    ],
)
def test_a_wrong_loss_is_known_before_training(
    own_task: Any, command: Command, tmp_path: Path, loss: Any, said: str
) -> None:
    own_task.Wrong = type("Wrong", (own_task.Tumours,), {"loss": staticmethod(loss)})
    status, _, err = command(*FLAGS, "--task", "own_task.Wrong", "--epochs", "1", "--run_dir", tmp_path)
    error, go_on = err.splitlines()
    assert (status, error) == (2, f"lesam-dist: error: the task Wrong: loss(model, batch) {said}")
    assert go_on.startswith("lesam-dist: when that is mended, go on with: lesam-dist train ")
    assert not [line for line in read_metrics(tmp_path) if line["split"] == "train"]


def test_a_loss_that_does_not_depend_on_the_weights(own_task: Any, command: Command, tmp_path: Path) -> None:
    own_task.Wrong = type("Wrong", (own_task.Tumours,), {"loss": lambda self, model, batch: torch.ones(())})
    status, _, err = command(*FLAGS, "--task", "own_task.Wrong", "--epochs", "1", "--run_dir", tmp_path)
    assert status == 2
    error = err.splitlines()[0]
    assert error.endswith("returned a loss that does not depend on the weights: compute it from model(...).")


def whole(self: Any, model: nn.Module, batch: Any) -> Any:
    return {"accuracy": 0.0, "samples": len(batch["y"])}


def uneven(self: Any, model: nn.Module, batch: Any) -> Any:
    return {"accuracy": batch["y"], "loss": 0.0, "samples": len(batch["y"])}


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (whole, "measure(model, batch) gives no loss: return it with the other sums."),
        (
            uneven,
            "measure(model, batch) gives accuracy of shape [100]: sum it over the samples, or write report(sums).",
        ),
    ],
)
def test_a_wrong_measure(own_task: Any, command: Command, tmp_path: Path, measure: Any, said: str) -> None:
    own_task.Wrong = type("Wrong", (own_task.Tumours,), {"measure": measure})
    flags = (*FLAGS, "--task", "own_task.Wrong", "--data.eval_batch_size", "100", "--run_dir", tmp_path)
    status, _, err = command(*flags, "--epochs", "1")
    assert status == 2
    assert f"error: the task Wrong: {said}" in err


def test_a_metric_that_is_not_reported(own_task: Any, command: Command, tmp_path: Path) -> None:
    own_task.Wrong = type("Wrong", (own_task.Tumours,), {"report": lambda self, sums: {"loss": 1.0}})
    status, _, err = command(*FLAGS, "--task", "own_task.Wrong", "--epochs", "1", "--run_dir", tmp_path)
    assert status == 2
    assert "the task Wrong is compared by accuracy, but report(sums) gave loss, samples: it must give accuracy." in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--task", "own_task.Nothing"), "task 'own_task.Nothing' cannot be imported: module 'own_task' has no"),
        (("--task", "not_there.Task"), "task 'not_there.Task' cannot be imported: No module named 'not_there'"),
        (("--task", "own_task.Table"), "task 'own_task.Table' is no task: derive it from lesam_dist.tasks.Task."),
        (("--task", "own_task.Task"), "task 'own_task.Task' has no build_model, no loss, no measure, no open_data:"),
        (("--task", "clasification"), "unknown task 'clasification': did you mean 'classification'?"),
        (("--task", "a b.C"), "task is 'a b.C': give classification"),
        (("--task_args.width", "3"), "but the task Tumours takes hidden, noise: got an unexpected keyword argument"),
        (("--task", "classification", "--task_args.width", "3"), "task is classification, which takes none"),
    ],
)
def test_what_is_no_task(command: Command, tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    status, _, err = command(*FLAGS, *flags, "--run_dir", tmp_path / "run")
    assert status == 2
    assert said in err
    assert not (tmp_path / "run").exists()


def test_methods_that_choose_samples_need_their_losses(command: Command, tmp_path: Path) -> None:
    flags = ("--task", "own_task.Tumours", "--data.batch_size", "64", "--optimizer.name", "esam", "--epochs", "1")
    status, _, err = command(*flags, "--optimizer.gamma", "0.5", "--run_dir", tmp_path, "--parallel.device", "cpu")
    assert status == 2
    assert "the task Tumours has no losses(model, batch), which gives the loss of each sample: write it, or" in err


def test_more_than_a_table_needs_loaders(own_task: Any, command: Command, tmp_path: Path) -> None:
    own_task.Wrong = type("Wrong", (own_task.Tumours,), {"open_data": lambda self: (Own(), Own())})
    status, _, err = command(*FLAGS, "--task", "own_task.Wrong", "--epochs", "1", "--run_dir", tmp_path)
    assert status == 2
    assert "the task Wrong has data of its own kind, and no loaders: return two Tables from open_data, or" in err


class Own:
    root, digest = "here", "0"

    def __len__(self) -> int:
        return 3

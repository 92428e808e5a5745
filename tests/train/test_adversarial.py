"""Adversarial training: a linear model in closed form, no trace of an attack that does nothing, any processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import AdversarialConfig, Config, DataConfig
from lesam_dist.data.order import ADVERSARIAL_STREAM, position_uniforms
from lesam_dist.errors import UserError
from lesam_dist.experiments.cost import sgd_steps
from lesam_dist.optim import SAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.classification.adversarial import Attack, start_of
from lesam_dist.tasks.classification.pgd import Norm
from lesam_dist.tasks.classification.task import Classification
from lesam_dist.train.run import build_trainer
from lesam_dist.train.telemetry import read_metrics
from lesam_dist.train.updates import Updates
from tests.conftest import Command
from tests.parallel import processes
from tests.told import told
from tests.train.test_trainer import timeless

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
BATCH, SIDE = 8, 4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
EPS = 0.01


class Binary(nn.Module):
    """Logits (0, w x) of normalised images; remembers what it was given in training mode."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen.append(images.detach().clone())
        out = images.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(out), out], dim=1)


def adversarial(**own: Any) -> Config:
    config = Config(data=DataConfig(mean=MEAN, std=STD, micro_batches=2, batch_size=BATCH))
    config.adversarial = AdversarialConfig(**{"norm": "linf", "epsilon": EPS, **own})
    return config


def one_step(world: Distributed, config: Config, w: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """What both passes of SAM's step see on this process, and its loss."""
    model = Binary(w)
    task = Classification(config, world)
    task._network = model
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    share = BATCH // world.world_size
    part = slice(world.rank * share, (world.rank + 1) * share)
    updates = Updates(task, *told(world), model, optimizer, None, None, 10)
    loss = updates.make(3, (images[part], labels[part]), logged=False)
    first, second = torch.cat(model.seen[:2]), torch.cat(model.seen[2:])
    assert torch.equal(first, second)
    return first, float(loss)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


@pytest.mark.parametrize(("norm", "steps"), [("linf", 9), ("l2", 150)])
@pytest.mark.parametrize("random_start", [True, False])
def test_the_loss_of_a_step_in_closed_form(seed: int, norm: Norm, steps: int, random_start: bool) -> None:
    """The worst margin is the margin less eps times the dual norm of the weights on pixels, w / std. From a corner of
    the box l_inf needs 8 steps of eps/4; in l_2 the angle shrinks by 8/9 a step."""
    w = torch.randn(3 * SIDE * SIDE, dtype=torch.float64)
    pixels, labels = torch.rand(BATCH, 3, SIDE, SIDE, dtype=torch.float64) * 0.1 + 0.45, torch.randint(0, 2, (BATCH,))
    images = normalised(pixels)
    on_pixels = w.view(3, -1) / torch.tensor(STD, dtype=torch.float64)[:, None]
    lost = EPS * float(on_pixels.abs().sum() if norm == "linf" else on_pixels.norm())
    margins = (2 * labels - 1) * (images.flatten(1) @ w)
    config = adversarial(norm=norm, steps=steps, random_start=random_start)
    before = images.clone()
    seen, loss = one_step(ALONE, config, w, images, labels)
    assert loss == pytest.approx(float(F.softplus(lost - margins).mean()), rel=1e-6)
    assert torch.equal(images, before)
    change = ((seen - images) * torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)).flatten(1)
    assert float(torch.linalg.vector_norm(change, ord=torch.inf if norm == "linf" else 2, dim=1).max()) <= EPS * 1.0001


def test_processes_attack_the_same_images_alike(seed: int) -> None:
    """A single step from a random start, so that the start is seen."""
    w, labels = torch.randn(3 * SIDE * SIDE, dtype=torch.float64), torch.randint(0, 2, (BATCH,))
    images = normalised(torch.rand(BATCH, 3, SIDE, SIDE, dtype=torch.float64))
    config = adversarial(steps=1)
    config.seed = seed
    alone, loss = one_step(ALONE, config, w, images, labels)
    worlds = [Distributed(rank, rank, 2, torch.device("cpu")) for rank in range(2)]
    two = [one_step(world, config, w, images, labels) for world in worlds]
    torch.testing.assert_close(torch.cat([seen for seen, _ in two]), alone, rtol=1e-9, atol=1e-9)
    assert np.mean([value for _, value in two]) == pytest.approx(loss, rel=1e-9)
    assert len(alone.unique()) > BATCH * SIDE, "starts differ"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_are_of_the_place_and_distributed_as_said(seed: int, norm: Norm) -> None:
    def starts(places: range) -> Tensor:
        uniforms = position_uniforms(ADVERSARIAL_STREAM, 49, places, seed=seed, epoch=5)
        return start_of(norm, torch.from_numpy(uniforms))

    n = 2000
    found = starts(range(n))
    assert torch.equal(starts(range(700, 900)), found[700:900])
    size = found.abs() if norm == "linf" else found.norm(dim=1)
    assert float(size.max()) <= 1
    assert float(size.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / size.numel()) ** 0.5), "uniform from 0 to 1"
    assert float(found.mean()) == pytest.approx(0, abs=5 * float(found.std()) / found.numel() ** 0.5)


RUN = ("--data.batch_size", "20", "--logging.tensorboard", "false", "--data.micro_batches", "2")
ATTACK = ("--adversarial.norm", "linf", "--adversarial.steps", "2", "--adversarial.evaluate", "true")


def test_an_attack_of_size_0_leaves_no_trace(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    """Not in the weights, BatchNorm's statistics, or the random numbers of dropout and augmentation. The validation
    accuracy under it is the clean one."""
    for name, flags in (("plain", ()), ("attacked", (*ATTACK, "--adversarial.epsilon", "0"))):
        assert command(*small, *RUN, *flags, "--epochs", "2", "--run_dir", tmp_path / name)[0] == 0
    plain, attacked = (timeless(tmp_path / name) for name in ("plain", "attacked"))
    for line in attacked:
        if line["split"] == "val":
            assert line.pop("robust_acc1") == line["acc1"]
    assert attacked == plain
    lines = [line for line in read_metrics(tmp_path / "attacked") if line["split"] == "train"]
    assert all(0 < line["share_draw"] < 1 for line in lines), "of the time"


def test_evaluation_counts_what_is_still_right(seed: int) -> None:
    """By the margins that the worst attack leaves; on no images it counts none."""
    eps = 0.003
    config = adversarial(evaluate=True, eval_steps=9, epsilon=eps)
    w = torch.randn(3 * SIDE * SIDE, dtype=torch.float64)
    lost = eps * float((w.view(3, -1) / torch.tensor(STD, dtype=torch.float64)[:, None]).abs().sum())
    images = normalised(torch.rand(200, 3, SIDE, SIDE, dtype=torch.float64) * 0.1 + 0.45)
    margins = images.flatten(1) @ w
    images -= (margins.mean() * w / w.square().sum()).view_as(images[0])  # on both sides, at all distances
    margins = images.flatten(1) @ w
    labels = (margins > 0).long()
    task = Classification(config, ALONE)
    with torch.no_grad():
        sums = task.measure(Binary(w).eval(), (images, labels))
        none = task.measure(Binary(w).eval(), (images[:0], labels[:0]))
    assert int(sums["robust_acc1"]) == int((margins.abs() > lost).sum())
    assert 0 < int(sums["robust_acc1"]) < int(sums["acc1"]) == 200
    assert int(none["robust_acc1"]) == 0


def fit(world: Distributed, images: str, folder: str) -> dict[str, dict[str, float]]:
    results = {}
    for strategy in ("ddp", "fsdp"):
        flags = ["--config", "digits", "--data.builtin", "null", "--data.root", images, *RUN, *ATTACK]
        flags += ["--data.eval_batch_size", "5", "--epochs", "1", "--schedule.anneal_start_epoch", "null"]
        flags += ["--optimizer.lr", "0.01", "--adversarial.epsilon", "0.03", "--adversarial.eval_steps", "3"]
        flags += ["--logging.every_steps", "1"]
        trainer = build_trainer(
            parse([*flags, "--run_dir", f"{folder}/{strategy}", "--parallel.strategy", strategy]), world
        )
        results[strategy] = trainer.fit()
        trainer.close()
    return results


def test_sharded_weights_are_attacked_as_whole_ones(images: Path, tmp_path: Path) -> None:
    """21 validation images on two processes, one of which has a batch of five less than the other."""
    first, second = processes.run(fit, 2, str(images), str(tmp_path))
    assert first == second
    assert first["fsdp"]["robust_acc1"] == pytest.approx(first["ddp"]["robust_acc1"], abs=100 / 21 + 1e-9)
    assert first["fsdp"]["loss"] == pytest.approx(first["ddp"]["loss"], rel=1e-2)
    losses = [read_metrics(tmp_path / strategy)[0]["loss"] for strategy in ("ddp", "fsdp")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5), "at the same weights"


def test_cost_has_the_attack() -> None:
    """Ten steps of a forward and of a backward that is as dear."""
    config = parse(["--config", "cifar10_preactresnet18_at_sam"])
    assert (config.adversarial.norm, config.adversarial.steps) == ("linf", 10)
    assert sgd_steps(config) == pytest.approx(2 + 10 * 2 / 3)
    assert Attack(config, ALONE) is not None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--adversarial.epsilon", "0.1"), "epsilon is 0.1 but adversarial.norm is null"),
        (("--adversarial.norm", "l2"), "adversarial.epsilon is null: give the radius"),
        (("--adversarial.norm", "linf", "--adversarial.epsilon", "8"), "epsilon is 8.0: it must be from 0 to 1"),
        (("--adversarial.norm", "l2", "--adversarial.epsilon", "-1"), "epsilon is -1.0: it must be finite and at"),
        ((*ATTACK[:2], "--adversarial.epsilon", "0.1", "--adversarial.step_size", "0"), "step_size is 0.0: it must"),
        ((*ATTACK[:2], "--adversarial.epsilon", "0.1", "--adversarial.steps", "0"), "steps is 0: it must be 1 to"),
        ((*ATTACK[:2], "--adversarial.epsilon", "0.1", "--adversarial.eval_steps", "5"), "eval_steps is 5 but"),
        ((*ATTACK[:2], "--adversarial.epsilon", "0.1", "--data.cutmix", "1"), "data.cutmix is 1.0, but an image is"),
        ((*ATTACK[:2], "--adversarial.epsilon", "0.1", "--loss.name", "binary"), "loss.name is binary: the attack"),
        ((*ATTACK[:2], "--adversarial.epsilon", "0.1", "--task", "my.own.Task"), "task is my.own.Task: only"),
    ],
)
def test_what_a_config_must_not_say(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(["--config", "digits", *flags])

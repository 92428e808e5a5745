"""Long-tailed runs on two processes are those on one: batches, mixtures, weighted means, and the groups' accuracies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lesam_dist.config.command_line import parse
from lesam_dist.data.cifar import CifarSplit
from lesam_dist.data.long_tail import long_tailed
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.data import Images
from lesam_dist.tasks.long_tail.task import LongTail
from lesam_dist.train.run import build_trainer
from tests.parallel.processes import run

FLAGS = [
    *(
        "--data.batch_size",
        "12",
        "--data.eval_batch_size",
        "9",
        "--epochs",
        "2",
        "--schedule.anneal_start_epoch",
        "null",
    ),
    *("--schedule.lr_warmup_epochs", "0", "--optimizer.lr", "0.02", "--optimizer.sigma", "0.02"),
    *("--logging.tensorboard", "false"),
]
METHODS = {"glmc": [], "ldam": ["--long_tail.reweight_epoch", "1", "--long_tail.reweight_beta", "0.9"]}
Result = tuple[dict[str, float], dict[str, Any]]  # the last evaluation, and the weights


class Small(LongTail):
    """On random images, with a network without BatchNorm, whose statistics are those of a process."""

    def open_data(self) -> tuple[Images, Images]:
        rng = np.random.default_rng(self.config.seed)

        def split(size: int) -> CifarSplit:
            labels = rng.permutation(np.arange(size) % 5)
            images = rng.integers(0, 100, (size, 3, 32, 32)) + 30 * labels[:, None, None, None]
            return CifarSplit(Path("random"), tuple("abcde"), images.astype(np.uint8), labels)

        return long_tailed(split(150), 15, "ldam"), split(25)

    def build_model(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        net = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 49, 5))
        return self._method.network(net, "small", self.num_classes)


def fit(world: Distributed, folder: str, seed: int, strategies: tuple[str, ...]) -> dict[tuple[str, str], Result]:
    results = {}
    for method, own in METHODS.items():
        for strategy in strategies:
            name = f"mnist5k_lt100_resnet8_{method}_lesam"
            place = ["--run_dir", f"{folder}/{method}_{strategy}_{world.world_size}", "--parallel.strategy", strategy]
            config = parse(["--config", name, *FLAGS, *own, *place, "--seed", str(seed)])
            trainer = build_trainer(config, world, Small(config, world))
            evaluation = trainer.fit()
            trainer.close()
            state = trainer.model.state_dict()
            whole = {n: (v.full_tensor() if isinstance(v, DTensor) else v).numpy() for n, v in state.items()}
            results[method, strategy] = evaluation, whole
    return results


def test_two_processes_follow_one(tmp_path: Path, seed: int) -> None:
    alone = run(fit, 1, str(tmp_path), seed, ("none",))[0]
    together = run(fit, 2, str(tmp_path), seed, ("ddp", "fsdp"))
    for rank in together:
        for (method, strategy), (evaluation, weights) in rank.items():
            expected, own = alone[method, "none"]
            assert evaluation["samples"] == 25
            for name in ("loss", "ece", "acc1", "medium", "few"):
                assert evaluation[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), (
                    f"{method} {strategy} {name}"
                )
            for name, value in own.items():
                difference = np.abs(weights[name.removeprefix("module.")] - value).max()
                assert difference < 1e-5, f"{method} {strategy} {name}"

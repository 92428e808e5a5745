"""Sharded runs of the trainer equal the replicated one, and what cannot be wrapped is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lesam_dist.config.command_line import parse
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.run import build_trainer
from lesam_dist.train.telemetry import read_metrics
from tests.parallel.processes import run

ALONE = Distributed(0, 0, 1, torch.device("cpu"))

# What follows is three steps in float32 with BatchNorm, whose statistics divide by small variances; the strategies
# add the same gradients in another order.
RTOL, ATOL = 1e-3, 1e-4


Fitted = dict[str, tuple[dict[str, float], dict[str, Any]]]  # evaluation and weights of each strategy


def fit(world: Distributed, images: str, folder: str, resume: bool) -> Fitted:
    """Three steps under each strategy; evaluation shares 21 images unevenly, in 2 and 3 batches."""
    results = {}
    for strategy in ("ddp", "fsdp", "hsdp"):
        run_dir = f"{folder}/{strategy}"
        flags = ["--config", "digits", "--data.root", images, "--data.builtin", "null", "--run_dir", run_dir]
        flags += ["--data.batch_size", "20", "--data.eval_batch_size", "5", "--parallel.strategy", strategy]
        flags += ["--epochs", "1", "--schedule.anneal_start_epoch", "null", "--optimizer.lr", "0.01"]
        # DDP's weights are channels last too. With seed 0 one ReLU is so near zero that rounding turns it in step 3.
        flags += ["--precision.channels_last", "true", "--seed", "1"]
        flags += ["--optimizer.sigma", "0.02", "--logging.every_steps", "1"]
        config = parse([*flags, *(["--resume", "auto"] if resume else [])])
        if strategy == "hsdp":
            config.parallel.shard_size = 1
        this = build_trainer(config, world)
        evaluation = this.fit()
        this.close()
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in this.model.state_dict().items()}
        results[strategy] = evaluation, {n: p.numpy() for n, p in whole.items()}
    return results


def test_sharded_trainers_equal_ddp_and_resume(images: Path, tmp_path: Path) -> None:
    ranks = run(fit, 2, str(images), str(tmp_path), False)
    resumed = run(fit, 2, str(images), str(tmp_path), True)
    for rank, again in zip(ranks, resumed, strict=True):
        expected, weights = rank["ddp"]
        assert expected["samples"] == 21
        for strategy in ("fsdp", "hsdp"):
            evaluation, sharded = rank[strategy]
            assert evaluation["samples"] == 21
            assert evaluation["loss"] == pytest.approx(expected["loss"], rel=RTOL)
            for name, value in weights.items():
                torch.testing.assert_close(
                    torch.tensor(sharded[name]), torch.tensor(value), rtol=RTOL, atol=ATOL, msg=f"{strategy} {name}"
                )
        for strategy, (_, before) in rank.items():
            for name, value in again[strategy][1].items():
                assert (before[name] == value).all(), f"{strategy} {name}: loading a finished run changed it"
    first, second = (
        [line for line in read_metrics(tmp_path / strategy) if line["split"] == "train"] for strategy in ("ddp", "fsdp")
    )
    for a, b in zip(first, second, strict=True):
        assert a["rho"] == pytest.approx(b["rho"], rel=RTOL)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


def refusals(world: Distributed) -> list[str]:
    """The message of each refusal, and what the model is afterwards."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    cases: list[tuple[nn.Module, str, dict[str, Any]]] = [
        (net, "none", {}),
        (net, "hsdp", {"shard_size": 3}),
        (net, "hsdp", {"shard_size": 2, "replicate_size": 2}),
        (net, "fsdp", {"wrap_classes": ["Liner"]}),
        (Scaled(), "fsdp", {}),
        (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), "fsdp", {}),
    ]
    messages = []
    for model, strategy, options in cases:
        with pytest.raises(UserError) as error:
            wrap(model, world, strategy, **options)  # type: ignore[arg-type]
        messages.append(str(error.value))
    return messages


def test_refusals_name_value_and_remedy() -> None:
    for messages in run(refusals, 2):
        expected = (
            ("none", "2 processes", "ddp or fsdp"),
            ("parallel.shard_size 3: that does not fit 2 processes", "null takes what the other leaves"),
            ("parallel.shard_size 2 and parallel.replicate_size 2: that does not fit 2 processes",),
            ("'Liner'", "did you mean 'Linear'"),
            ("scalar parameter 'scale'", "ddp"),
            ("'weight'", "not contiguous", "channels_last images alone"),
        )
        for message, parts in zip(messages, expected, strict=True):
            for part in parts:
                assert part in message


def test_alone_every_strategy_is_the_model_itself() -> None:
    net = nn.Linear(2, 2)
    assert all(wrap(net, ALONE, strategy) is net for strategy in ("none", "ddp", "fsdp", "hsdp"))  # type: ignore[arg-type]

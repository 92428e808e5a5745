"""The trainer on two processes with parameters gathered in bfloat16 and an average of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from lesam_dist.config.command_line import parse
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train import trainer
from lesam_dist.train.meter import Meter
from lesam_dist.train.run import build_trainer
from lesam_dist.train.telemetry import read_metrics
from tests.parallel.processes import run

FLAGS = [
    *("--config", "digits", "--data.builtin", "null", "--data.batch_size", "20", "--data.eval_batch_size", "5"),
    *("--epochs", "1", "--schedule.anneal_start_epoch", "null", "--optimizer.lr", "0.01", "--optimizer.sigma", "0.02"),
    *("--precision.compute", "bf16", "--ema.decay", "0.5"),
    *("--logging.every_steps", "1"),
]
SHARDED = {"fsdp": [], "hsdp": ["--parallel.shard_size", "1"]}

# Under autocast DDP rounds the same operands of the same products; the orders of sums, and BatchNorm's small
# variances on digits, change which way values round.
LOSS = 2e-2

Fitted = dict[str, tuple[dict[str, float], dict[str, Any]]]  # evaluation, and averaged weights, of each strategy


def fit(world: Distributed, images: str, folder: str, resume: bool) -> Fitted:
    results: Fitted = {}
    # The second process is the one that waits for its data.
    Meter.rates = lambda _: {"images_per_s": 1.0, "data_wait": 0.25 + 0.5 * world.rank}  # type: ignore[method-assign]
    for strategy in ("ddp", *SHARDED):
        flags = [*FLAGS, "--data.root", images, "--run_dir", f"{folder}/{strategy}", "--parallel.strategy", strategy]
        if strategy in SHARDED:
            flags += ["--precision.gather_dtype", "bf16", *SHARDED[strategy]]
        this = build_trainer(parse([*flags, *(["--resume", "auto"] if resume else [])]), world)
        _spoil_second_step(this)
        layouts: list[bool] = []
        for module in this.model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(
                    lambda _, inputs, output, seen=layouts: seen.extend(
                        t.is_contiguous(memory_format=torch.channels_last) for t in (*inputs, output) if len(t)
                    )
                )
        evaluation = this.fit()
        this.close()
        assert this.ema is not None
        assert resume or len(layouts) > 9
        assert all(layouts), f"{strategy}: every convolution reads and writes channels last"
        average = this.ema.state_dict()
        assert average.pop("n_averaged").item() == 2, "of three steps one was skipped"
        averages = average.items()
        assert {average.dtype for _, average in averages} == {torch.float32}
        whole = {n: (a.full_tensor() if isinstance(a, DTensor) else a).numpy() for n, a in averages}
        results[strategy] = evaluation, whole
    return results


def _spoil_second_step(this: trainer.Trainer) -> None:
    """An image of the last process is not a number: no process may keep anything of that step."""
    original = this._step

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        bad = this.step == 1 and this.world.rank == this.world.world_size - 1
        images = batch[0].clone()
        images[0] *= float("nan") if bad else 1.0
        return original((images, batch[1]))

    this._step = step  # type: ignore[method-assign]


def test_sharded_in_bf16_follows_ddp_under_autocast_and_resumes(images: Path, tmp_path: Path) -> None:
    ranks = run(fit, 2, str(images), str(tmp_path), False)
    resumed = run(fit, 2, str(images), str(tmp_path), True)
    for rank, again in zip(ranks, resumed, strict=True):
        expected, _ = rank["ddp"]
        for strategy, (evaluation, averages) in rank.items():
            assert evaluation["samples"] == 21
            for name in ("loss", "ema_loss"):
                assert evaluation[name] == pytest.approx(expected[name], rel=LOSS), f"{strategy} {name}"
            assert evaluation["ema_loss"] != evaluation["loss"]
            assert evaluation == ranks[0][strategy][0]
            for name, value in again[strategy][1].items():
                assert (averages[name] == value).all(), f"{strategy} {name}: loading a finished run changed it"
    train = [line for line in read_metrics(tmp_path / "ddp") if line["split"] == "train"]
    assert [line["skipped"] for line in train] == [0, 1, 1]
    assert [(line["data_wait"], line["data_wait_max"]) for line in train] == [(0.5, 0.75)] * 3, "mean, and the worst"

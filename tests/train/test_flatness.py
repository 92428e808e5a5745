"""The low-pass filtered loss during a run: what an analysis of its checkpoint finds, on any processes, and no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.subject import load
from lesam_dist.analysis.measures.lpf import lpf_one_pass
from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.shards import local_shard
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.tasks.images.data import build_folders
from lesam_dist.train import build, trainer
from lesam_dist.train.checkpoint.weights import checkpoint_in
from lesam_dist.train.flatness import SEED, Flatness, read_images
from lesam_dist.train.randomness import LPF_NOISE, normal
from lesam_dist.train.source import read_source
from lesam_dist.train.telemetry import read_metrics
from tests.checkpoints import read_checkpoint
from tests.conftest import Command
from tests.parallel.processes import run

# Of 60 images; the last batch is smaller than the others, and odd.
MEASURED = (
    *("--analysis.every_epochs", "2", "--analysis.samples", "53", "--analysis.lpf_sigma", "0.05"),
    *("--data.eval_batch_size", "16"),
)
ALONE = Distributed(0, 0, 1, torch.device("cpu"))

# Sums of float32 in other orders, over batches of other sizes.
ROUNDING = 1e-5


def test_a_run_with_it_is_the_run_without_and_an_analysis_finds_the_same(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without, measured = tmp_path / "without", tmp_path / "measured"
    flags = (*small, "--logging.tensorboard", "false", *MEASURED)
    assert command(*flags, "--analysis.every_epochs", "null", "--run_dir", without)[0] == 0
    original = trainer.Trainer._evaluate

    def cut(self: trainer.Trainer) -> None:
        original(self)
        if self.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_evaluate", cut)
        assert command(*flags, "--run_dir", measured)[0] == 130
    assert command(*flags, "--run_dir", measured, "--resume", "auto")[0] == 0
    end, other = (read_checkpoint(checkpoint_in(run_dir)) for run_dir in (measured, without))
    for part in ("model", "optimizer"):
        torch.testing.assert_close(end[part], other[part], rtol=0, atol=0)
    found = {line["step"]: line for line in read_metrics(measured) if line["split"] == "val"}
    assert [step for step, line in found.items() if "lpf" in line] == [6, 9], "after 2 epochs, and the last"
    for line in read_metrics(without):
        assert "lpf" not in line
        assert line["split"] == "train" or line.items() <= found[line["step"]].items()

    subject = load(read_source(measured), ALONE, samples=53, seed=SEED)
    objective = subject.objective()
    assert found[9]["lpf_loss"] == pytest.approx(objective.loss(), rel=ROUNDING)
    train = build_folders(subject.source.config, ALONE)[0]
    batches = read_images(subject.source.config, train, ALONE)
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 5]
    assert all(len(labels.unique()) == 3 for _, labels in batches[:3]), "each has all classes"
    one_pass = lpf_one_pass(Objective(subject.model, batches), 0.05, SEED)
    assert found[9]["lpf"] == pytest.approx(one_pass, rel=ROUNDING)
    assert found[9]["lpf"] != found[9]["lpf_loss"]


def setting(images: str, strategy: str = "none", *flags: str) -> Config:
    words = ["--config", "digits", "--data.root", images, "--data.builtin", "null", "--data.workers", "1"]
    return parse([*words, "--parallel.strategy", strategy, *MEASURED, *flags])


def network(config: Config, world: Distributed, seed: int) -> torch.nn.Module:
    """With statistics and weights that are not those of a fresh one."""
    model = build.build_network(config, 3, world)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))
    return model


def measure(world: Distributed, images: str, seed: int) -> dict[str, dict[str, float]]:
    config = setting(images)
    batches = read_images(config, build_folders(config, world)[0], world)
    found = {}
    for strategy in ("ddp", "fsdp", "hsdp") if world.world_size > 1 else ("none",):
        model = network(setting(images, strategy), world, seed).train()
        kept = strategy != "fsdp"  # without it forwards leave the parameters gathered
        shard_size = 1 if strategy == "hsdp" else None
        wrap(model, world, strategy, shard_size=shard_size, reshard_after_forward=kept)  # type: ignore[arg-type]
        tensors = [local_shard(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]
        before, drawn = [tensor.clone() for tensor in tensors], torch.get_rng_state()
        flatness = Flatness(model, batches, world, config)
        found[strategy] = flatness.measure()
        assert flatness.measure() == found[strategy], "the same noise each time"
        torch.testing.assert_close(tensors, before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert all(module.training for module in model.modules())
    return found


def direct(images: str, seed: int) -> tuple[float, float]:
    """The definition, batch by batch."""
    config = setting(images)
    batches = read_images(config, build_folders(config, ALONE)[0], ALONE)
    model = network(config, ALONE, seed).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    weights = parameters_to_vector(model.parameters()).detach()

    def sums(scale: float) -> float:
        total = 0.0
        for i, (x, y) in enumerate(batches):
            vector_to_parameters(
                weights + scale * normal(len(weights), weights, SEED, LPF_NOISE, i), model.parameters()
            )
            total += Objective(model, [(x, y)]).loss() * len(y)
        return total / 53

    return sums(0.05), sums(0.0)


def test_sharded_weights_get_the_noise_of_whole_ones(images: Path, seed: int) -> None:
    lpf, loss = direct(str(images), seed)
    ranks: list[dict[str, Any]] = run(measure, 2, str(images), seed)
    for found in [*ranks, measure(ALONE, str(images), seed)]:
        for strategy, values in found.items():
            assert values == pytest.approx({"lpf": lpf, "lpf_loss": loss}, rel=ROUNDING), strategy
    assert ranks[0] == ranks[1]


def test_what_cannot_be_measured_is_refused(images: Path) -> None:
    with pytest.raises(UserError, match=r"precision\.weights is bf16, which rounds the noise"):
        setting(str(images), "none", "--precision.weights", "bf16", "--precision.compute", "bf16")
    with pytest.raises(UserError, match=r"precision\.gather_dtype is bf16, which rounds the noise"):
        setting(str(images), "fsdp", "--precision.gather_dtype", "bf16", "--precision.compute", "bf16")
    with pytest.raises(UserError, match=r"analysis\.lpf_sigma is 0\.0: it must be above 0"):
        setting(str(images), "none", "--analysis.lpf_sigma", "0")
    many = Distributed(0, 0, 64, torch.device("cpu"))
    config = setting(str(images))
    train = build_folders(config, ALONE)[0]
    with pytest.raises(UserError, match=r"analysis\.samples is 53, of 60 training images: each of 64 processes"):
        read_images(config, train, many)
    config.data.eval_batch_size = 4
    with pytest.raises(UserError, match=r"eval_batch_size is 4, which is less than one image for each of 32"):
        read_images(config, train, Distributed(0, 0, 32, torch.device("cpu")))

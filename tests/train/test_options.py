"""Options of a run that change its speed, its memory or what it evaluates, through the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import VisionTransformer

from lesam_dist.config.checks import checked
from lesam_dist.config.command_line import parse
from lesam_dist.config.same_run import check_same_run
from lesam_dist.config.schema import Config
from lesam_dist.config.values import flatten
from lesam_dist.data.auto_augment import policy_of
from lesam_dist.data.scan import scan
from lesam_dist.data.torchvision_loader import TorchvisionLoader
from lesam_dist.errors import UserError
from lesam_dist.parallel import blocks
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images import network
from lesam_dist.tasks.images.data import build_folders, build_loaders
from lesam_dist.train import build
from lesam_dist.train.telemetry import read_metrics
from tests.conftest import Command
from tests.parallel.test_blocks import NEEDS_INDUCTOR


def val_lines(run_dir: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(run_dir) if line["split"] == "val"]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_is_evaluated_beside_the_weights(
    command: Command, small: tuple[str, ...], tmp_path: Path, decay: float
) -> None:
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    assert command(*small, "--run_dir", plain)[0] == 0
    assert command(*small, "--run_dir", averaged, "--ema.decay", str(decay))[0] == 0
    for line, expected in zip(val_lines(averaged), val_lines(plain), strict=True):
        average = {name: line.pop(f"ema_{name}") for name in ("acc1", "loss", "ece")}
        assert line == expected, "averaging must not change the run"
        assert (average["loss"] == line["loss"]) == (decay == 0), "decay 0 is the weights themselves"
    assert (averaged / "curves.png").exists()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.full, NEEDS_INDUCTOR])])
def test_compiled_run(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """By the flag. That graphs become code is tested without the mark in tests/parallel/test_blocks.py."""
    compiled_nets: list[object] = []

    def compile_with(net: torch.nn.Module, *args: Any, **options: Any) -> None:
        compiled_nets.append(net)
        blocks.compile_in_place(net, *args, **options | {"backend": backend})

    monkeypatch.setattr(build, "compile_in_place", compile_with)
    flags = (*small, "--epochs", "1", "--schedule.anneal_start_epoch", "null", "--optimizer.lr", "0.01")
    runs = tmp_path / "eager", tmp_path / "compiled"
    try:
        for run_dir, compile in zip(runs, ("false", "true"), strict=True):
            assert command(*flags, "--run_dir", run_dir, "--model.compile", compile)[0] == 0
            assert len(compiled_nets) == (compile == "true")
    finally:
        torch._dynamo.reset()
    lines = [read_metrics(run_dir) for run_dir in runs]
    assert len(lines[0]) == len(lines[1]) == 4, "three steps and an evaluation"
    for eager, compiled in zip(*lines, strict=True):
        # Digits on an even background: BatchNorm divides by such small variances that both runs' first gradients are
        # some 2e-3 off float64's.
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-2)
    assert lines[1][0]["rho"] == pytest.approx(lines[0][0]["rho"], rel=1e-2)


def test_recomputation_reaches_the_model(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def tiny(*_: object, **__: object) -> VisionTransformer:
        return VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3)

    monkeypatch.setattr(network, "build_model", tiny)
    world = Distributed(0, 0, 1, torch.device("cpu"))
    kept = []
    for flag in ("false", "true"):
        net = build.build_network(parse(["--model.activation_checkpointing", flag, "--data.image_size", "8"]), 3, world)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            net(torch.randn(2, 3, 8, 8))
        kept.append(sum(saved))
    assert kept[1] < kept[0]


def test_augmentation_reaches_the_loader(images: Path) -> None:
    world = Distributed(0, 0, 1, torch.device("cpu"))
    flags = (
        "--config digits --data.builtin null --data.backend torchvision --data.batch_size 20 --data.repeats 5 "
        "--data.auto_augment randaugment --data.randaugment_ops 3 --data.randaugment_magnitude 4 "
        "--data.random_erasing 0.2 --data.val_resize 48 --data.val_crop 40 --schedule.image_size [[0,24],[2,40]]"
    )
    config = parse([*flags.split(), "--data.root", str(images)])
    loaders = build_loaders(config, build_folders(config, world), world)
    for loader, repeats in zip(loaders, (5, 1), strict=True):
        assert isinstance(loader, TorchvisionLoader)
        transform = loader._plan.transform
        assert loader._plan.repeats == repeats
        assert transform.policy == policy_of("randaugment", 3, 4)
        assert transform.random_erasing == 0.2
        assert [transform.side(epoch) for epoch in (0, 1, 2, 9)] == [24, 24, 40, 40]
        assert transform.val_side == 40


def test_sizes_that_a_model_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT is made for one size, which is data.image_size."""

    def tiny(*_: object, image_size: int, **__: object) -> VisionTransformer:
        return VisionTransformer(image_size, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3)

    monkeypatch.setattr(network, "build_model", tiny)
    world = Distributed(0, 0, 1, torch.device("cpu"))
    for field, flags in (
        ("schedule.image_size", ["--schedule.image_size", "[[0,8],[1,16]]"]),
        ("data.val_crop", ["--data.val_crop", "16"]),
    ):
        config = parse(["--data.image_size", "8", *flags])
        with pytest.raises(UserError, match=rf"16 x 16 pixels at once .*: change {field}, which asks for that size"):
            build.build_network(config, 3, world)
    build.build_network(parse(["--data.image_size", "8", "--schedule.image_size", "[[0,8]]"]), 3, world)


def test_what_may_differ_on_resume() -> None:
    saved = flatten(checked(Config()))
    free = parse(["--model.compile", "true", "--model.activation_checkpointing", "true"])
    check_same_run(free, saved)
    flags = "--ema.decay 0.9 --precision.gather_dtype bf16 --precision.compute bf16 --parallel.strategy fsdp"
    changed = parse(flags.split())
    with pytest.raises(UserError) as error:
        check_same_run(changed, saved)
    assert "ema.decay: None then, 0.9 now" in str(error.value)
    assert "precision.gather_dtype: 'fp32' then, 'bf16' now" in str(error.value)
    for flag, text in (("data.mixup", "0.2"), ("data.repeats", "2"), ("schedule.image_size", "[[0,64]]")):
        with pytest.raises(UserError, match=rf"{flag}: .* then, .* now"):
            check_same_run(parse([f"--{flag}", text]), saved)
    # A checkpoint of a version that did not know these fields.
    for path in ("ema.decay", "precision.gather_dtype"):
        del saved[path]
    check_same_run(checked(Config()), saved)
    with pytest.raises(UserError, match=r"ema\.decay: None then"):
        check_same_run(changed, saved)


def test_a_run_leaves_out_what_a_scan_lists(
    command: Command, small: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    """And evaluates on whole images alone, which it would refuse with a broken one."""
    root = tmp_path / "images"
    shutil.copytree(images, root)
    for split in ("train", "val"):
        min(path for path in (root / split).rglob("*") if path.is_file()).write_bytes(b"404: not found")
    short = ("--epochs", "1", "--schedule.anneal_start_epoch", "null")
    flags = (*small, *short, "--data.root", root, "--data.max_bad_files", "0")
    assert command(*flags, "--run_dir", tmp_path / "refused")[0] == 2
    file = tmp_path / "skip.json"
    assert command(*flags, "--run_dir", tmp_path / "run", "--data.skip_list", file)[0] == 2, "there is none yet"
    assert scan([str(root), "--out", str(file), "--workers", "1"]) == 1
    status, out, err = command(*flags, "--run_dir", tmp_path / "run", "--data.skip_list", file)
    assert status == 0, err
    assert "data.skip_list leaves out 1 training and 1 validation images" in out
    assert [line for line in read_metrics(tmp_path / "run") if line.get("bad_files")] == []

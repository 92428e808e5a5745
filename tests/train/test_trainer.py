"""Whole runs on a few real images: what they write, and that a resumed one is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from lesam_dist.train import trainer as module
from lesam_dist.train.checkpoint import payload
from lesam_dist.train.meter import TIMED
from lesam_dist.train.telemetry import read_metrics
from tests.checkpoints import latest, read_checkpoint
from tests.conftest import CLASSES, VAL, Command

REPOSITORY = Path(__file__).parents[2]


def final_state(run_dir: Path) -> dict[str, Any]:
    return read_checkpoint(latest(run_dir))


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
    torch.testing.assert_close(first.get("ema"), second.get("ema"), rtol=0, atol=0)
    torch.testing.assert_close(first["optimizer"], second["optimizer"], rtol=0, atol=0)
    assert first["values"] == second["values"]


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(run_dir)]


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_a_run_writes_what_it_promises(command: Command, small: tuple[str, ...], tmp_path: Path, backend: str) -> None:
    run_dir = tmp_path / "run"
    flags = ("--data.backend", backend, "--optimizer.sigma", "0.15", "--schedule.anneal_start_epoch", "1")
    flags += ("--checkpoint.keep_best", "false")
    status, out, err = command(*small, "--run_dir", run_dir, *flags)
    assert (status, err) == (0, "")
    assert str(run_dir) in out.splitlines()[-1]
    lines = read_metrics(run_dir)
    train, val = ([line for line in lines if line["split"] == split] for split in ("train", "val"))
    assert [line["step"] for line in train] == list(range(1, 10))
    assert [line["step"] for line in val] == [3, 6, 9]
    assert {
        "loss",
        "perturbed_loss",
        "rho",
        "sigma",
        "grad_norm",
        "lr",
        "images_per_s",
        "data_wait",
        "data_wait_max",
        "images_per_s_per_device",
        "share_pass_1",
        "share_pass_2",
        "share_optimizer",
        "skipped",
    } < set(train[0])
    assert all(line["samples"] == VAL * len(CLASSES) for line in val)
    for t, line in enumerate(train):
        # Annealing from epoch 1 of 3: 3 steps at sigma, then a cosine over 6 that ends at 0.
        sigma = 0.15 if t < 3 else 0.075 * (1 + math.cos(math.pi * (t - 3) / 5))
        assert line["sigma"] == pytest.approx(sigma, abs=1e-12)
        assert line["rho"] == pytest.approx(min(sigma / line["grad_norm"], 0.2))
        lr = 0.1 * ((t + 1) / 3 if t < 3 else 0.5 * (1 + math.cos(math.pi * (t - 3) / 6)))
        assert line["lr"] == pytest.approx(lr)
    assert train[-1]["perturbed_loss"] == train[-1]["loss"], "sigma is 0 in the last step"
    assert train[0]["perturbed_loss"] > train[0]["loss"]
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run_dir / "tensorboard").glob("events*"))
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["optimizer"]["args"]["sigma"] == 0.15
    assert len(list((run_dir / "checkpoints").glob("step_*"))) == 2


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--optimizer.name", "sgd", "--ema.decay", "0.8"),
        ("--precision.compute", "bf16", "--data.micro_batches", "2"),
        # Small images: a CPU's convolutions in float16 take 3 s a step at 32 pixels.
        (
            *("--precision.compute", "fp16", "--data.image_size", "8", "--data.val_resize", "8"),
            *("--optimizer.base", "adamw", "--optimizer.lr", "0.01"),
        ),
        # The epoch that is cut reuses a gradient of the one before.
        (
            "--optimizer.ascent_interval",
            "5",
            "--optimizer.ascent_between",
            "reuse",
            "--optimizer.ascent_fraction",
            "0.5",
        ),
        (
            *("--data.accumulation_mode", "micro", "--data.micro_batches", "2", "--optimizer.max_grad_norm", "0.5"),
            *("--precision.compute", "fp16", "--data.image_size", "8", "--data.val_resize", "8"),
        ),
    ],
    ids=" ".join,
)
def test_resumed_run_equals_the_uninterrupted_one(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    small = (*small, *flags)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(*small, "--run_dir", whole)[0] == 0

    original = module.Trainer._log_step

    def cut(self: module.Trainer, *args: Any) -> None:
        original(self, *args)
        if self.step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Trainer, "_log_step", cut)
        assert command(*small, "--run_dir", broken)[0] == 130
    status, out, _ = command(*small, "--run_dir", broken, "--resume", "auto")
    assert status == 0
    assert "from epoch 2" in out
    assert timeless(broken) == timeless(whole)
    assert_same_state(final_state(broken), final_state(whole))
    superseded = (broken / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in superseded] == [7, 8], "the lines of the cut epoch are kept aside"


def test_resuming_a_finished_run_changes_nothing(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command(*small, "--run_dir", run_dir)
    before = (run_dir / "metrics.jsonl").read_bytes()
    junk = b"[1]\n\xff\n", b'{"step": "1", "split": "val"}\n{"step": 1'  # it moves aside
    (run_dir / "metrics.jsonl").write_bytes(junk[0] + before + junk[1])
    assert command(*small, "--run_dir", run_dir, "--resume", "auto")[0] == 0
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_damaged_checkpoint_falls_back_with_a_warning(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command(*small, "--run_dir", run_dir)
    expected = timeless(run_dir), final_state(run_dir)
    victim = next((run_dir / "checkpoints" / "step_00000009").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:100])
    status, out, _ = command(*small, "--run_dir", run_dir, "--resume", "auto")
    assert status == 0
    assert f"{victim} is truncated: 100 of" in out
    assert "from epoch 2" in out
    assert timeless(run_dir) == expected[0]
    assert_same_state(final_state(run_dir), expected[1])


def test_any_name_on_a_terminal_without_its_characters(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_dir = tmp_path / "läuft 日本 $\\no math$"
    assert command(*small, "--epochs", "2", "--run_dir", run_dir)[::2] == (0, "")
    terminal.flush()
    assert rb"l\xe4uft \u65e5\u672c" in terminal.buffer.getvalue()  # type: ignore[attr-defined]
    assert (run_dir / "curves.png").exists()


def test_existing_run_is_not_overwritten(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command(*small, "--run_dir", run_dir)
    before = (run_dir / "metrics.jsonl").read_text()
    status, _, err = command(*small, "--run_dir", run_dir)
    assert status == 2
    assert "already holds a run" in err
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_resume_refuses_a_config_that_changes_the_run(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command(*small, "--run_dir", run_dir)
    before = (run_dir / "config.yaml").read_text()
    status, _, err = command(
        *small, "--run_dir", run_dir, "--resume", "auto", "--optimizer.sigma", "0.7", "--seed", "3"
    )
    assert status == 2
    assert "optimizer.args.sigma: 0.1 then, 0.7 now" in err
    assert "seed: 0 then, 3 now" in err
    assert (run_dir / "config.yaml").read_text() == before
    # What changes only the speed or the log may differ.
    assert (
        command(
            *small,
            "--run_dir",
            run_dir,
            "--resume",
            "auto",
            "--data.workers",
            "2",
            "--data.micro_batches",
            "2",
            "--logging.every_steps",
            "7",
        )[0]
        == 0
    )


def test_full_disk_ends_with_one_clear_error(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"

    def full(self: object, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.RunLog, "write", full)
    status, _, err = command(*small, "--run_dir", run_dir)
    assert status == 2
    assert "No space left on device" in err
    assert "--resume auto" in err


@pytest.mark.parametrize("asynchronous", ["always", "never"])
def test_a_run_whose_last_checkpoint_failed_does_not_end_well(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: str
) -> None:
    """The evaluation after it, which is added to the checkpoint, must not hide that there is none."""
    written = payload.write

    def full(path: Path, tensors: Any) -> Any:
        if "step_00000009" in str(path):
            raise OSError(28, "No space left on device")
        return written(path, tensors)

    flags = (*small, "--run_dir", tmp_path / "run", "--checkpoint.asynchronous", asynchronous)
    with monkeypatch.context() as patched:
        patched.setattr(payload, "write", full)
        status, _, err = command(*flags)
    assert status == 2
    assert "the checkpoint of step 9 could not be written" in err
    assert command(*flags, "--resume", "auto")[0] == 0
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000009"


@pytest.mark.parametrize("method", ["lesam", "sgd"])
def test_diverging_run_is_stopped(command: Command, small: tuple[str, ...], tmp_path: Path, method: str) -> None:
    flags = ("--optimizer.name", method, "--optimizer.lr", "1e10", "--max_nonfinite_steps", "4")
    status, out, err = command(*small, *flags, "--run_dir", tmp_path / "run")
    assert status == 2
    assert len(err.splitlines()) == 2
    assert "With half the learning rate, from the start: lesam-dist train " in err.splitlines()[1]
    assert "the run has diverged: the loss or a gradient in the last 4 steps was not finite" in err
    assert "Lower optimizer.lr (it is 1e+10)" in err
    assert out.count("warning: ") == 1
    train = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    assert [line["loss"] for line in train[-4:]] == [None] * 4
    assert len(train) < 9
    good = next(line for line in reversed(train) if line["loss"] is not None)
    assert f"step {good['step']}: loss {good['loss']:.4g}, rho {good.get('rho', 0.0):.4g}, grad_norm " in err


def test_diverged_run_keeps_the_last_finite_checkpoint(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 5 on every image is nan: too late for the limit, but the run does not end well, nor when it goes on."""
    original = module.Trainer._step

    def poisoned(self: module.Trainer, batch: Any) -> Tensor:
        images, labels = batch
        return original(self, (images * math.nan if self.step >= 4 else images, labels))

    monkeypatch.setattr(module.Trainer, "_step", poisoned)
    flags = (*small, "--checkpoint.keep", "1", "--run_dir", tmp_path / "run")
    for resume in ((), ("--resume", "auto")):
        status, out, err = command(*flags, *resume)
        assert status == 2
        checkpoints = tmp_path / "run" / "checkpoints"
        assert "diverged: the loss or a gradient in the last 5 steps" in err
        assert f"The last checkpoint before that is {checkpoints / 'step_00000003'}." in err
        assert {path.name for path in checkpoints.glob("step*")} == {"step_00000003", "step_00000009"}
        assert out.count("warning: up to step 5 the loss") == (not resume)


def test_bad_validation_image_costs_no_epoch(
    command: Command, small: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    """One in the first batch shows before training, one in the last after the epoch has been saved."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = (*small, "--data.eval_batch_size", "5")
    assert command(*flags, "--run_dir", whole)[0] == 0
    found = sorted(path for path in (images / "val").rglob("*") if path.is_file())
    for path, steps, resume in ((found[0], 0, ()), (found[-1], 3, ("--resume", "auto"))):
        content = path.read_bytes()
        path.write_bytes(b"no image")
        try:
            status, _, err = command(*flags, "--run_dir", broken, *resume)
        finally:
            path.write_bytes(content)
        assert status == 2
        assert str(path) in err
        assert len(list((broken / "checkpoints").glob("step*"))) == (steps > 0)
        assert len(read_metrics(broken)) == steps
    assert command(*flags, "--run_dir", broken, "--resume", "auto")[0] == 0
    assert timeless(broken) == timeless(whole)
    assert_same_state(final_state(broken), final_state(whole))


@pytest.mark.parametrize("method", ["sam", "adamw"])
def test_other_optimizers_run(command: Command, small: tuple[str, ...], tmp_path: Path, method: str) -> None:
    rho = ("--optimizer.rho", "0.03") if method == "sam" else ()
    flags = ("--optimizer.name", method, *rho, "--optimizer.lr", "0.01", "--epochs", "2")
    assert command(*small, *flags, "--run_dir", tmp_path / "run")[0] == 0
    train = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    assert train[0].get("rho") == (pytest.approx(0.03) if method == "sam" else None)
    assert "sigma" not in train[0]


def test_odd_images_train_through_dali(command: Command, seed: int, tmp_path: Path) -> None:
    """Odd sizes, grayscale, CMYK, one-pixel-thin, and a PNG named .JPEG, as real data sets have them."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 12), ("val", 5)):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = (1, 57) if i == 4 else rng.integers(20, 90, 2)
                pixels = rng.integers(0, 90, (height, width, 3)) + 160 * label
                image = Image.fromarray(pixels.astype(np.uint8)).convert(("RGB", "L", "CMYK")[i % 3])
                is_png = i % 3 != 2 and i % 2 == 0
                image.save(folder / f"{i}.JPEG", "PNG" if is_png else "JPEG")
    flags = ("--config", "digits", "--data.builtin", "null", "--data.root", tmp_path / "data", "--data.batch_size", "8")
    status, _, err = command(*flags, "--optimizer.lr", "0.01", "--epochs", "6", "--run_dir", tmp_path / "run")
    assert (status, err) == (0, "")
    val = [line for line in read_metrics(tmp_path / "run") if line["split"] == "val"]
    assert val[-1]["samples"] == 10
    assert val[-1]["acc1"] == 100, "brightness alone tells the classes apart"


@pytest.mark.parametrize(
    ("flags", "acc1"),
    [(["--epochs", "2"], 50), pytest.param([], 97, marks=pytest.mark.full)],
    ids=["short", "whole"],
)
def test_digits_recipe_on_two_processes(tmp_path: Path, flags: list[str], acc1: float) -> None:
    """What `make train` runs where there is no GPU: two epochs of it, where chance is 10 %, and to its end."""
    result = subprocess.run(
        [REPOSITORY / "launch" / "torchrun.sh", "--config", "digits", "--run_dir", tmp_path / "run", *flags],
        capture_output=True,
        text=True,
        timeout=420,
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "NPROC_PER_NODE": str(torch.cuda.device_count() or 2),
        },
    )
    assert result.returncode == 0, result.stderr
    assert f"results: {tmp_path / 'run'}" in result.stdout
    val = [line for line in read_metrics(tmp_path / "run") if line["split"] == "val"]
    assert val[-1]["samples"] == 359
    assert val[-1]["acc1"] >= acc1

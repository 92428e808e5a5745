"""A config that this machine cannot run is refused in words: no images, a single class, too few processes, no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import Command


def test_no_data_root(command: Command) -> None:
    status, _, err = command("--config", "imagenet_resnet50_lesam")
    assert status == 2
    assert "--data.root DIR" in err


@pytest.mark.parametrize("shape", ["flat", "empty class"])
def test_root_that_is_not_class_folders(command: Command, tmp_path: Path, shape: str) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        (root / split / "cat" if shape != "flat" else root / split).mkdir(parents=True)
    status, _, err = command(
        "--config", "digits", "--data.builtin", "null", "--data.root", root, "--run_dir", tmp_path / "r"
    )
    assert status == 2
    assert ("cat" if shape != "flat" else str(root / "train")) in err


def test_a_single_class_is_refused(command: Command, images: Path, tmp_path: Path) -> None:
    """It would end at top-1 100 %."""
    for split in ("train", "val"):
        shutil.copytree(images / split / "1", tmp_path / "data" / split / "photos")
    flags = (
        "--config",
        "digits",
        "--data.builtin",
        "null",
        "--data.root",
        tmp_path / "data",
        "--run_dir",
        tmp_path / "r",
    )
    status, _, err = command(*flags)
    assert status == 2
    assert f"'{tmp_path / 'data' / 'train'}' has a single class folder, 'photos': there is nothing to tell apart" in err


def test_what_is_not_trained_or_evaluated_is_said(command: Command, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "1")
    (tmp_path / "data" / "train" / "0" / "scan.gif").write_bytes(b"")
    flags = (
        "--config",
        "digits",
        "--data.builtin",
        "null",
        "--data.root",
        tmp_path / "data",
        "--data.batch_size",
        "20",
    )
    status, out, _ = command(
        *flags, "--epochs", "1", "--schedule.anneal_start_epoch", "null", "--run_dir", tmp_path / "r"
    )
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith("warning: ")] == [
        f"warning: '{tmp_path / 'data' / 'train'}': passed over 1 .gif files",
        f"warning: '{tmp_path / 'data' / 'val'}' has no images of 1 of 3 classes, which are not evaluated: '1'",
    ]


def test_batch_that_the_processes_do_not_divide(images: Path, tmp_path: Path) -> None:
    """Under torchrun: one of the ranks speaks for both, and no rank hangs."""
    flags = [
        "--config",
        "digits",
        "--data.builtin",
        "null",
        "--data.root",
        str(images),
        "--data.batch_size",
        "21",
    ]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "-m",
            "lesam_dist.train",
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode != 0
    assert result.stderr.count("the global batch size 21 cannot be divided by 2 processes") == 1


def test_triton_without_a_gpu(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    flags = ("--optimizer.backend", "triton", "--parallel.device", "cpu", "--run_dir", tmp_path / "run")
    status, _, err = command(*small, *flags)
    assert status == 2
    assert "optimizer.backend is triton: backend='triton' was chosen but the parameters are on 'cpu'" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the remedy is for hosts without a GPU")
def test_cuda_where_there_is_none(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    status, _, err = command(*small, "--run_dir", tmp_path / "r", "--parallel.device", "cuda")
    assert status == 2
    assert "no GPU" in err

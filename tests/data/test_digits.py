"""The digits on disk: all of them, once, split for good, complete or absent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from lesam_dist.data import scans as module
from lesam_dist.data.digits import prepare_digits
from lesam_dist.errors import UserError


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.JPEG"))}


def test_all_digits_are_there(digits: Path) -> None:
    scans, labels = load_digits(return_X_y=True)
    files = sorted(digits.rglob("*.JPEG"), key=lambda path: path.stem)
    assert [path.stem for path in files] == [f"{i:04}" for i in range(1797)]
    assert [int(path.parent.name) for path in files] == labels.tolist()
    pixels = np.stack([np.asarray(Image.open(path)) for path in files]).astype(float)
    assert pixels.shape == (1797, 32, 32)
    # Averaged back to 8 x 8: the scan, but for bicubic overshoot and JPEG.
    coarse = pixels.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).ravel()
    assert np.corrcoef(coarse, scans.ravel())[0, 1] > 0.98


def test_split_is_stratified_and_fixed(digits: Path, tmp_path: Path) -> None:
    _, labels = load_digits(return_X_y=True)
    for digit in range(10):
        held_out = len(list((digits / "val" / str(digit)).iterdir()))
        assert held_out == round(0.2 * (labels == digit).sum())
    again = prepare_digits(tmp_path / "again")
    assert contents(again) == contents(digits)
    other = contents(prepare_digits(tmp_path / "other", seed=1))
    assert other.keys() != contents(digits).keys()
    assert len(other) == 1797


def test_noisy_digits(digits: Path, tmp_path: Path) -> None:
    """30 training images of each digit, of which 6 have another label; the validation images of the clean data."""
    root = prepare_digits(tmp_path / "noisy", noisy=True)
    clean, noisy = contents(digits), contents(root)
    assert {k: v for k, v in noisy.items() if k.startswith("val")} == {
        k: v for k, v in clean.items() if k.startswith("val")
    }
    _, truth = load_digits(return_X_y=True)
    train = [Path(name) for name in noisy if name.startswith("train")]
    digit = np.array([truth[int(path.stem)] for path in train])
    label = np.array([int(path.parent.name) for path in train])
    assert np.bincount(digit).tolist() == [30] * 10
    assert np.bincount(digit[digit != label]).tolist() == [6] * 10
    for path, of in zip(train, digit, strict=True):
        assert noisy[str(path)] == clean[f"train/{of}/{path.name}"]
    [header, *lines] = (root / "wrong_labels.csv").read_text().split()
    assert header == "number,digit,label"
    listed = sorted(tuple(map(int, line.split(","))) for line in lines)
    wrong = np.flatnonzero(digit != label)
    assert listed == sorted((int(train[i].stem), int(digit[i]), int(label[i])) for i in wrong)


def test_noise_is_fixed(tmp_path: Path) -> None:
    first = prepare_digits(tmp_path / "a", noisy=True)
    assert contents(prepare_digits(tmp_path / "b", noisy=True)) == contents(first)
    assert contents(prepare_digits(tmp_path / "c", seed=1, noisy=True)) != contents(first)
    labels = [int(line.split(",")[2]) for line in (first / "wrong_labels.csv").read_text().split()[1:]]
    # Uniform over the other digits: 60 labels, 6 of each expected.
    assert np.abs(np.bincount(labels, minlength=10) - 6).max() < 6 * 6**0.5
    assert len(set(labels)) > 5


def test_the_two_variants_are_not_mixed_up(digits: Path, tmp_path: Path) -> None:
    noisy = prepare_digits(tmp_path / "noisy", noisy=True)
    assert prepare_digits(noisy, noisy=True) == noisy
    with pytest.raises(UserError, match=r"is not the noisy digits dataset \(the one without noise\): choose another"):
        prepare_digits(digits, noisy=True)
    with pytest.raises(UserError, match=r"is not the digits dataset \(the noisy one\): choose another"):
        prepare_digits(noisy)


def test_second_call_does_nothing(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(module, "_write", fail)
    assert prepare_digits(digits) == digits


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object, folder: Path, *__: object) -> None:
        (folder / "train" / "0").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(_: object, folder: Path, *__: object) -> None:
        for root in (folder, tmp_path / "digits"):
            shutil.copytree(digits, root, dirs_exist_ok=True)

    monkeypatch.setattr(module, "_write", overtaken)
    assert prepare_digits(tmp_path / "digits") == tmp_path / "digits"
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


@pytest.mark.parametrize("noisy", [False, True])
def test_other_images_are_not_taken_for_digits(digits: Path, tmp_path: Path, noisy: bool) -> None:
    """Somebody's photographs, and digits of which a file is missing, is there twice, or is somebody else's."""
    photos = tmp_path / "photos"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (photos / split / name).mkdir(parents=True)
            (photos / split / name / "1.jpg").write_bytes(b"")
    message = r"is not the (noisy )?digits dataset \(other images, or not all of them\): .*--data.builtin null"
    with pytest.raises(UserError, match=message):
        prepare_digits(photos, noisy=noisy)

    whole = prepare_digits(tmp_path / "whole", noisy=noisy)
    first, second = (f"3/{path.name}" for path in sorted((whole / "train" / "3").iterdir())[:2])
    changes: list[Callable[[Path, Path], object]] = [
        lambda train, val: (train / first).unlink(),
        lambda train, val: (train / first).rename(train / "3" / "cat.JPEG"),
        lambda train, val: (train / second).rename(val / first),
        lambda train, val: (train / "3" / "cat.png").write_bytes(b""),
        lambda train, val: (train / "3").rename(train / "cat"),
    ]
    for i, change in enumerate(changes):
        root = shutil.copytree(whole, tmp_path / str(i), copy_function=os.link)
        assert prepare_digits(root, noisy=noisy) == root
        change(root / "train", root / "val")
        with pytest.raises(UserError, match=message):
            prepare_digits(root, noisy=noisy)


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"cannot write the digits dataset to '.*file/digits' \(.+\): choose"):
        prepare_digits(tmp_path / "file" / "digits")
    for name in ("file", "other"):
        with pytest.raises(UserError, match=rf"{name}' exists and is not the digits dataset .* choose another"):
            prepare_digits(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert prepare_digits(tmp_path / "empty") == tmp_path / "empty"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=r"Permission denied.*choose a folder that you may write"):
        prepare_digits(tmp_path / "digits")


def test_command_line(digits: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "lesam_dist.data.digits"]
    done = subprocess.run([*command, str(digits)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{digits}: 1797 digits in train/ and val/, 32 x 32 pixels, 10 classes\n"
    (tmp_path / "file").write_text("")
    failed = subprocess.run([*command, str(tmp_path / "file")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "choose another folder" in failed.stderr
    assert "Traceback" not in failed.stderr

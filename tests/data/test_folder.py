"""What ``scan_split`` finds, in which order, and what it says when a folder is not as expected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lesam_dist.data import scan_split
from lesam_dist.data.folder import remarks
from lesam_dist.errors import UserError


def write(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    return root


def test_sorted_classes_and_files(tmp_path: Path) -> None:
    write(tmp_path, "train/b/2.png", "train/b/10.JPEG", "train/a/z.Jpg", "train/a/y.WEBP", "train/B/x.bmp")
    found = scan_split(tmp_path, "train")
    assert found.classes == ("B", "a", "b")
    expected = ["B/x.bmp", "a/y.WEBP", "a/z.Jpg", "b/10.JPEG", "b/2.png"]
    assert found.paths == tuple(str(tmp_path / "train" / name) for name in expected)
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == [0, 1, 1, 2, 2]
    assert len(found) == 5


def test_agrees_with_torchvision(digits: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    theirs = datasets.ImageFolder(digits / "train")
    ours = scan_split(digits, "train")
    assert list(ours.classes) == theirs.classes
    assert list(zip(ours.paths, ours.labels.tolist(), strict=True)) == theirs.samples


def test_passes_over_what_is_no_image(tmp_path: Path) -> None:
    write(
        tmp_path,
        "train/a/1.png",
        "train/a/notes.txt",
        "train/a/._1.png",
        "train/.cache/2.png",
        "train/README",
    )
    (tmp_path / "train/a/sub.png").mkdir()
    found = scan_split(tmp_path, "train")
    assert found.classes == ("a",)
    assert [Path(path).name for path in found.paths] == ["1.png"]
    assert found.passed_over == {".txt files": 1}


def test_what_may_have_been_meant_is_counted(tmp_path: Path) -> None:
    write(
        tmp_path,
        *("train/a/1.png", "train/a/2.gif", "train/a/3.GIF", "train/a/plain", "train/b/1.png", "train/stray.png"),
        *("train/a/more/1.png", "train/a/more/deep/2.JPEG", "train/a/more/notes.txt", "train/b/.hidden.png"),
        *("val/a/1.png", "val/b/1.png", "val/b/2.gif"),
    )
    (tmp_path / "train/b/2.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train/c").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train/b/3.png").symlink_to(tmp_path / "train/a/1.png")
    train = scan_split(tmp_path, "train")
    assert [path[len(str(tmp_path)) :] for path in train.paths] == [
        "/train/a/1.png",
        "/train/b/1.png",
        "/train/b/3.png",
    ]
    assert train.passed_over == {
        ".gif files": 2,
        "files without an ending": 1,
        "images in nested folders": 2,
        "dangling links": 2,
        "images outside class folders": 1,
    }
    assert remarks(train, scan_split(tmp_path, "val", train.classes)) == [
        f"'{tmp_path}/train': passed over 2 .gif files, 2 dangling links, 1 files without an ending, "
        "2 images in nested folders, 1 images outside class folders",
        f"'{tmp_path}/val': passed over 1 .gif files",
    ]


def test_classes_that_are_not_evaluated_are_counted(tmp_path: Path) -> None:
    write(tmp_path, *(f"train/n{i:03}/1.png" for i in range(300)), "val/n007/1.png", "val/n123/1.png")
    train = scan_split(tmp_path, "train")
    [line] = remarks(train, scan_split(tmp_path, "val", train.classes))
    assert line.startswith(f"'{tmp_path}/val' has no images of 298 of 300 classes, which are not evaluated: 'n000', ")
    assert line.endswith("and 293 more")
    assert remarks(train, train) == []


def test_links_and_odd_names(tmp_path: Path) -> None:
    write(tmp_path, "store/x y.png", "train/a/é 猫.png")
    (tmp_path / "train/b").symlink_to(tmp_path / "store")
    found = scan_split(tmp_path, "train")
    assert [Path(path).name for path in found.paths] == ["é 猫.png", "x y.png"]


def test_val_uses_the_labels_of_train(tmp_path: Path) -> None:
    write(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/2.png", "val/a/2.png")
    train = scan_split(tmp_path, "train")
    val = scan_split(tmp_path, "val", train.classes)  # no b: may be
    assert val.classes == train.classes
    assert val.labels.tolist() == [0, 2]


def test_errors_say_what_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere' does not exist: pass the folder that holds train/"):
        scan_split(tmp_path / "nowhere", "train")
    write(tmp_path, "training/a/1.png", "flat/1.png", "gap/full/1.png", "gap/hollow/notes.txt", "new/full/1.png")
    write(tmp_path, "new/wolf/1.png")
    with pytest.raises(UserError, match=r"no val/ folder \(found: flat/, gap/, new/, training/\): arrange"):
        scan_split(tmp_path, "val")
    with pytest.raises(UserError, match=r"flat' has no class folders: put the images of each class"):
        scan_split(tmp_path, "flat")
    with pytest.raises(
        UserError, match=r"gap/hollow' holds no images \(but 1 .txt files\): add some .* or remove the folder"
    ):
        scan_split(tmp_path, "gap")
    with pytest.raises(UserError, match=r"new' has 1 class folder.*'wolf'. Remove or rename"):
        scan_split(tmp_path, "new", ("full",))


def test_many_unknown_classes_are_counted(tmp_path: Path) -> None:
    write(tmp_path, *(f"val/n{i:03}/1.png" for i in range(300)))
    with pytest.raises(UserError, match=r"has 300 class folder.*'n000', .*'n004' and 295 more\."):
        scan_split(tmp_path, "val", ("cat",))

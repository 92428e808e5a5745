"""An index says what a scan would, for as long as it would, and is made anew when a folder has changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lesam_dist.data import ImageFolder
from lesam_dist.data import opening as opening_module
from lesam_dist.data.index import NAME, Split, find_index, index_files, open_index, scan_both
from lesam_dist.data.index_command import index
from lesam_dist.data.opening import open_splits
from lesam_dist.errors import UserError


@pytest.fixture
def root(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names with spaces, accents and bytes that are no UTF-8; files of random lengths."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, count in (("train", 50), ("val", 9)):
        for i in range(count):
            folder = tmp_path / "data" / split / f"class {i % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            name = os.fsencode(f"é {i}") + (b"\xff" if i == 7 else b"") + b".jpeg"
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(bytes(int(rng.integers(1, 99))))
    (tmp_path / "data/train/class 1/notes.txt").touch()
    return tmp_path / "data"


def facts(split: ImageFolder) -> dict[str, Any]:
    return {
        "paths": tuple(split.paths),
        "labels": split.labels.tolist(),
        "classes": split.classes,
        "digest": split.digest,
        "passed_over": dict(split.passed_over),
        "root": split.root,
    }


def same(a: Split, b: Split) -> bool:
    return all(facts(x) == facts(y) for x, y in zip(a, b, strict=True))


def test_it_says_what_a_scan_says(root: Path, rng: np.random.Generator) -> None:
    assert index([str(root)]) == 0
    listing = find_index(root)
    assert listing is not None
    indexed, scanned = open_index(root, listing), scan_both(root)
    assert same(indexed, scanned)
    train = indexed[0]
    i = int(rng.integers(50))
    assert train.paths[i] == scanned[0].paths[i] == train.paths[i - 50]
    assert train.paths[3:40:7] == scanned[0].paths[3:40:7]
    with pytest.raises(IndexError):
        train.paths[50]
    sizes = listing.arrays["train.sizes"].tolist()
    assert sizes == [os.path.getsize(path) for path in scanned[0].paths]
    moved = root.rename(root.parent / "moved")  # with its times
    assert (again := find_index(moved)) is not None
    assert same(open_index(moved, again), scan_both(moved))


def test_a_skip_list_leaves_the_same_out(root: Path) -> None:
    index([str(root)])
    skip = ["train/class 1/é 1.jpeg", "train/class 1/é 5.jpeg", "val/class 0/é 0.jpeg", "train/gone.jpeg"]
    for name, scanned, indexed in zip(("train", "val"), scan_both(root), open_splits(root, first=True), strict=True):
        assert facts(indexed.without(skip, name)) == facts(scanned.without(skip, name))
        assert indexed.without(skip, name).skipped == len([path for path in skip[:3] if path.startswith(name)])
        again = indexed.without(skip[:1], name).without(skip[1:], name)
        assert facts(again) == facts(scanned.without(skip, name))


def _add(root: Path) -> None:
    (root / "val/class 2/new.png").touch()


def _remove(root: Path) -> None:
    (root / "train/class 0/é 0.jpeg").unlink()


def _rename(root: Path) -> None:
    (root / "train/class 3/é 3.jpeg").rename(root / "train/class 3/é 03.jpeg")


def _new_class(root: Path) -> None:
    (root / "train/class 9").mkdir()
    (root / "train/class 9/1.png").touch()


def _flip_a_bit(root: Path) -> None:
    with open(root / NAME, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 4]))


def _cut_off(root: Path) -> None:
    os.truncate(root / NAME, 100)


@pytest.mark.parametrize("change", [_add, _remove, _rename, _new_class, _flip_a_bit, _cut_off])
def test_it_does_not_outlive_a_change(
    root: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run lists the folders then; of a large data set it makes the index anew, which the other processes open."""
    index([str(root)])
    assert find_index(root) is not None
    change(root)
    assert find_index(root) is None
    assert same(open_splits(root, first=True), scan_both(root))
    monkeypatch.setattr(opening_module, "LARGE", 50)
    capsys.readouterr()
    assert same(open_splits(root, first=True), scan_both(root))
    assert f"listed '{root}' into {root / NAME}" in capsys.readouterr().out
    monkeypatch.setattr(opening_module, "scan_both", None)  # nobody lists them again
    assert same(open_splits(root, first=False), scan_both(root))
    assert same(open_splits(root, first=True), scan_both(root))


def test_small_data_sets_get_none(root: Path) -> None:
    open_splits(root, first=True)
    assert not any(file.exists() for file in index_files(root))


def test_where_the_folder_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the user's cache; where that cannot be written either, the command says so and a run goes on."""
    if os.geteuid() == 0:  # who may write anywhere
        blocked = root / NAME
        blocked.mkdir()
        monkeypatch.setattr("lesam_dist.data.listing.Path.replace", _refuse(Path.replace, blocked))
    else:
        root.chmod(0o555)
    cached = index_files(root)[1]
    assert index([str(root)]) == 0
    assert cached.exists()
    assert same(open_splits(root, first=True), scan_both(root))
    cached.unlink()
    cached.parent.rmdir()
    cached.parent.write_text("in the way")
    with pytest.raises(UserError, match=rf"can be written neither to '{root / NAME}' nor '{cached}' .*XDG_CACHE_HOME"):
        index([str(root)])
    monkeypatch.setattr(opening_module, "LARGE", 0)
    assert same(open_splits(root, first=True), scan_both(root))
    root.chmod(0o755)


def _refuse(replace: Callable[..., Any], blocked: Path) -> Callable[..., Any]:
    def refusing(self: Path, target: Path) -> Any:
        if Path(target) == blocked:
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    return refusing


def test_verify_compares_sizes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index([str(root)])
    assert index([str(root), "--verify"]) == 0
    path = root / "val/class 1/é 5.jpeg"
    path.write_bytes(bytes(1234))  # which does not change its folder's time
    before = find_index(root)
    assert before is not None
    capsys.readouterr()
    assert index([str(root), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "val/class 1/é 5.jpeg: " in out
    assert "bytes, now 1234" in out
    _add(root)
    with pytest.raises(UserError, match=rf"has no index with sizes that holds.*`lesam-dist index {root}`"):
        index([str(root), "--verify"])


def test_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist: pass the folder that holds train/"):
        index([str(tmp_path / "gone")])
    with pytest.raises(UserError, match=r"unrecognized arguments: --sizes \(lesam-dist index --help\)"):
        index([str(tmp_path), "--sizes"])

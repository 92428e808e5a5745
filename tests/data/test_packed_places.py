"""Folders and addresses that a command cannot use, and packed data sets that are not whole: one line each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lesam_dist.data.index_command import index
from lesam_dist.data.listing import Listing, read_listing
from lesam_dist.data.opening import data_root, open_splits
from lesam_dist.data.packed import reading
from lesam_dist.data.packed.command import pack
from lesam_dist.data.scan import scan
from lesam_dist.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "data" / split / "a" / "0.png")
    return tmp_path / "data"


@pytest.fixture
def packed(root: Path) -> Path:
    pack([str(root), str(root.parent / "packed"), "--workers", "1"])
    return root.parent / "packed"


@pytest.mark.parametrize("command", [scan, index, lambda words: pack([*words, "x"])])
def test_what_reads_class_folders_refuses_others(packed: Path, command: Callable[[list[str]], int]) -> None:
    with pytest.raises(UserError, match=rf"'{packed}' is packed already: .* pack --verify"):
        command([str(packed)])
    with pytest.raises(UserError, match=r"'s3://b/x' is an address.*give a folder"):
        command(["s3://b/x"])
    with pytest.raises(UserError, match=r"^'a{60}\.\.\.' cannot be a folder: File name too long\.$"):
        command(["a" * 300])


def test_where_shards_cannot_go(root: Path, packed: Path) -> None:
    """Above all among the images, where the folder would be a class."""
    file = root.parent / "file"
    file.touch()
    for out, message in (
        (root / "train", r"in the images' own folder"),
        (root / "val" / "sub" / "x", r"in the images' own folder"),
        (root, r"is not empty"),
        (file, r"OUT is '.*file', a file: give a folder"),
        (packed, r"is not empty"),
        ("gs://b/x", r"is an address"),
        ("a" * 300, r"cannot be a folder: File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            pack([str(root), str(out), "--workers", "1"])
    with pytest.raises(UserError, match=r"is an address"):
        pack(["--verify", "https://host/x"])
    assert sorted(os.listdir(root)) == ["train", "val"]
    assert os.listdir(root / "val") == ["a"]


def test_a_packed_folder_without_what_it_needs(packed: Path) -> None:
    file = packed / "index.safetensors"
    listing = read_listing(file)
    facts: dict[str, Any] = {**listing.facts, "val": {}}
    Listing(facts, dict(listing.arrays)).write(file)
    with pytest.raises(UserError, match=r"is damaged: copy it again"):
        open_splits(packed, first=True)
    file.unlink()
    with pytest.raises(UserError, match=r"has shards but no index.safetensors: .* again to finish it"):
        open_splits(packed, first=True)


def test_an_index_that_this_node_cannot_keep(packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be kept in .* set XDG_CACHE_HOME to a folder that can be written"):
        open_splits(data_root(f"file://{packed}"), first=True)


def test_what_a_store_says_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> Any:
        raise RuntimeError("no\n  credentials\n")

    monkeypatch.setattr(reading, "file_system", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(RuntimeError: no credentials\): see that"):
        open_splits(data_root("s3://b/x"), first=True)

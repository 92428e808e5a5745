"""`lesam-dist scan` finds what the loaders refuse, survives what kills a decoder, and writes what the config takes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lesam_dist.data import scan_split
from lesam_dist.data.scan import scan
from lesam_dist.data.scan_file import Verdict
from lesam_dist.data.scan_pool import examine_all
from lesam_dist.data.skip_list import read_skip_list
from lesam_dist.errors import UserError


@pytest.fixture
def root(class_folder: Callable[..., Path], rng: np.random.Generator) -> Path:
    def some() -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))

    classes = {name: {f"{i}.JPEG": some() for i in range(6)} for name in "ab"}
    classes["b"]["cmyk.JPEG"] = some().convert("CMYK")
    return class_folder(train=classes, val={"a": {f"{i}.JPEG": some() for i in range(3)}})


def test_broken_files_are_listed_and_left_out(
    root: Path, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (root / "train/a/0.JPEG").read_bytes()
    (root / "train/a/0.JPEG").write_bytes(data[: len(data) // 2])
    (root / "train/b/1.JPEG").write_bytes(b"")
    (root / "val/a/2.JPEG").write_bytes(rng.bytes(500))
    shutil.copy(root / "train/b/0.JPEG", root / "val/a/copy.JPEG")
    shutil.copy(root / "train/b/2.JPEG", root / "train/b/again.png")
    out = tmp_path / "list.json"
    assert scan([str(root), "--out", str(out), "--workers", "2"]) == 1
    text = capsys.readouterr().out
    broken = {"train/a/0.JPEG", "train/b/1.JPEG", "val/a/2.JPEG"}
    assert read_skip_list(out) == broken
    assert all(f"broken: {path} (" in text for path in broken)
    assert "train/b/1.JPEG (zero bytes)" in text
    assert "the same image in both splits: train/b/0.JPEG = val/a/copy.JPEG" in text
    assert "odd but usable: 1 CMYK, 1 whose name and format differ, 1 copies of another in train" in text
    assert "decoded 18 of 18 images" in text
    # What changes is decoded again, and only that.
    (root / "train/a/0.JPEG").write_bytes(data)
    assert scan([str(root), "--out", str(out), "--workers", "1"]) == 1
    assert "decoded 1 of 18 images" in capsys.readouterr().out
    skip = read_skip_list(out)
    assert skip == broken - {"train/a/0.JPEG"}
    train, val = scan_split(root, "train", skip=skip), scan_split(root, "val", ("a", "b"), skip)
    assert (len(train), train.skipped, len(val), val.skipped) == (13, 1, 3, 1)
    assert train.digest != scan_split(root, "train").digest
    assert not [path for path in (*train.paths, *val.paths) if path.endswith(tuple(skip))]
    # Begun again after a crash: the last line is cut off.
    journal = out.with_name("list.json.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:9]) + lines[9][:10])
    assert scan([str(root), "--out", str(out), "--workers", "1"]) == 1
    kept = 8 - sum(b"train/a/0.JPEG" in line for line in lines[:9])  # which has changed since its line was written
    assert f"decoded {18 - kept} of 18 images" in capsys.readouterr().out
    assert read_skip_list(out) == skip


def test_nothing_is_broken(root: Path, tmp_path: Path) -> None:
    assert scan([str(root), "--out", str(tmp_path / "list.json"), "--workers", "1"]) == 0
    assert read_skip_list(tmp_path / "list.json") == frozenset()


def dies_of_some(pipe: Connection) -> None:
    pipe.send(None)
    while (path := pipe.recv()) is not None:
        if "deadly" in path:
            os.kill(os.getpid(), signal.SIGSEGV)
        once = Path(path + ".seen")
        if "once" in path and not once.exists():  # killed for another reason, such as the memory of all
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.send(Verdict(1, 1, "", path))


def dies_at_once(pipe: Connection) -> None:
    os._exit(3)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_that_kills_the_decoder(tmp_path: Path, rng: np.random.Generator, workers: int) -> None:
    """It alone is broken, however many there are; the others are all decoded, once."""
    names = [f"{i}{kind}" for i, kind in enumerate(["deadly"] * 3 + ["once"] * 2 + ["fine"] * 20)]
    paths = [str(tmp_path / name) for name in rng.permutation(names)]
    found = list(examine_all(paths, workers, dies_of_some))
    assert sorted(path for path, _ in found) == sorted(paths)
    broken = {path: verdict.reason for path, verdict in found if verdict.reason}
    assert broken == {path: "the decoder crashed (SIGSEGV)" for path in paths if "deadly" in path}


def test_processes_that_cannot_start() -> None:
    with pytest.raises(UserError, match=r"ended with status 3 before it read a file"):
        list(examine_all(["x"], 2, dies_at_once))


def test_lists_that_cannot_be_used(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    with pytest.raises(UserError, match=r"list.json' cannot be read \(No such file.*lesam-dist scan"):
        read_skip_list(file)
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "is no list of"),
        ('{"version": 1}', "is no list of"),
        ('{"version": 1, "skip": [{"path": 3}]}', "is no list of"),
        ('{"version": 2, "skip": []}', r"is of version 2, and this lesam-dist knows 1: update it"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_skip_list(file)
    every = [f"train/a/{i}.JPEG" for i in range(6)]
    with pytest.raises(UserError, match=r"leaves out all 6 images of the class 'a' in '.*train'"):
        scan_split(root, "train", skip=every)
    assert len(scan_split(root, "train", skip=[*every[1:], "train/c/gone.JPEG"])) == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: ROOT"),
        (["{root}", "--workers", "0"], "--workers is 0"),
        (["{root}/nowhere"], "does not exist"),
        (["{root}", "--out", "{root}"], "a folder: give a file"),
    ],
)
def test_bad_arguments(root: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scan([text.format(root=root) for text in argv])


def test_what_is_written(root: Path, tmp_path: Path) -> None:
    (root / "train/a/0.JPEG").write_bytes(b"")
    scan([str(root), "--out", str(tmp_path / "list.json"), "--workers", "1"])
    assert json.loads((tmp_path / "list.json").read_text()) == {
        "version": 1,
        "skip": [{"path": "train/a/0.JPEG", "reason": "zero bytes", "size": 0}],
        "in_both_splits": [],
    }

"""Packed shards give what the folder gives: the same batches to the bit, and WebDataset's members to others."""

from __future__ import annotations

import hashlib
import io
import itertools
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lesam_dist.data import ImageFolder, Loader, Transform, scan_split
from lesam_dist.data.bad_files import BadFiles
from lesam_dist.data.fork_server import interrupted_afterwards
from lesam_dist.data.opening import open_splits
from lesam_dist.data.packed import open_packed
from lesam_dist.data.packed.command import pack
from lesam_dist.data.plan import Plan
from lesam_dist.errors import UserError
from tests.data.conftest import smooth_image
from tests.data.spoilt import Said

Load = Callable[..., Loader]
PER_SHARD = 13  # of 40 training images: the last shard is short


@pytest.fixture
def root(tmp_path: Path, rng: np.random.Generator) -> Path:
    """40 training and 7 validation images of 3 classes, JPEGs and PNGs of many sizes."""
    for split, count in (("train", 40), ("val", 7)):
        for i in range(count):
            folder = tmp_path / "data" / split / f"class {i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(20, 90, 2)
            smooth_image(rng, int(height), int(width)).save(folder / f"{i:03}.{'JPEG' if i % 4 else 'png'}")
    return tmp_path / "data"


@pytest.fixture
def packed(root: Path) -> Path:
    return packed_into(root, root.parent / "packed")


def packed_into(root: Path, out: Path, *options: str) -> Path:
    words = [str(root), str(out), "--images_per_shard", str(PER_SHARD), "--workers", "1"]
    assert pack([*words, *options]) == 0
    return out


def read(loader: Loader, epoch: int = 0, start: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader.epoch(epoch, start), strict=True)
    return torch.cat(images), torch.cat(labels)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def listing(split: ImageFolder) -> list[tuple[str, int]]:
    return list(zip(split.paths, split.labels.tolist(), strict=True))


def folder_of(root: Path) -> tuple[ImageFolder, ImageFolder]:
    train = scan_split(root, "train")
    return train, scan_split(root, "val", train.classes)


# ----------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("world", [1, 3])
def test_the_batches_are_those_of_the_folder(
    root: Path, packed: Path, backend: str, load: Load, rng: np.random.Generator, world: int
) -> None:
    """To the bit: training from the middle of any epoch, and evaluation. A run may go on with the other."""
    start, epoch = int(rng.integers(0, 3)), int(rng.integers(0, 9))
    for train, batch_size in ((True, 12), (False, 3)):
        theirs, ours = (splits[not train] for splits in (folder_of(root), open_packed(packed)))
        for rank in range(world):
            options = {"train": train, "batch_size": batch_size, "rank": rank, "world_size": world}
            a, b = load(theirs, backend, **options), load(ours, backend, **options)
            if len(a) > (start if train else 0):
                assert same(read(a, epoch, start * train), read(b, epoch, start * train))
                assert same(read(a, epoch + 1), read(b, epoch + 1))
            b.load_state_dict(a.state_dict())


def test_resized_images_keep_their_shape_and_content(root: Path, rng: np.random.Generator) -> None:
    """The short side, where it is longer, and what a resize of the original shows; the rest byte for byte."""
    out = packed_into(root, root.parent / "small", "--resize", "32", "--quality", "95")
    train, _ = open_packed(out)
    assert train.shards is not None
    assert train.digest not in (scan_split(root, "train").digest, "")
    resized = 0
    for i, path in enumerate(train.paths):
        original = (root / path[len(str(out)) + 1 :]).read_bytes()
        part = train.shards.part(i)
        with open(part.shard, "rb") as file:
            file.seek(part.start)
            data = file.read(part.size)
        before, after = (Image.open(io.BytesIO(each)).convert("RGB") for each in (original, data))
        if min(before.size) <= 32:
            assert data == original
            continue
        resized += 1
        assert min(after.size) == 32
        assert abs(after.width / after.height - before.width / before.height) < 0.05
        smaller = before.resize(after.size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=95, subsampling="4:2:0")
        lost, lost_by_pillow = (
            np.abs(np.asarray(image, float) - np.asarray(smaller, float)).mean()
            for image in (after, Image.open(buffer))
        )
        assert lost < 1.25 * lost_by_pillow + 0.5  # the same tables, another encoder
    assert resized > 5  # 26 on average


def test_any_tar_reads_them_as_webdataset_has_it(root: Path, packed: Path) -> None:
    """Members that share a key are one sample: its file, byte for byte, and its class."""
    train = scan_split(root, "train")
    seen: Counter[int] = Counter()
    for number, expected in enumerate((13, 13, 13, 1)):
        with tarfile.open(packed / f"train-{number:06d}.tar") as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        names = list(members)
        assert len(names) == 2 * expected
        for image, label in zip(names[::2], names[1::2], strict=True):
            key = int(image.split(".")[0])
            assert label == f"{key:08d}.cls"
            assert members[image] == Path(train.paths[key]).read_bytes()
            assert int(members[label]) == train.labels[key]
            seen[key] += 1
    assert seen == Counter(range(40))
    assert (packed / "classes.txt").read_text().splitlines() == list(train.classes)


def test_a_shard_holds_a_mixture_of_classes(root: Path, packed: Path) -> None:
    """For those who read from front to back; the folder's order has one class after the other."""
    train, val = open_packed(packed)
    assert train.shards is not None
    assert val.shards is not None
    for number in range(3):
        assert len(set(train.labels[train.shards.shard == number].tolist())) > 1
    assert val.shards.part(0).start < val.shards.part(1).start


# ------------------------------------------------------------------------------------------- how it is written


def test_packing_is_deterministic_and_goes_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a call that failed halfway, what is done stays, and the end is the same to the byte."""
    whole, halfway = root.parent / "whole", root.parent / "halfway"
    packed_into(root, whole, "--resize", "24")
    with tarfile.open(whole / "train-000001.tar") as tar:
        key = int(tar.getnames()[0].split(".")[0])
    broken = Path(scan_split(root, "train").paths[key])
    data = broken.read_bytes()
    broken.write_bytes(data[:200])
    with pytest.raises(UserError, match=rf"cannot decode the image '{broken}' of 200 bytes .* --skip_list"):
        packed_into(root, halfway, "--resize", "24")
    assert (halfway / "train-000000.tar").exists()
    assert not (halfway / "train-000001.tar").exists()
    with pytest.raises(UserError, match=r"has no index.safetensors: give a folder that `lesam-dist pack` has finished"):
        pack([str(halfway), "--verify"])
    with pytest.raises(UserError, match=r"holds shards of other images or settings"):
        packed_into(root, halfway, "--resize", "25")
    broken.write_bytes(data)
    (halfway / ".train-000001.tar.partial").write_bytes(b"cut off")
    capsys.readouterr()
    packed_into(root, halfway, "--resize", "24")
    assert "wrote 4 of them" in capsys.readouterr().out  # of 5
    assert contents(halfway) == contents(whole)
    with pytest.raises(UserError, match=r"is not empty: choose a new folder"):
        packed_into(root, halfway, "--resize", "24")


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_a_skip_list_leaves_images_out(root: Path, tmp_path: Path, packed: Path) -> None:
    """In packing, and in training on what was packed with them: both are the same data."""
    skip = [f"train/class {i % 3}/{i:03}.{'JPEG' if i % 4 else 'png'}" for i in (0, 5, 39)]
    entries = ", ".join(f'{{"path": "{path}"}}' for path in skip)
    (tmp_path / "skip.json").write_text(f'{{"version": 1, "skip": [{entries}]}}')
    out = packed_into(root, tmp_path / "less", "--skip_list", str(tmp_path / "skip.json"))
    packed_without, _ = open_packed(out)
    trained_without = open_packed(packed)[0].without(skip, "train")
    assert trained_without.skipped == 3
    assert packed_without.digest == trained_without.digest == folder_of(root)[0].without(skip, "train").digest
    assert len(packed_without) == len(trained_without) == 37
    assert trained_without.shards is not None
    for i, path in enumerate(trained_without.paths):
        part = trained_without.shards.part(i)
        original = root / path[len(str(packed)) + 1 :]
        assert Path(part.shard).read_bytes()[part.start : part.start + part.size] == original.read_bytes()


# ------------------------------------------------------------------------------------------ the sequential order


def test_the_sequential_order(packed: Path, seed: int, rng: np.random.Generator) -> None:
    """Each epoch is a permutation; a window holds one stretch of the shards; other epochs and seeds differ."""
    train, _ = open_packed(packed)
    shards = train.shards
    assert shards is not None
    window = int(rng.integers(2, 20))
    order = shards.sequential_order(seed=seed, epoch=3, window=window)
    assert sorted(order.tolist()) == list(range(40))
    assert np.array_equal(order, shards.sequential_order(seed=seed, epoch=3, window=window))
    assert not np.array_equal(order, shards.sequential_order(seed=seed, epoch=4, window=window))
    visits = [number for number, _ in itertools.groupby(shards.shard[order].tolist())]
    # With a window of one image, a shard is left for good; wider ones mix neighbours alone.
    alone = shards.sequential_order(seed=seed, epoch=3, window=1)
    assert len([number for number, _ in itertools.groupby(shards.shard[alone].tolist())]) == 4
    for number in range(4):
        starts = shards.start[alone[shards.shard[alone] == number]]
        assert (np.diff(starts) > 0).all()
    for begin in range(0, 40, window):
        assert sorted(order[begin : begin + window]) == sorted(alone[begin : begin + window])
    assert len(visits) >= 4


def test_sequential_batches_do_not_depend_on_the_number_of_processes(
    packed: Path, backend: str, load: Load, rng: np.random.Generator
) -> None:
    """And go on from any batch; a window is a part of what must stay the same."""
    train, _ = open_packed(packed)
    start = int(rng.integers(0, 3))
    whole = read(load(train, backend, batch_size=12, window=9), 1, start)
    halves = [load(train, backend, batch_size=12, window=9, rank=rank, world_size=2) for rank in (0, 1)]
    batches = zip(*(half.epoch(1, start) for half in halves), strict=True)
    images, labels = zip(*((torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in batches), strict=True)
    assert same(whole, (torch.cat(images), torch.cat(labels)))
    with pytest.raises(UserError, match=r"data.shuffle_window was 9 in the checkpoint and is 8 now"):
        load(train, backend, batch_size=12, window=8).load_state_dict(halves[0].state_dict())


# ----------------------------------------------------------------------------------------------------- damage


def test_what_is_wrong_with_shards_is_said_before_training(root: Path, packed: Path) -> None:
    shard = packed / "train-000002.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(
        UserError, match=rf"'{shard}' has {len(data) - 1} bytes, but the index says {len(data)}: it is cut"
    ):
        open_splits(packed, first=True)
    shard.unlink()
    with pytest.raises(UserError, match=rf"'{shard}' is missing: copy it from where it was packed, or pack again"):
        open_splits(packed, first=True)
    shard.write_bytes(data)
    index = packed / "index.safetensors"
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"'{index}': it is cut off, or no file of lesam-dist .* pack again"):
        open_splits(packed, first=True)
    index.write_bytes(whole[:-3] + bytes(255 - byte for byte in whole[-3:]))
    with pytest.raises(UserError, match=rf"'{index}' is damaged: copy it again"):
        open_splits(packed, first=True)
    index.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(UserError, match=r"it is of format 9, and this lesam-dist knows 1"):
        open_splits(packed, first=True)


def test_verify_names_the_images_that_changed(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(["--verify", str(packed)]) == 0
    assert "0 of 5 shards" in capsys.readouterr().out
    train, _ = open_packed(packed)
    assert train.shards is not None
    part = train.shards.part(17)
    with open(part.shard, "r+b") as file:
        file.seek(part.start + part.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert pack(["--verify", str(packed)]) == 1
    out = capsys.readouterr().out
    assert f"damaged: {part.shard}: {train.paths[17][len(str(packed)) + 1 :]}\n" in out
    assert "1 of 5 shards" in out


def test_a_damaged_image_in_a_shard_is_replaced(root: Path, packed: Path, backend: str, load: Load, seed: int) -> None:
    """As a file would be: the same sample in its place, named, and counted."""
    train, folder = open_packed(packed)[0], scan_split(root, "train")
    assert train.shards is not None
    part = train.shards.part(11)
    with open(part.shard, "r+b") as file:
        file.seek(part.start)
        file.write(bytes(part.size))
    Path(folder.paths[11]).write_bytes(bytes(part.size))
    read_all = []
    for split in (train, folder):
        said = Said()
        bad = BadFiles(root.parent / f"bad{len(read_all)}", split.root, rank=0, world_size=1, limit=1, say=said)
        read_all.append(read(load(split, backend, batch_size=20, bad_files=bad)))
        assert bad.count == 1
        assert train.paths[11] in bad if split is train else folder.paths[11] in bad
    assert same(*read_all)


def test_bad_arguments(root: Path, packed: Path) -> None:
    out = str(root.parent / "x")
    for words, message in (
        ([str(root)], r"OUT is missing"),
        ([str(root), out, "--workers", "0"], r"--workers is 0: it must be at least 1"),
        ([str(root), out, "--quality", "50"], r"--quality is 50 but nothing is resized"),
        ([str(root), out, "--resize", "8"], r"--resize is 8: it must be at least 16"),
        ([str(root), out, "--resize", "big"], r"argument --resize: invalid int value: 'big'"),
        ([str(packed), out], r"is packed already: give the folder"),
        ([str(root), out, "--verify"], r"--verify writes nothing"),
        ([str(root.parent / "gone"), out], r"does not exist: pass the folder that holds train/"),
    ):
        with pytest.raises(UserError, match=message):
            pack(words)


def test_the_plan_names_parts(packed: Path, seed: int) -> None:
    train, _ = open_packed(packed)
    assert train.shards is not None
    for batch in Plan(train, True, 10, seed, 0, 2, Transform()).epoch(0):
        assert batch.parts is not None
        index = {path: i for i, path in enumerate(train.paths)}
        assert batch.parts == [train.shards.part(index[path]) for path in batch.paths]
        assert batch.take([2, 0]).parts == [batch.parts[2], batch.parts[0]]


def test_an_interrupt_waits_until_the_workers_have_started() -> None:
    handler, started = signal.getsignal(signal.SIGINT), []

    def start() -> None:
        with interrupted_afterwards():
            signal.raise_signal(signal.SIGINT)
            started.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert started
    assert signal.getsignal(signal.SIGINT) is handler

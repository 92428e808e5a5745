"""Training images that cannot be decoded: named once, replaced by what place and seed say, whoever meets them and when.

The oracle is a copy of the data in which each broken file *is* its replacement, read without any of this.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lesam_dist.data import ImageFolder, Loader, decode, epoch_order, scan_split
from lesam_dist.data.bad_files import BadFiles
from lesam_dist.data.order import replacements
from lesam_dist.errors import UserError

Load = Callable[..., Loader]
Batches = list[tuple[Tensor, Tensor]]

N, BATCH = 62, 12  # so that an epoch leaves two images out
KINDS = ("truncated", "cut late", "garbage", "header", "empty", "text", "truncated PNG", "folder", "dangling")


def write_images(root: Path, rng: np.random.Generator) -> ImageFolder:
    """Noise of 60 x 70 pixels, whose crops are as good as their names: no two are alike."""
    for i in range(N):
        path = root / "train" / "abc"[i % 3] / f"{i:02}.{'png' if i % 4 == 0 else 'JPEG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)).save(path)
    return scan_split(root, "train")


def spoil(path: Path, kind: str, rng: np.random.Generator) -> None:
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(
            {
                "truncated": data[: len(data) * 2 // 3],
                "cut late": data[: len(data) * 9 // 10],
                "garbage": rng.bytes(3000),
                "header": data[:640],
                "empty": b"",
                "text": b"404: not found\n" * 9,
                "truncated PNG": data[: len(data) // 2],
            }[kind]
        )


def spoil_some(folder: ImageFolder, rng: np.random.Generator, kinds: tuple[str, ...] = KINDS) -> list[int]:
    """One file of each kind, at random places."""
    jpegs, pngs = ([i for i, path in enumerate(folder.paths) if path.endswith(end)] for end in ("JPEG", "png"))
    chosen = {int(i) for i in rng.choice(jpegs, len(kinds), replace=False)}
    bad = []
    for kind, i in zip(kinds, sorted(chosen), strict=True):
        sample = int(rng.choice(pngs)) if kind == "truncated PNG" else i
        spoil(Path(folder.paths[sample]), kind, rng)
        bad.append(sample)
    return bad


def expected(folder: ImageFolder, clean: Path, bad: list[int], load: Load, seed: int, epoch: int) -> Batches:
    """The epoch's batches, read from ``clean``, a copy made before anything was spoilt."""
    stage = clean.with_name(f"stage{epoch}")
    shutil.copytree(clean, stage)
    order = epoch_order(N, seed=seed, epoch=epoch, shuffle=True)
    labels = folder.labels[order]
    for position, sample in enumerate(order):
        if sample in bad:
            new = next(j for j in replacements(N, position, seed=seed, epoch=epoch) if j not in bad)
            places = [
                Path(str(at) + folder.paths[j][len(str(folder.root)) :]) for at, j in ((clean, new), (stage, sample))
            ]
            shutil.copyfile(*places)
            labels[position] = folder.labels[new]
    images = [images for images, _ in load(scan_split(stage, "train")).epoch(epoch)]
    return [(part, torch.from_numpy(labels[i * BATCH : (i + 1) * BATCH])) for i, part in enumerate(images)]


def read(loader: Loader, epochs: int) -> Batches:
    return [*itertools.chain(*map(loader.epoch, range(epochs)))]


def same(a: Batches, b: Batches) -> bool:
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True))


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> ImageFolder:
    """Images to spoil; a copy of them lies beside, in clean/."""
    folder = write_images(tmp_path / "data", rng)
    shutil.copytree(tmp_path / "data", tmp_path / "clean")
    return folder


class Said(list[str]):
    """What was printed."""

    def __call__(self, line: str) -> None:
        self.append(line)


Make = Callable[..., tuple[Loader, BadFiles, Said]]


@pytest.fixture
def make(load: Load, tmp_path: Path, folder: ImageFolder, backend: str) -> Make:
    """A loader with a journal, what it knows, and what it says."""

    def build(rank: int = 0, world_size: int = 1, limit: int = 100, run: str = "run", **options: Any) -> Any:
        said = Said()
        bad = BadFiles(
            tmp_path / run / "bad_files", folder.root, rank=rank, world_size=world_size, limit=limit, say=said
        )
        options = {"batch_size": BATCH, "rank": rank, "world_size": world_size, **options}
        return load(folder, backend, bad_files=bad, **options), bad, said

    return build


def plain(load: Load, backend: str) -> Load:
    return lambda folder: load(folder, backend, batch_size=BATCH)


# ------------------------------------------------------------------------------------------- what is read instead


@pytest.mark.parametrize("workers", [0, 2])
def test_all_kinds(
    folder: ImageFolder, make: Make, load: Load, backend: str, rng: np.random.Generator, seed: int, tmp_path: Path,
    workers: int,
) -> None:  # fmt: skip
    """Two epochs, bit for bit; each file is named once, with its reason, and is in the journal."""
    bad = spoil_some(folder, rng)
    loader, known, said = make(workers=workers)
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        assert [len(labels) for _, labels in batches] == [BATCH] * (N // BATCH)
        assert same(batches, expected(folder, tmp_path / "clean", bad, plain(load, backend), seed, epoch))
    met = {folder.paths[i] for i in bad if folder.paths[i] in known}
    seen = {int(i) for e in (0, 1) for i in epoch_order(N, seed=seed, epoch=e, shuffle=True)[: N // BATCH * BATCH]}
    assert met >= {folder.paths[i] for i in bad if i in seen}
    assert known.count == known.own == len(met) == len(said)
    for path in met:
        [line] = [line for line in said if f"'{path}'" in line]
        assert line.startswith("warning: rank 0 cannot ")
        assert "(" in line
    written = (tmp_path / "run/bad_files/rank_0.jsonl").read_text().splitlines()
    assert {str(folder.root / json.loads(line)["path"]) for line in written} == met
    assert len(written) == len(met)
    loader.close()


def test_known_files_are_not_opened_and_change_nothing(
    folder: ImageFolder, make: Make, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run that knows them all, of which they are healthy again, reads the same bits and says nothing."""
    healthy = {path: Path(path).read_bytes() for path in folder.paths}
    spoil_some(folder, rng)
    loader, first, _ = make()
    batches = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    knowing, known, said = make()
    known.refresh()
    assert known.count == first.count
    for path in folder.paths:
        if path in known:
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
            Path(path).write_bytes(healthy[path])
    assert all(same(list(knowing.epoch(epoch)), batches[epoch]) for epoch in (0, 1))
    assert said == []


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_with_one_process(folder: ImageFolder, make: Make, rng: np.random.Generator, world: int) -> None:
    """Each meets its own; together they read what one process reads. A file is counted once or, met by two, twice."""
    spoil_some(folder, rng)
    loader, alone, _ = make(run="alone")
    whole = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    made = [make(rank=rank, world_size=world) for rank in range(world)]
    for epoch in (0, 1):
        parts = zip(*(each.epoch(epoch) for each, _, _ in made), strict=True)
        joined = [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]
        assert same(joined, whole[epoch])  # type: ignore[arg-type]
    for _, known, _ in made:
        known.refresh()
        assert known.count == alone.count
    assert sum(known.own for _, known, _ in made) >= alone.count
    shrunk = make(rank=0, world_size=1)[1]
    shrunk.refresh()
    assert shrunk.count == shrunk.own == alone.count


def test_a_restart_in_the_middle_goes_on(folder: ImageFolder, make: Make, rng: np.random.Generator) -> None:
    spoil_some(folder, rng)
    loader, _, before = make()
    whole = list(loader.epoch(0))
    start = int(rng.integers(1, len(whole)))
    again, _, said = make()
    assert same(list(again.epoch(0, start)), whole[start:])
    assert not said
    fresh, _, said = make(run="fresh")
    assert same(list(fresh.epoch(0, start)), whole[start:])
    assert len(said) <= len(before)


def test_most_files_are_bad(
    folder: ImageFolder, make: Make, load: Load, backend: str, rng: np.random.Generator, seed: int, tmp_path: Path
) -> None:
    """Replacements that are bad themselves; batches of which nothing is left."""
    bad = [int(i) for i in rng.choice(N, 55, replace=False)]
    for i in bad:
        Path(folder.paths[i]).write_bytes(b"")
    loader, known, _ = make()
    assert same(list(loader.epoch(0)), expected(folder, tmp_path / "clean", bad, plain(load, backend), seed, 0))
    for path in folder.paths:
        Path(path).write_bytes(b"")
    with pytest.raises(UserError, match=r"no training image in '.*data' can be decoded"):
        list(loader.epoch(1))
    assert known.count == N


def test_backends_read_the_same_samples(
    folder: ImageFolder, load: Load, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Labels, and images but for the rounding of their decoders: noise of another file differs by 80 grey levels."""
    pytest.importorskip("nvidia.dali")
    spoil_some(folder, rng)
    both: list[Batches] = []
    for backend in ("dali", "torchvision"):
        bad = BadFiles(tmp_path / backend, folder.root, rank=0, world_size=1, limit=100, say=Said())
        both.append(
            [*itertools.chain(*(load(folder, backend, batch_size=BATCH, bad_files=bad).epoch(e) for e in (0, 1)))]
        )
    for (images, labels), (others, other_labels) in zip(*both, strict=True):
        assert torch.equal(labels, other_labels)
        difference = (images - others).abs().mean(dim=(1, 2, 3))
        assert difference.max() < 0.1, "of a standard deviation of 1.3"


def test_flipped_bits_in_the_pixels_are_no_failure(folder: ImageFolder, make: Make, rng: np.random.Generator) -> None:
    """What both decoders take, with a warning or without, is a sample as any other."""
    path = next(path for path in folder.paths if path.endswith("JPEG"))
    whole = Path(path).read_bytes()
    for _ in range(100):  # a bit may also make a marker, which Pillow refuses
        data = bytearray(whole)
        data[int(rng.integers(len(data) // 2, len(data) - 100))] ^= 1 << int(rng.integers(8))
        Path(path).write_bytes(data)
        try:
            Image.open(path).load()
            break
        except (OSError, UnidentifiedImageError):
            pass
    loader, known, said = make()
    for epoch in (0, 1):
        list(loader.epoch(epoch))
    assert known.count == 0
    assert said == []


def test_what_follows_a_jpeg_is_no_failure(folder: ImageFolder, make: Make, load: Load, backend: str) -> None:
    """Cameras append something; such a file is looked at once, and is the sample that it is."""
    unspoilt = list(plain(load, backend)(folder).epoch(0))
    for path in folder.paths:
        if path.endswith("JPEG"):
            with open(path, "ab") as file:
                file.write(bytes(64))
    loader, known, _ = make()
    assert same(list(loader.epoch(0)), unspoilt)
    assert known.count == 0


def test_replacements_are_uniform_and_belong_to_a_place(seed: int) -> None:
    n, places = 50, 4000
    drawn = np.array([list(itertools.islice(replacements(n, p, seed=seed, epoch=3), 3)) for p in range(places)])
    assert drawn.min() == 0
    assert drawn.max() == n - 1
    counts = np.bincount(drawn.ravel(), minlength=n)
    assert np.abs(counts - 3 * places / n).max() < 6 * (3 * places / n) ** 0.5  # 6 standard deviations
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 6 / places**0.5
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 6 / places**0.5
    for other in ({"seed": seed + 1, "epoch": 3}, {"seed": seed, "epoch": 4}):
        others = np.array([next(replacements(n, p, **other)) for p in range(places)])
        assert abs(np.corrcoef(others, drawn[:, 0])[0, 1]) < 6 / places**0.5
    assert next(replacements(n, 7, seed=seed, epoch=3)) == drawn[7, 0]


# ---------------------------------------------------------------------------------------------------- how many


def test_too_many(folder: ImageFolder, make: Make, rng: np.random.Generator) -> None:
    """Up to the limit all are replaced; one more stops the run, and a restart with the same limit too."""
    bad = spoil_some(folder, rng, ("empty", "garbage", "text"))
    loader, known, _ = make(limit=3, run="enough")
    for epoch in range(4):
        list(loader.epoch(epoch))
    assert known.count == 3
    loader, known, _ = make(limit=2)
    message = (
        r"^3 training images cannot be decoded, more than data.max_bad_files 2: '.*Find them all with `lesam-dist scan "
        rf"{folder.root}`.* raise data.max_bad_files\.$"
    )
    with pytest.raises(UserError, match=message) as caught:
        read(loader, 4)
    assert all(folder.paths[i] in str(caught.value) for i in bad)
    with pytest.raises(UserError, match=message):
        next(make(limit=2)[0].epoch(0))
    resumed, known, said = make(limit=3)
    for epoch in range(4):
        list(resumed.epoch(epoch))
    assert known.count == 3
    assert said == []


def test_none_may_be_bad(folder: ImageFolder, make: Make, rng: np.random.Generator, tmp_path: Path) -> None:
    [bad] = spoil_some(folder, rng, ("text",))
    loader, _, _ = make(limit=0)
    with pytest.raises(
        UserError, match=r"^cannot decode the image '(.*)' of 135 bytes \(.*lesam-dist scan.*skip_list"
    ) as caught:
        read(loader, 9)
    assert folder.paths[bad] in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_file_system_that_is_gone(folder: ImageFolder, make: Make, tmp_path: Path) -> None:
    """Nothing is journalled then: the files may be fine."""
    loader, known, said = make(limit=1)
    next(loader.epoch(0))
    folder.root.rename(tmp_path / "elsewhere")
    message = (
        rf"^{BATCH} of the {BATCH} images of a batch cannot be read, e.g. '.*' \(No such file or directory\): it is "
    )
    with pytest.raises(UserError, match=message + rf"hardly the files.*data.root '{folder.root}' is still mounted"):
        list(loader.epoch(1))
    assert known.count == 0
    assert said == []
    (tmp_path / "elsewhere").rename(folder.root)
    assert len(list(loader.epoch(1))) == N // BATCH


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(folder: ImageFolder, make: Make) -> None:
    for path in folder.paths[:3]:
        os.chmod(path, 0)
    loader, known, said = make()
    for epoch in range(3):
        list(loader.epoch(epoch))
    assert known.count == 3
    assert all("Permission denied" in line for line in said)


def test_errors_that_pass_are_waited_for(
    folder: ImageFolder, make: Make, load: Load, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale handle that is fresh again at the third try is no bad file."""
    whole = list(plain(load, backend)(folder).epoch(0))
    path, aside = Path(folder.paths[5]), Path(folder.paths[5] + ".aside")
    path.rename(aside)
    tries: list[str] = []

    def flaky(name: str) -> bytes:
        if name == str(path) and not path.exists():
            tries.append(name)
            if len(tries) == 3:
                aside.rename(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        return plainly(name)

    plainly = decode._read
    monkeypatch.setattr(decode, "_read", flaky)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    loader, known, _ = make()
    epochs = itertools.takewhile(lambda _: not tries, range(1, 20))
    for epoch in epochs:  # the file may be one of the two that an epoch leaves out
        list(loader.epoch(epoch))
    assert len(tries) == 3
    assert known.count == 0
    assert same(list(loader.epoch(0)), whole)


def test_errors_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def fail(name: str) -> bytes:
        raise OSError(error, os.strerror(error), name)

    monkeypatch.setattr(decode, "_read", fail)
    monkeypatch.setattr("time.sleep", pauses.append)
    for error, tries in ((errno.EIO, 3), (errno.ETIMEDOUT, 3), (errno.ENOENT, 0), (errno.EACCES, 0)):
        pauses.clear()
        with pytest.raises(OSError, match=os.strerror(error)):
            decode.read_file("name")
        assert len(pauses) == tries
        assert sum(pauses) < 2


# -------------------------------------------------------------------------------------------------- the journal


def test_lines_that_a_crash_cut_off(folder: ImageFolder, make: Make, rng: np.random.Generator, tmp_path: Path) -> None:
    """At any byte: what was whole is known, what was not is met again, and lines after it are read."""
    spoil_some(folder, rng)
    loader, first, _ = make()
    for epoch in range(3):
        list(loader.epoch(epoch))
    journal = tmp_path / "run/bad_files/rank_0.jsonl"
    whole = journal.read_bytes()
    cut = int(rng.integers(1, len(whole)))
    journal.write_bytes(whole[:cut])
    loader, second, said = make()
    for epoch in range(3):
        list(loader.epoch(epoch))
    assert second.count == first.count
    assert len(said) == first.count - whole[:cut].count(b"\n")
    third = make()[1]
    third.refresh()
    assert third.count == first.count


def test_data_may_move(folder: ImageFolder, make: Make, rng: np.random.Generator, tmp_path: Path) -> None:
    spoil_some(folder, rng)
    loader, known, _ = make()
    list(loader.epoch(0))
    moved = BadFiles(tmp_path / "run/bad_files", tmp_path / "new", rank=0, world_size=1, limit=100)
    moved.refresh()
    assert moved.count == known.count
    below = {path[len(str(folder.root)) :] for path in folder.paths if path in known}
    assert all(f"{tmp_path / 'new'}{path}" in moved for path in below)


def test_validation_images_stay_errors(folder: ImageFolder, load: Load, backend: str, rng: np.random.Generator) -> None:
    """Accuracy is over all of them. Again and again: DALI ended the process when two operators failed at once."""
    spoil_some(folder, rng, ("text",))
    for _ in range(4):
        loader = load(folder, backend, train=False)
        with pytest.raises(UserError, match=r"cannot decode the image .*`lesam-dist scan` .* data.skip_list"):
            read(loader, 1)
        loader.close()

"""Training images that cannot be decoded: named once, replaced by what place and seed say, whoever meets them and when.

The oracle is a copy of the data in which each broken file *is* its replacement, read without any of this.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from lesam_dist.data import ImageFolder, epoch_order, scan_split
from lesam_dist.data.bad_files import BadFiles
from lesam_dist.data.order import replacements
from lesam_dist.errors import UserError
from tests.data.spoilt import BATCH, Batches, Load, LoadNoise, N, Said, plain, same, spoil_some


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


@pytest.mark.parametrize("workers", [0, 2])
def test_all_kinds(
    noise: ImageFolder,
    load_noise: LoadNoise,
    load: Load,
    backend: str,
    rng: np.random.Generator,
    seed: int,
    tmp_path: Path,
    workers: int,
) -> None:
    """Two epochs, bit for bit; each file is named once, with its reason, and is in the journal."""
    bad = spoil_some(noise, rng)
    loader, known, said = load_noise(workers=workers)
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        assert [len(labels) for _, labels in batches] == [BATCH] * (N // BATCH)
        assert same(batches, expected(noise, tmp_path / "clean", bad, plain(load, backend), seed, epoch))
    met = {noise.paths[i] for i in bad if noise.paths[i] in known}
    seen = {int(i) for e in (0, 1) for i in epoch_order(N, seed=seed, epoch=e, shuffle=True)[: N // BATCH * BATCH]}
    assert met >= {noise.paths[i] for i in bad if i in seen}
    assert known.count == known.own == len(met) == len(said)
    for path in met:
        [line] = [line for line in said if f"'{path}'" in line]
        assert line.startswith("warning: rank 0 cannot ")
        assert "(" in line
    written = (tmp_path / "run/bad_files/rank_0.jsonl").read_text().splitlines()
    assert {str(noise.root / json.loads(line)["path"]) for line in written} == met
    assert len(written) == len(met)
    loader.close()


def test_known_files_are_not_opened_and_change_nothing(
    noise: ImageFolder, load_noise: LoadNoise, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run that knows them all, of which they are healthy again, reads the same bits and says nothing."""
    healthy = {path: Path(path).read_bytes() for path in noise.paths}
    spoil_some(noise, rng)
    loader, first, _ = load_noise()
    batches = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    knowing, known, said = load_noise()
    known.refresh()
    assert known.count == first.count
    for path in noise.paths:
        if path in known:
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
            Path(path).write_bytes(healthy[path])
    assert all(same(list(knowing.epoch(epoch)), batches[epoch]) for epoch in (0, 1))
    assert said == []


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_with_one_process(
    noise: ImageFolder, load_noise: LoadNoise, rng: np.random.Generator, world: int
) -> None:
    """Each meets its own; together they read what one process reads. A file is counted once or, met by two, twice."""
    spoil_some(noise, rng)
    loader, alone, _ = load_noise(run="alone")
    whole = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    made = [load_noise(rank=rank, world_size=world) for rank in range(world)]
    for epoch in (0, 1):
        parts = zip(*(each.epoch(epoch) for each, _, _ in made), strict=True)
        joined = [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]
        assert same(joined, whole[epoch])  # type: ignore[arg-type]
    for _, known, _ in made:
        known.refresh()
        assert known.count == alone.count
    assert sum(known.own for _, known, _ in made) >= alone.count
    shrunk = load_noise(rank=0, world_size=1)[1]
    shrunk.refresh()
    assert shrunk.count == shrunk.own == alone.count


def test_a_restart_in_the_middle_goes_on(noise: ImageFolder, load_noise: LoadNoise, rng: np.random.Generator) -> None:
    spoil_some(noise, rng)
    loader, _, before = load_noise()
    whole = list(loader.epoch(0))
    start = int(rng.integers(1, len(whole)))
    again, _, said = load_noise()
    assert same(list(again.epoch(0, start)), whole[start:])
    assert not said
    fresh, _, said = load_noise(run="fresh")
    assert same(list(fresh.epoch(0, start)), whole[start:])
    assert len(said) <= len(before)


def test_most_files_are_bad(
    noise: ImageFolder,
    load_noise: LoadNoise,
    load: Load,
    backend: str,
    rng: np.random.Generator,
    seed: int,
    tmp_path: Path,
) -> None:
    """Replacements that are bad themselves; batches of which nothing is left."""
    bad = [int(i) for i in rng.choice(N, 55, replace=False)]
    for i in bad:
        Path(noise.paths[i]).write_bytes(b"")
    loader, known, _ = load_noise()
    assert same(list(loader.epoch(0)), expected(noise, tmp_path / "clean", bad, plain(load, backend), seed, 0))
    for path in noise.paths:
        Path(path).write_bytes(b"")
    with pytest.raises(UserError, match=r"no training image in '.*data' can be decoded"):
        list(loader.epoch(1))
    assert known.count == N


def test_backends_read_the_same_samples(
    noise: ImageFolder, load: Load, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Labels, and images but for the rounding of their decoders: noise of another file differs by 80 grey levels."""
    pytest.importorskip("nvidia.dali")
    spoil_some(noise, rng)
    both: list[Batches] = []
    for backend in ("dali", "torchvision"):
        bad = BadFiles(tmp_path / backend, noise.root, rank=0, world_size=1, limit=100, say=Said())
        both.append(
            [*itertools.chain(*(load(noise, backend, batch_size=BATCH, bad_files=bad).epoch(e) for e in (0, 1)))]
        )
    for (images, labels), (others, other_labels) in zip(*both, strict=True):
        assert torch.equal(labels, other_labels)
        difference = (images - others).abs().mean(dim=(1, 2, 3))
        assert difference.max() < 0.1, "of a standard deviation of 1.3"


def test_flipped_bits_in_the_pixels_are_no_failure(
    noise: ImageFolder, load_noise: LoadNoise, rng: np.random.Generator
) -> None:
    """What both decoders take, with a warning or without, is a sample as any other."""
    path = next(path for path in noise.paths if path.endswith("JPEG"))
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
    loader, known, said = load_noise()
    for epoch in (0, 1):
        list(loader.epoch(epoch))
    assert known.count == 0
    assert said == []


def test_what_follows_a_jpeg_is_no_failure(noise: ImageFolder, load_noise: LoadNoise, load: Load, backend: str) -> None:
    """Cameras append something; such a file is looked at once, and is the sample that it is."""
    unspoilt = list(plain(load, backend)(noise).epoch(0))
    for path in noise.paths:
        if path.endswith("JPEG"):
            with open(path, "ab") as file:
                file.write(bytes(64))
    loader, known, _ = load_noise()
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

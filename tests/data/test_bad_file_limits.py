"""How many training images may be bad, what is no fault of a file, and the journal that a restart reads."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from lesam_dist.data import ImageFolder, reading
from lesam_dist.data.bad_files import BadFiles
from lesam_dist.errors import UserError
from tests.data.spoilt import BATCH, Load, LoadNoise, N, plain, read, same, spoil_some


def test_too_many(noise: ImageFolder, load_noise: LoadNoise, rng: np.random.Generator) -> None:
    """Up to the limit all are replaced; one more stops the run, and a restart with the same limit too."""
    bad = spoil_some(noise, rng, ("empty", "garbage", "text"))
    loader, known, _ = load_noise(limit=3, run="enough")
    for epoch in range(4):
        list(loader.epoch(epoch))
    assert known.count == 3
    loader, known, _ = load_noise(limit=2)
    message = (
        r"^3 training images cannot be decoded, more than data.max_bad_files 2: '.*Find them all with `lesam-dist scan "
        rf"{noise.root}`.* raise data.max_bad_files\.$"
    )
    with pytest.raises(UserError, match=message) as caught:
        read(loader, 4)
    assert all(noise.paths[i] in str(caught.value) for i in bad)
    with pytest.raises(UserError, match=message):
        next(load_noise(limit=2)[0].epoch(0))
    resumed, known, said = load_noise(limit=3)
    for epoch in range(4):
        list(resumed.epoch(epoch))
    assert known.count == 3
    assert said == []


def test_none_may_be_bad(noise: ImageFolder, load_noise: LoadNoise, rng: np.random.Generator, tmp_path: Path) -> None:
    [bad] = spoil_some(noise, rng, ("text",))
    loader, _, _ = load_noise(limit=0)
    with pytest.raises(
        UserError, match=r"^cannot decode the image '(.*)' of 135 bytes \(.*lesam-dist scan.*skip_list"
    ) as caught:
        read(loader, 9)
    assert noise.paths[bad] in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_file_system_that_is_gone(noise: ImageFolder, load_noise: LoadNoise, tmp_path: Path) -> None:
    """Nothing is journalled then: the files may be fine."""
    loader, known, said = load_noise(limit=1)
    next(loader.epoch(0))
    noise.root.rename(tmp_path / "elsewhere")
    message = (
        rf"^{BATCH} of the {BATCH} images of a batch cannot be read, e.g. '.*' \(No such file or directory\): it is "
    )
    with pytest.raises(UserError, match=message + rf"hardly the files.*data.root '{noise.root}' is still mounted"):
        list(loader.epoch(1))
    assert known.count == 0
    assert said == []
    (tmp_path / "elsewhere").rename(noise.root)
    assert len(list(loader.epoch(1))) == N // BATCH


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(noise: ImageFolder, load_noise: LoadNoise) -> None:
    for path in noise.paths[:3]:
        os.chmod(path, 0)
    loader, known, said = load_noise()
    for epoch in range(3):
        list(loader.epoch(epoch))
    assert known.count == 3
    assert all("Permission denied" in line for line in said)


def test_errors_that_pass_are_waited_for(
    noise: ImageFolder, load_noise: LoadNoise, load: Load, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale handle that is fresh again at the third try is no bad file."""
    whole = list(plain(load, backend)(noise).epoch(0))
    path, aside = Path(noise.paths[5]), Path(noise.paths[5] + ".aside")
    path.rename(aside)
    tries: list[str] = []

    def flaky(name: str, _part: object) -> bytes:
        if name == str(path) and not path.exists():
            tries.append(name)
            if len(tries) == 3:
                aside.rename(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        return plainly(name, None)

    plainly = reading._read
    monkeypatch.setattr(reading, "_read", flaky)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    loader, known, _ = load_noise()
    epochs = itertools.takewhile(lambda _: not tries, range(1, 20))
    for epoch in epochs:  # the file may be one of the two that an epoch leaves out
        list(loader.epoch(epoch))
    assert len(tries) == 3
    assert known.count == 0
    assert same(list(loader.epoch(0)), whole)


def test_errors_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def fail(name: str, _part: object) -> bytes:
        raise OSError(error, os.strerror(error), name)

    monkeypatch.setattr(reading, "_read", fail)
    monkeypatch.setattr("time.sleep", pauses.append)
    for error, tries in ((errno.EIO, 3), (errno.ETIMEDOUT, 3), (errno.ENOENT, 0), (errno.EACCES, 0)):
        pauses.clear()
        with pytest.raises(OSError, match=os.strerror(error)):
            reading.read_file("name")
        assert len(pauses) == tries
        assert sum(pauses) < 2


def test_lines_that_a_crash_cut_off(
    noise: ImageFolder, load_noise: LoadNoise, rng: np.random.Generator, tmp_path: Path
) -> None:
    """At any byte: what was whole is known, what was not is met again, and lines after it are read."""
    spoil_some(noise, rng)
    loader, first, _ = load_noise()
    for epoch in range(3):
        list(loader.epoch(epoch))
    journal = tmp_path / "run/bad_files/rank_0.jsonl"
    whole = journal.read_bytes()
    cut = int(rng.integers(1, len(whole)))
    journal.write_bytes(whole[:cut])
    loader, second, said = load_noise()
    for epoch in range(3):
        list(loader.epoch(epoch))
    assert second.count == first.count
    assert len(said) == first.count - whole[:cut].count(b"\n")
    third = load_noise()[1]
    third.refresh()
    assert third.count == first.count


def test_data_may_move(noise: ImageFolder, load_noise: LoadNoise, rng: np.random.Generator, tmp_path: Path) -> None:
    spoil_some(noise, rng)
    loader, known, _ = load_noise()
    list(loader.epoch(0))
    moved = BadFiles(tmp_path / "run/bad_files", tmp_path / "new", rank=0, world_size=1, limit=100)
    moved.refresh()
    assert moved.count == known.count
    below = {path[len(str(noise.root)) :] for path in noise.paths if path in known}
    assert all(f"{tmp_path / 'new'}{path}" in moved for path in below)


def test_validation_images_stay_errors(noise: ImageFolder, load: Load, backend: str, rng: np.random.Generator) -> None:
    """Accuracy is over all of them. Again and again: DALI ended the process when two operators failed at once."""
    spoil_some(noise, rng, ("text",))
    for _ in range(4):
        loader = load(noise, backend, train=False)
        with pytest.raises(UserError, match=r"cannot decode the image .*`lesam-dist scan` .* data.skip_list"):
            read(loader, 1)
        loader.close()

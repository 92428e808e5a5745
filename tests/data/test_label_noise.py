"""Wrong training labels: how many, which, the same for every reader, and what is refused."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10

from lesam_dist.config.command_line import parse
from lesam_dist.data import ImageFolder, scan_split
from lesam_dist.data.cifar import CifarSplit
from lesam_dist.data.confusable import CIFAR10_PAIRS, taken_for
from lesam_dist.data.human_labels import read_human_labels
from lesam_dist.data.label_noise import symmetric, with_label_noise
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.data import build_folders, build_loaders
from tests.cifar_files import write_cifar
from tests.conftest import Command

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar(labels: NDArray[np.int64], classes: tuple[str, ...]) -> CifarSplit:
    return CifarSplit(Path("somewhere"), classes, np.zeros((len(labels), 3, 1, 1), np.uint8), labels)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_symmetric_noise_is_exact_and_uniform_over_the_other_classes(
    rng: np.random.Generator, seed: int, dtype: type
) -> None:
    """In number to the label; over the nine others by Pearson's chi-squared (72 degrees of freedom per class pair)."""
    labels, rate = rng.integers(0, 10, 40_000).astype(dtype), float(rng.uniform(0.1, 0.9))
    noisy = symmetric(labels, 10, rate, seed)
    wrong = noisy != labels
    assert noisy.dtype == dtype
    assert wrong.sum() == round(rate * len(labels))
    pairs = np.zeros((10, 10))
    np.add.at(pairs, (labels[wrong], noisy[wrong]), 1)
    expected = pairs.sum(1, keepdims=True) / 9 * (1 - np.eye(10))
    chi = (((pairs - expected) ** 2)[~np.eye(10, dtype=bool)] / expected[~np.eye(10, dtype=bool)]).sum()
    assert chi < 150, "80 degrees of freedom: above it once in 3e-6 times"


def test_wrong_labels_are_a_function_of_seed_and_index(rng: np.random.Generator, seed: int) -> None:
    """The same again, others with another seed; those of a lower rate are among those of a higher one."""
    labels = rng.integers(0, 10, 5000)
    low, high, other = (symmetric(labels, 10, rate, s) for rate, s in ((0.2, seed), (0.6, seed), (0.2, seed + 1)))
    assert np.array_equal(low, symmetric(labels, 10, 0.2, seed))
    assert np.array_equal(low[low != labels], high[low != labels])
    both = ((low != labels) & (other != labels)).sum()
    assert 120 < both < 280, "a fifth of a fifth: 200, with a standard deviation below 13"
    assert np.array_equal(labels, symmetric(labels, 10, 0.0, seed))


def test_asymmetric_noise_of_cifar10(rng: np.random.Generator, seed: int) -> None:
    labels = rng.integers(0, 10, 3000)
    noisy = with_label_noise(cifar(labels, CIFAR10_CLASSES), kind="asymmetric", rate=0.4, seed=seed).labels
    for label, name in enumerate(CIFAR10_CLASSES):
        changed = noisy[(labels == label) & (noisy != labels)]
        wanted = round(0.4 * (labels == label).sum()) if name in CIFAR10_PAIRS else 0
        assert [CIFAR10_CLASSES[i] for i in changed] == [CIFAR10_PAIRS.get(name)] * wanted


def test_asymmetric_noise_of_other_classes() -> None:
    """CIFAR-100's superclasses are known by the names (checked against torchvision's order of the fine labels)."""
    assert taken_for(["a", "b", "c"]) == {0: 1, 1: 2, 2: 0}
    assert taken_for(CIFAR10_CLASSES)[9] == 1
    # Labels are in alphabetical order: apple 0, ..., mushroom 51, orange 53, pear 57, sweet_pepper 83.
    from lesam_dist.data import confusable

    names = sorted(name for group in confusable._SUPERCLASSES for name in group)
    assert (len(set(names)), [len(group) for group in confusable._SUPERCLASSES]) == (100, [5] * 20)
    pairs = taken_for(names)
    assert [pairs[label] for label in (0, 51, 53, 57, 83)] == [51, 53, 57, 83, 0]
    assert sorted(pairs) == sorted(pairs.values()) == list(range(100))


def test_a_split_with_other_labels_has_another_digest(images: Path, seed: int) -> None:
    """Also some of its samples alone, as analyses take them."""
    clean = scan_split(images, "train")
    noisy, other = (with_label_noise(clean, kind="symmetric", rate=0.5, seed=s) for s in (seed, seed + 1))
    some = np.arange(0, len(clean), 2)
    digests = [each.digest for split in (clean, noisy, other) for each in (split, split.take(some))]
    assert len(set(digests)) == 6
    assert noisy.digest == with_label_noise(clean, kind="symmetric", rate=0.5, seed=seed).digest
    assert list(noisy.paths) == list(clean.paths)
    with pytest.raises(UserError, match="a single class: no label can be wrong"):
        with_label_noise(ImageFolder(images, ("one",), ("a",), np.zeros(1, int)), kind="symmetric", rate=0.5, seed=0)


ALONE = Distributed(0, 0, 1, torch.device("cpu"))
NOISE = ("--data.label_noise.kind", "symmetric", "--data.label_noise.rate", "0.3")


def test_a_run_trains_on_them_and_resumes_with_no_others(
    command: Command, small: tuple[str, ...], tmp_path: Path
) -> None:
    """18 of 60 training labels are wrong, validation's stay."""
    run = (*small, "--run_dir", tmp_path / "run")
    config = parse([*map(str, run), *NOISE])
    loaders = build_loaders(config, build_folders(config, ALONE), ALONE)
    clean = parse([*map(str, run)])
    train, val = build_folders(clean, ALONE)
    seen = torch.cat([labels for _, labels in loaders[0].epoch(0)])
    right = torch.cat([labels for _, labels in build_loaders(clean, (train, val), ALONE)[0].epoch(0)])
    assert (seen != right).sum() == 18
    assert torch.equal(torch.cat([labels for _, labels in loaders[1].epoch(0)]), torch.from_numpy(val.labels).long())
    for loader in loaders:
        loader.close()
    status, out, _ = command(*run, *NOISE)
    assert (status, "18 of 60 training labels are changed (symmetric, rate 0.3)" in out) == (0, True)
    for noise, said in (((*NOISE[:3], "0.4"), "data.label_noise.rate: 0.3 then, 0.4 now"), ((), "kind: 'symmetric'")):
        status, _, err = command(*run, *noise, "--resume", "auto")
        assert (status, said in err) == (2, True)


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        ({"rate": 0.2}, "data.label_noise.kind is null"),
        ({"kind": "symmetric"}, "data.label_noise.rate is null"),
        ({"kind": "asymmetric", "rate": 1.0}, "rate is 1.0: it must be at least 0 and below 1"),
        ({"kind": "symmetric", "rate": -0.1}, "rate is -0.1"),
        ({"kind": "symmetric", "rate": 0.1, "labels": "worse_label"}, "labels is worse_label but .* is symmetric"),
        ({"kind": "human", "rate": 0.1}, "rate is 0.1 but data.label_noise.kind is human"),
        ({"kind": "human"}, "data.builtin is digits: people's labels are of cifar10 and cifar100"),
    ],
)
def test_what_a_config_must_not_say(noise: dict[str, Any], said: str) -> None:
    flags = [f"--data.label_noise.{name}={value}" for name, value in noise.items()]
    with pytest.raises(UserError, match=said):
        parse(["--config", "digits", *flags])


# ---- labels that people gave -----------------------------------------------------------------------------------------


def test_human_labels_are_read_in_both_spellings_of_numpy(tmp_path: Path, rng: np.random.Generator) -> None:
    """The files were written with NumPy 1, which calls a module otherwise. Lists and tensors would do, too."""
    clean, worse = rng.integers(0, 10, (2, 50))
    sets = {"clean_label": clean, "worse_label": worse, "aggre_label": worse.tolist(), "random_label1": worse}
    torch.save(sets | {"random_label1": torch.from_numpy(worse)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for info in new.infolist():
            old.writestr(info, new.read(info).replace(b"numpy._core.", b"numpy.core."))
    for file in ("old.pt", "new.pt"):
        for name in ("worse_label", "aggre_label", "random_label1"):
            assert np.array_equal(read_human_labels(tmp_path / file, name, clean, 10), worse)


def test_human_labels_of_a_run(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CIFAR's own, with worse ones in their place."""
    train, val = write_cifar(tmp_path, "cifar10", (50, 20), rng, monkeypatch)
    monkeypatch.setattr(CIFAR10, "download", lambda self: None)
    worse = rng.integers(0, 10, 50)
    torch.save({"clean_label": train.labels, "worse_label": worse}, tmp_path / "human.pt")
    noise = {"kind": "human", "file": tmp_path / "human.pt", "labels": "worse_label"}
    flags = [f"--data.label_noise.{name}={value}" for name, value in noise.items()]
    config = parse(["--config", "cifar10_resnet18_sgd", f"--data.root={tmp_path}", *flags])
    folders = build_folders(config, ALONE)
    assert np.array_equal(folders[0].labels, worse)
    assert np.array_equal(folders[1].labels, val.labels)
    changed = (worse != train.labels).sum()
    assert f"{changed} of 50 training labels are changed (human, worse_label)" in capsys.readouterr().out


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this was run",)


def test_human_labels_that_cannot_be_used(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else than arrays is built from the file."""
    clean = rng.integers(0, 10, 50)
    other = clean.copy()
    other[7] = (other[7] + 1) % 10
    cases: dict[str, tuple[Any, str]] = {
        "set": ({"clean_label": clean, "aggre_label": clean}, "worse_label, which is not .* has clean_label, aggre_l"),
        "clean": ({"worse_label": clean}, "has no clean_label"),
        "length": ({"clean_label": clean[:9], "worse_label": clean}, "has 9 labels as clean_label, .* are 50 training"),
        "images": ({"clean_label": other, "worse_label": clean}, "of other images, .* in 1 of 50 .first in number 7: "),
        "range": ({"clean_label": clean, "worse_label": clean + 10}, "labels outside 0 to 9 as worse_label"),
        "kind": ({"clean_label": clean, "worse_label": clean / 2}, "has float64 as worse_label"),
        "list": ([clean], "is no file of CIFAR-N"),
        "code": ({"worse_label": _Code()}, "is damaged, or no file of CIFAR-N"),
    }
    for name, (content, said) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=said):
            read_human_labels(tmp_path / name, "worse_label", clean, 10)
    (tmp_path / "pickle").write_bytes(pickle.dumps(_Code(), protocol=2))
    (tmp_path / "cut").write_bytes((tmp_path / "set").read_bytes()[:300])
    for name, said in (("pickle", "is damaged"), ("cut", "is damaged"), ("missing", "cannot be read .No such file")):
        with pytest.raises(UserError, match=said):
            read_human_labels(tmp_path / name, "worse_label", clean, 10)
    with pytest.raises(UserError, match="cannot be read"):
        read_human_labels(tmp_path, "worse_label", clean, 10)
    assert "this was run" not in capsys.readouterr().out

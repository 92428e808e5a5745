"""Corruptions against the library, closed forms and files whose errors are known; and what is refused."""

from __future__ import annotations

import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imagecorruptions import corrupt, get_corruption_names
from numpy.typing import NDArray
from torch import Tensor, nn

from lesam_dist.analysis.engine.corruption import KINDS, SEVERITIES, corrupted
from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.measures.robustness import Robustness, passes, robustness
from lesam_dist.errors import UserError
from tests.analysis.corrupted_files import write_files
from tests.analysis.quadratics import F64, in_batches

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.3, 0.45)
TAKE_A_SEED = ("impulse_noise", "glass_blur")


class Seen(nn.Module):
    """Logits (0, w x) of images (B, 3, H, W), which it remembers."""

    def __init__(self, side: int = 32) -> None:
        super().__init__()
        size = 3 * side**2
        self.w = nn.Parameter(torch.randn(size, dtype=F64) / size**0.5)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        out = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(out), out], dim=1)


def photographs(n: int, side: int = 32) -> NDArray[np.uint8]:
    """Smooth colours, (n, side, side, 3)."""
    large = nn.functional.interpolate(torch.rand(n, 3, 4, 4), size=side, mode="bilinear")
    return np.asarray((255 * large).round().byte().permute(0, 2, 3, 1).numpy())


def normalised(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2))


def measured(objective: Objective, **how: Any) -> Robustness:
    attacks: dict[str, Any] = {"linf": (), "l2": (), "mean": MEAN, "std": STD}
    return robustness(objective, **attacks, **how)


def directly(image: NDArray[np.uint8], kind: str, severity: int, seed: int, index: int) -> NDArray[np.uint8]:
    """By the library, with the seeds that results of this version are of."""
    words = np.random.SeedSequence([seed, zlib.crc32(kind.encode()), severity, index]).generate_state(4)
    np.random.seed(words)
    own = {"seed": int(words[0])} if kind in TAKE_A_SEED else {}
    made: NDArray[np.uint8] = corrupt(image, severity=severity, corruption_name=kind, **own)
    return made


def test_the_kinds_are_the_papers() -> None:
    assert list(KINDS) == get_corruption_names("common")


def test_a_model_is_shown_what_the_library_makes(seed: int) -> None:
    """Of each image by its index, whatever batch it is in; and nobody else's random numbers change."""
    pixels, labels = photographs(3), torch.randint(2, (3,))
    severity = int(torch.randint(1, 6, ()))
    model = Seen()
    objective = Objective(model, in_batches(normalised(pixels), labels, 2))
    np.random.seed(1)
    measured(objective, seed=seed, corruptions="all", severities=[severity])
    here = np.random.random()
    np.random.seed(1)
    assert here == np.random.random()
    whole = torch.cat(model.seen[2:]).unflatten(0, (15, 3))  # behind the two batches of clean ones
    for kind, seen in zip(KINDS, whole, strict=True):
        made = np.stack([directly(image, kind, severity, seed, i) for i, image in enumerate(pixels)])
        torch.testing.assert_close(seen, normalised(made), rtol=1e-12, atol=1e-12, msg=kind)


@pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", "frost"])
def test_what_is_random_depends_on_seed_index_and_severity(seed: int, kind: str) -> None:
    (image,) = photographs(1)
    other = [(kind, 2, seed + 1, 0), (kind, 2, seed, 1), (kind, 3, seed, 0), ("shot_noise", 2, seed, 0)]
    first = corrupted(image, kind, 2, seed, 0)
    assert np.array_equal(first, corrupted(image, kind, 2, seed, 0))
    assert not any(np.array_equal(first, corrupted(image, *each)) for each in other)


def test_brightness_in_closed_form(seed: int) -> None:
    """The largest channel rises by a tenth for each severity, to 1 at most, and the others in proportion."""
    for severity, image in zip(SEVERITIES, photographs(5, 40), strict=True):
        x = image.astype(float) / 255
        value = x.max(axis=2, keepdims=True)
        ratio = np.divide(x, value, out=np.ones_like(x), where=value > 0)
        wanted = 255 * ratio * np.minimum(value + severity / 10, 1)
        off = wanted - corrupted(image, "brightness", severity, seed, 0)  # whose fractions are cut off
        assert -1e-6 < off.min() <= off.max() < 1 + 1e-6


def test_gaussian_noise_of_grey_has_the_published_deviation(seed: int) -> None:
    grey = np.full((200, 200, 3), 127, dtype=np.uint8)
    noise = corrupted(grey, "gaussian_noise", 1, seed, 0).astype(float) - 127
    assert abs(noise.std() / 255 / 0.08 - 1) < 6 / (2 * noise.size) ** 0.5  # six standard errors
    assert abs(noise.mean() + 0.5) < 6 * 0.08 * 255 / noise.size**0.5


def test_files_by_severity(seed: int, tmp_path: Path) -> None:
    """Errors and likelihoods of a linear model, from the written pixels; the same images at each severity."""
    images, labels = write_files(tmp_path, ["fog", "frost"], 12, seed)
    model = Seen()
    objective = Objective(model, in_batches(normalised(photographs(12)), torch.zeros(12, dtype=torch.long), 5))
    found = measured(objective, seed=seed, corruptions_root=str(tmp_path), corruptions=["frost", "fog"]).corrupted
    assert found is not None
    assert [(cell.kind, cell.severity) for cell in found.cells] == [
        (kind, severity) for kind in ("frost", "fog") for severity in SEVERITIES
    ]
    weights = model.w.detach().numpy()
    for cell in found.cells:
        out = normalised(images[cell.kind][cell.severity - 1]).flatten(1).numpy() @ weights
        assert (cell.accuracy.right, cell.accuracy.images) == (int(((out > 0) == labels).sum()), 12)
        assert cell.calibration.nll == pytest.approx(np.logaddexp(0, np.where(labels, -out, out)).mean())
    numbers = found.numbers()
    assert numbers["mean_error"] == pytest.approx(np.mean([cell["error"] for cell in numbers["cells"]]))
    assert numbers["mean_error"] == pytest.approx(np.mean([kind["mean_error"] for kind in numbers["kinds"]]))
    alone = measured(objective, seed=seed, corruptions_root=tmp_path, corruptions=["fog"], severities=[4, 2, 4])
    assert alone.corrupted is not None
    assert alone.corrupted.cells == [found.cells[6], found.cells[8]]


def test_files_for_a_model_of_larger_images(seed: int, tmp_path: Path) -> None:
    """They are enlarged as `CifarLoader` does."""
    images, _ = write_files(tmp_path, ["snow"], 2, seed)
    model = Seen(48)
    objective = Objective(model, [(normalised(photographs(2, 48)), torch.zeros(2, dtype=torch.long))])
    measured(objective, seed=seed, corruptions_root=tmp_path, corruptions=["snow"], severities=[3])
    wanted = nn.functional.interpolate(normalised(images["snow"][2]), size=48, mode="bilinear", antialias=True)
    torch.testing.assert_close(model.seen[-1], wanted)


def test_what_was_interrupted_goes_on(seed: int, tmp_path: Path) -> None:
    objective = Objective(Seen(), [(normalised(photographs(3)), torch.zeros(3, dtype=torch.long))])
    how: dict[str, Any] = {"seed": seed, "severities": [1, 2]}
    whole = measured(objective, corruptions=["contrast", "shot_noise"], **how)
    assert objective.passes["forward"] == passes((), (), 10, 4)[0] == 5
    measured(objective, corruptions=["contrast"], journal=Journal(tmp_path / "journal", {}), **how)
    objective.passes["forward"] = 0
    seen: list[float] = []
    journal = Journal(tmp_path / "journal", {})
    again = measured(objective, corruptions=["shot_noise", "contrast"], journal=journal, on_passes=seen.append, **how)
    assert again == whole
    assert objective.passes["forward"] == 2
    assert seen == [1, 2, 3, 4, 5]


def spoil(name: str, array: NDArray[Any]) -> Callable[[Path], None]:
    return lambda root: np.save(root / f"{name}.npy", array)


SPOILT = [
    (
        shutil.rmtree,
        r"^corruptions_root '.*' does not exist, or is no folder: give the one of CIFAR-10-C or CIFAR-100-C",
    ),
    (lambda root: (root / "fog.npy").unlink(), r"^corruptions_root '.*' has no fog\.npy: complete it, or choose"),
    (lambda root: (root / "fog.npy").write_text("no"), r"fog\.npy' cannot be read as an array of numpy: "),
    (spoil("fog", np.zeros((50_000, 3), np.uint8)), r"fog\.npy' holds uint8 of shape \(50000, 3\): of CIFAR-10-C"),
    (spoil("labels", np.zeros(50_000)), r"labels\.npy' holds float64 of shape .* it is integers of shape \(50000,\)"),
    (spoil("labels", np.full(50_000, 2)), r"labels\.npy' has labels from 2 to 2, and the model has 2 classes: give"),
]


@pytest.mark.parametrize(("change", "message"), SPOILT, ids=[message[:40] for _, message in SPOILT])
def test_spoilt_files_are_refused(seed: int, tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    write_files(tmp_path / "c", ["fog"], 1, seed)
    change(tmp_path / "c")
    refused(message, photographs(2), corruptions_root=tmp_path / "c", corruptions=["fog"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"corruptions": ["fogg"]}, r"^unknown corruption 'fogg': did you mean 'fog'\?$"),
        ({"corruptions": ["fog"], "severities": [0]}, r"^severity is 0: it must be from 1 to 5\.$"),
        ({"corruptions": ["fog"], "severities": []}, r"^there are no severities"),
        ({"corruptions": ["fog"]}, r"^images have 28 x 28 pixels, and imagecorruptions-imaug corrupts none below 32:"),
    ],
)
def test_what_cannot_be_made_is_refused(wrong: dict[str, Any], message: str) -> None:
    refused(message, photographs(2, 28), **wrong)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    refused(r"^corruptions are made by imagecorruptions-imaug, .*: pip install 'lesam-dist\[corruptions\]', or", None)


def refused(message: str, pixels: NDArray[np.uint8] | None, **how: Any) -> None:
    pixels = photographs(2) if pixels is None else pixels
    objective = Objective(Seen(pixels.shape[1]), [(normalised(pixels), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(UserError, match=message) as raised:
        measured(objective, **({"corruptions": "all"} | how))
    assert "\n" not in str(raised.value)
    assert objective.passes["forward"] == 0, "refused before anything is computed"

"""Colour jitter, random grey and evaluation without a crop: torchvision's, and the same in both backends."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lesam_dist.config.command_line import parse
from lesam_dist.data import Loader, Transform, scan_split
from lesam_dist.data.color_jitter import COLOR_NUMBERS, OPERATIONS, choose
from lesam_dist.data.torchvision_color import adjust
from lesam_dist.data.transform import draw
from lesam_dist.errors import UserError

Load = Callable[..., Loader]
AMOUNTS = (0.3, 0.4, 1.2, 0.1)


def photo(side: int) -> Tensor:
    """A natural image, uint8 (3, side, side)."""
    from sklearn.datasets import load_sample_images

    image = Image.fromarray(load_sample_images().images[1]).resize((side, side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def test_choices_are_torchvisions(seed: int) -> None:
    """Orders, ranges and moments, against torchvision's own draws; of two operations alone too."""
    n = 6000
    uniform = np.random.default_rng(seed).random((n, COLOR_NUMBERS))
    theirs = [v2.ColorJitter(*AMOUNTS).make_params([]) for _ in range(2000)]
    order, factors, gray = choose(uniform, AMOUNTS, 0.2)
    assert abs(gray.mean() - 0.2) < 5 * (0.16 / n) ** 0.5
    for permutation in itertools.permutations(range(4)):
        share = (order == permutation).all(axis=1).mean()
        assert abs(share - 1 / 24) < 5 * (1 / 24 / n) ** 0.5
    for number, name in enumerate(OPERATIONS):
        mine = factors[order == number]
        other = np.array([each[f"{name}_factor"] for each in theirs])
        width = other.max() - other.min()
        assert abs(mine.mean() - other.mean()) < 5 * width * (1 / 12 / 2000 + 1 / 12 / n) ** 0.5
        assert mine.min() == pytest.approx(other.min(), abs=0.02 * width)
        assert mine.max() == pytest.approx(other.max(), abs=0.02 * width)
    two, fewer, none = choose(uniform, (0.0, 0.4, 0.0, 0.1), 0)
    assert not none.any()
    assert np.array_equal(np.sort(two, axis=1), np.tile([1, 3], (n, 1)))
    assert np.array_equal(fewer[two == 1], factors[order == 1])
    assert abs((two[:, 0] == 1).mean() - 0.5) < 5 * 0.5 / n**0.5


def test_draws_leave_the_others_as_they_are(seed: int) -> None:
    plain, changed = Transform(), Transform(color_jitter=AMOUNTS, grayscale=0.5)
    without, with_colors = (draw(each, range(40), seed=seed, epoch=2) for each in (plain, changed))
    for name in ("area", "ratio", "position", "flip", "hole"):
        assert np.array_equal(getattr(without, name), getattr(with_colors, name))
    assert without.color.shape == (40, 0)
    some = draw(changed, range(12, 30), seed=seed, epoch=2)
    for name in ("color", "factor", "gray"):
        assert np.array_equal(getattr(some, name), getattr(with_colors, name)[12:30])
    assert not np.array_equal(draw(changed, range(40), seed=seed, epoch=3).factor, with_colors.factor)


def test_what_is_done_is_torchvisions(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what its transforms make of the same factors in the same order."""
    image = photo(40)
    order, factors, _ = choose(np.random.default_rng(seed).random((12, COLOR_NUMBERS)), AMOUNTS, 0)
    jitter = v2.ColorJitter(*AMOUNTS)
    for operations, values in zip(order, factors, strict=True):
        named = {f"{OPERATIONS[k]}_factor": float(value) for k, value in zip(operations, values, strict=True)}
        expected = jitter.transform(image, {"fn_idx": torch.from_numpy(operations), **named})
        assert torch.equal(adjust(image, operations, values, 0), expected)
        assert torch.equal(adjust(image, operations, values, 1), v2.RandomGrayscale(p=1)(expected))


@pytest.mark.parametrize("number", [*range(4), None])
def test_backends_agree(seed: int, number: int | None) -> None:
    """Each operation alone over its whole range, and grey: to a level, by rounding."""
    dali = pytest.importorskip("nvidia.dali")
    from lesam_dist.data.dali_color import color_graph, color_inputs

    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.integers(0, 256, (3, 24, 24), dtype=np.uint8))
    extremes = torch.from_numpy(rng.choice(np.array([0, 1, 128, 254, 255], dtype=np.uint8), (3, 24, 24)))
    images = [photo(24), noise, extremes] * 6
    n, count = len(images), 0 if number is None else 1
    low, high = (-0.5, 0.5) if number == 3 else (0.0, 2.5)
    factors = np.concatenate([np.linspace(low, high, 6).repeat(3)]).astype(np.float32)[:, None][:, :count]
    operations = np.full((n, count), number or 0, dtype=np.int32)
    gray = np.full(n, int(number is None), dtype=np.int32)
    inputs = ([image.permute(1, 2, 0).contiguous().numpy() for image in images], gray, operations, factors)
    kinds, dims = zip(*color_inputs(count), strict=True)

    @dali.pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        image, *choice = dali.fn.external_source(
            lambda: inputs[: len(kinds) + 1],
            num_outputs=len(kinds) + 1,
            dtype=[dali.types.UINT8, *kinds],
            ndim=[3, *dims],
            layout=["HWC", *[""] * len(kinds)],
        )
        return color_graph(image, count, *choice)

    [output] = graph(batch_size=n, num_threads=1, device_id=None, prefetch_queue_depth=1).run()
    for i, made in enumerate(output.as_array()):
        expected = adjust(images[i], operations[i], factors[i], int(gray[i])).int()
        assert (torch.from_numpy(made).permute(2, 0, 1).int() - expected).abs().max() <= 1


@pytest.fixture
def pictures(
    class_folder: Callable[..., Path], smooth: Callable[[int, int], Image.Image], rng: np.random.Generator
) -> Path:
    files = {f"{i:02}.png": smooth(*map(int, rng.integers(40, 90, 2))) for i in range(16)}
    return class_folder(train={"only": files}, val={"only": files})


def flat(loader: Loader) -> Tensor:
    return torch.cat([images for images, _ in loader.epoch(0)])


@pytest.mark.parametrize("policy", ["none", "trivialaugment"])
def test_loader_changes_colors_as_the_plan_says(
    pictures: Path, load: Load, backend: str, seed: int, policy: str
) -> None:
    """After crop, resize, flip and the policy: the images without it, changed as drawn."""
    common: dict[str, Any] = {"image_size": 32, "val_resize": 32, "mean": (0, 0, 0), "std": (1 / 255,) * 3}
    common["auto_augment"] = policy
    folder = scan_split(pictures, "train")
    plain, changed = Transform(**common), Transform(**common, color_jitter=(0.3, 0.3, 0.3, 0.3), grayscale=0.3)
    before, after = (flat(load(folder, backend, transform=each, batch_size=16)) for each in (plain, changed))
    draws = draw(changed, range(16), seed=seed, epoch=0)
    expected = torch.stack(
        [
            adjust(image.round().byte(), *choice[:2], int(choice[2]))
            for image, *choice in zip(before, draws.color, draws.factor, draws.gray, strict=True)
        ]
    ).float()
    assert (expected - before).abs().max() > 20
    if backend == "torchvision":
        assert torch.equal(after, expected)
    else:  # a level from each of the first three, which the next may make 1.3 times as large
        assert (after - expected).abs().max() <= 4


def test_evaluation_without_a_crop(pictures: Path, load: Load, backend: str) -> None:
    """torchvision's Resize((S, S)), also where val_resize would be too small; the edges as in test_pixels."""
    transform = Transform(
        image_size=48, val_crop=36, val_resize=1, val_keep_aspect=False, mean=(0, 0, 0), std=(1 / 255,) * 3
    )
    folder = scan_split(pictures, "val")
    images = flat(load(folder, backend, transform=transform, batch_size=16, train=False))
    resize = v2.Resize((36, 36), antialias=True)
    for image, path in zip(images, folder.paths, strict=True):
        whole = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        difference = (image - resize(whole).float()).abs()
        if backend == "torchvision":
            assert difference.max() == 0
        else:
            assert difference[:, 1:-1, 1:-1].max() <= 1.01
            assert difference.max() <= 8


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--data.color_jitter", "[0.1,0.1,0.1,0.6]"), r"data.color_jitter is \[0.1, 0.1, 0.1, 0.6\]: hue is 0.6"),
        (("--data.color_jitter", "[0.1,-1,0.1,0.1]"), "contrast is -1.0, and must be at least 0"),
        (("--data.grayscale", "1.5"), "data.grayscale is 1.5: it must be at most 1"),
        (("--data.val_keep_aspect", "false"), "data.val_resize is 32 but data.val_keep_aspect is false"),
    ],
)
def test_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(["--config", "digits", *flags])


def test_cifar_has_none_of_it() -> None:
    with pytest.raises(UserError, match=r"data.grayscale is 0.1 but data.builtin is cifar10"):
        parse(["--config", "cifar10_resnet18_sgd", "--data.grayscale", "0.1"])

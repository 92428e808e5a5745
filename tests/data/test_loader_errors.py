"""What a loader cannot read or do is an error that names the file or the value, and the remedy."""

from __future__ import annotations

import builtins
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lesam_dist.data import ImageFolder, Transform, scan_split
from lesam_dist.errors import UserError
from tests.data.reading import Load, read, same

CAUSES = {
    "truncated": r"[Tt]runcated",
    "empty": r"cannot identify image file",
    "text": r"cannot identify image file",
    "gif": r"DALI: .*; Pillow: reads it, as GIF",
}


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "gone", "gif"])
def test_a_broken_image_is_named(
    class_folder: Callable[..., Path],
    smooth: Callable[[int, int], Image.Image],
    backend: str,
    load: Load,
    rng: np.random.Generator,
    damage: str,
) -> None:
    root = class_folder(train={"only": {f"{i:02}.JPEG": smooth(64, 80) for i in range(30)}})
    folder = scan_split(root, "train")
    # Evaluation reads whole images; DALI may not need the missing end of one for a crop.
    loader = load(folder, backend, train=False, batch_size=5)
    whole = read(loader, 0)
    path = Path(folder.paths[int(rng.integers(30))])
    data = path.read_bytes()
    with io.BytesIO() as buffer:
        smooth(20, 30).save(buffer, "GIF")
        gif = buffer.getvalue()
    broken = {"truncated": data[: len(data) // 3], "empty": b"", "text": b"404: not found\n" * 9, "gif": gif}
    if damage == "gif" and backend == "torchvision":
        pytest.skip("Pillow reads it, whatever its name")
    if damage == "gone":
        path.unlink()
        message = r"cannot open the image '(.*)' .*put it back, or start again"
    else:
        path.write_bytes(broken[damage])
        message = (
            rf"cannot decode the image '(.*)' of {len(broken[damage])} bytes .*{CAUSES[damage]}.*: remove the file"
        )
    for _ in range(2):  # and again at the next attempt
        with pytest.raises(UserError, match=message) as caught:
            read(loader, 0)
        assert str(path) in str(caught.value)
    path.write_bytes(data)  # repaired: the same loader goes on
    assert same(read(loader, 0), whole)


def test_a_broken_image_in_a_worker_is_named(class_folder: Callable[..., Path], load: Load) -> None:
    folder = scan_split(class_folder(train={"only": {"1.JPEG": b"no image"}}), "train")
    with pytest.raises(UserError, match=r"^cannot decode the image '.*1.JPEG' of 8 bytes \(cannot identify"):
        read(load(folder, "torchvision", batch_size=1, workers=1))


def test_errors_hold_the_value_and_the_remedy(digits_train: ImageFolder, load: Load) -> None:
    with pytest.raises(UserError, match=r"unknown data backend 'dalli': did you mean 'dali'\?"):
        load(digits_train, "dalli")
    with pytest.raises(UserError, match=r"batch size 100 cannot be divided by 8 processes: .* e.g. 104"):
        load(digits_train, "torchvision", batch_size=100, world_size=8)
    with pytest.raises(UserError, match=r"1438 training images, fewer than one global batch of 2048: .*most 1438"):
        load(digits_train, "torchvision", batch_size=2048)
    load(digits_train, "torchvision", batch_size=2048, train=False)
    with pytest.raises(UserError, match=r"batch_size is 0.*at least 1"):
        load(digits_train, "torchvision", batch_size=0)
    with pytest.raises(UserError, match=r"val_resize \(128\) is smaller than image_size \(224\).*at least 224"):
        Transform(val_resize=128)
    with pytest.raises(UserError, match=r"random_area is \(0, 1\)"):
        Transform(random_area=(0, 1))
    with pytest.raises(UserError, match=r"random_aspect_ratio is \(2, 1\)"):
        Transform(random_aspect_ratio=(2, 1))
    with pytest.raises(UserError, match=r"std is \(1, 0, 1\)"):
        Transform(std=(1, 0, 1))
    with pytest.raises(UserError, match=r"image_size is 0"):
        Transform(image_size=0)


def test_dali_missing(digits_train: ImageFolder, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_dali(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("nvidia", "lesam_dist.data.dali")):
            raise ModuleNotFoundError("No module named 'nvidia.dali'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_dali)
    with pytest.raises(UserError, match=r'pip install "lesam-dist\[dali\]".* or choose --data.backend torchvision'):
        load(digits_train, "dali")

"""The common corruptions of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness" (ICLR 2019), by name.

imagecorruptions-imaug makes them. Its strengths are those of ImageNet-C, chosen for photographs of 224 pixels:
CIFAR-10-C's are milder. Motion blur and snow draw their streaks without ImageMagick, which the published images were
made with, and elastic_transform, which was for one size, has strengths of the package's own.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray

from lesam_dist.errors import UserError, unknown_name

KINDS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32
"""Side of an image in pixels, below which the package takes none."""

_PACKAGE = "imagecorruptions-imaug"
_TAKE_A_SEED = ("impulse_noise", "glass_blur")  # the others draw from numpy's global state


def kinds_of(names: Sequence[str]) -> tuple[str, ...]:
    """These kinds, each once and in the order of `KINDS`; all of them for "all", which may stand in a list.

    Raises:
        UserError: there is no such kind.
    """
    wanted = [names] if isinstance(names, str) else names
    for name in wanted:
        if name not in (*KINDS, "all"):
            raise unknown_name("corruption", name, KINDS)
    return tuple(kind for kind in KINDS if kind in wanted or "all" in wanted)


def severities_of(numbers: Sequence[int]) -> tuple[int, ...]:
    """These severities, each once and rising.

    Raises:
        UserError: one is not from 1 to 5; there are none.
    """
    for number in numbers:
        if number not in SEVERITIES:
            raise UserError(f"severity is {number}: it must be from 1 to 5.")
    if not numbers:
        raise UserError("there are no severities: give some of 1 to 5, or leave them out for all.")
    return tuple(sorted(set(numbers)))


def require_library() -> str:
    """The package with its version.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        found = f"{_PACKAGE} {version(_PACKAGE)}"  # another package has a module of the same name
        import imagecorruptions  # noqa: F401
    except (ImportError, PackageNotFoundError) as error:
        reason = "it is not installed" if isinstance(error, PackageNotFoundError) else str(error)
        raise UserError(
            f"corruptions are made by {_PACKAGE}, which cannot be imported ({reason}): pip install "
            "'lesam-dist[corruptions]', or give a folder of CIFAR-10-C or CIFAR-100-C with --corruptions_root."
        ) from error
    return found


def require_size(height: int, width: int) -> None:
    """Raise a `UserError` for images that the package does not take."""
    if min(height, width) < SMALLEST:
        raise UserError(
            f"images have {height} x {width} pixels, and {_PACKAGE} corrupts none below {SMALLEST}: enlarge them, for "
            f"a network that takes any size, with --data.image_size {SMALLEST} --data.val_resize {SMALLEST}."
        )


def corrupted(image: NDArray[np.uint8], kind: str, severity: int, seed: int, index: int) -> NDArray[np.uint8]:
    """An image (H, W, 3), corrupted: a function of the image and the four others alone.

    numpy's global random state, which the package draws from, is seeded for it and then as it was before; no other
    thread may draw from it meanwhile.
    """
    import imagecorruptions

    state = np.random.SeedSequence([seed, zlib.crc32(kind.encode()), severity, index]).generate_state(4)
    own = {"seed": int(state[0])} if kind in _TAKE_A_SEED else {}
    before = np.random.get_state()
    np.random.seed(state)
    try:
        found: NDArray[np.uint8] = imagecorruptions.corrupt(image, severity=severity, corruption_name=kind, **own)
    finally:
        np.random.set_state(before)
    return found

"""`lesam-dist pack --verify`: every byte of a packed data set against its checksums."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lesam_dist.data.commands import progress_bar
from lesam_dist.data.folder import ImageFolder, below_root
from lesam_dist.data.listing import read_listing
from lesam_dist.data.packed.layout import INDEX, SPLITS, Shard
from lesam_dist.data.packed.reading import holds_shards, open_packed, shards_of
from lesam_dist.data.packed.writing import sha256_of
from lesam_dist.data.reading import read_file
from lesam_dist.errors import UserError

_SHOWN = 10  # images and shards


def verify(root: Path, workers: int) -> int:
    """Compare each shard with its SHA-256, and name the images in those that differ; returns 1 if any does.

    Raises:
        UserError: it is no packed data set, its index is damaged, or a shard is missing or of another size.
    """
    if not holds_shards(root):
        raise UserError(f"'{root}' has no {INDEX}: give a folder that `lesam-dist pack` has finished.")
    splits = dict(zip(SPLITS, open_packed(root), strict=True))
    listing = read_listing(root / INDEX)
    shards = shards_of(listing)
    damaged: list[Shard] = []
    with progress_bar("verifying", len(shards)) as progress, ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda shard: sha256_of(root / shard.name), shards)
        for count, (shard, sha256) in enumerate(zip(shards, found, strict=True), 1):
            if sha256 != shard.sha256:
                damaged.append(shard)
            progress(count)
    for shard in damaged[:_SHOWN]:
        split = shard.name.partition("-")[0]
        images = _damaged_images(root, shard, splits[split], listing.arrays[f"{split}.crc"])
        named = ", ".join(below_root(root, path) for path in images[:_SHOWN])
        more = f" and {len(images) - _SHOWN} more" if len(images) > _SHOWN else ""
        print(f"damaged: {root / shard.name}: {f'{named}{more}' if images else 'between the images'}")
    if len(damaged) > _SHOWN:
        print(f"... and {len(damaged) - _SHOWN} more")
    print(f"{len(damaged)} of {len(shards)} shards in '{root}' are damaged")
    if damaged:
        print("copy them again from where the data set was packed, or pack it again into another folder")
    return 1 if damaged else 0


def _damaged_images(root: Path, shard: Shard, split: ImageFolder, crcs: np.ndarray) -> list[str]:
    assert split.shards is not None
    number = split.shards.files.index(str(root / shard.name))
    samples = np.flatnonzero(split.shards.shard == number).tolist()
    paths = {i: split.paths[i] for i in samples}
    return [path for i, path in paths.items() if zlib.crc32(read_file(path, split.shards.part(i))) != crcs[i]]

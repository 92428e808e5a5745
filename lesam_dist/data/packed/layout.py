"""The names of the files of a packed data set, and what its index says."""

from __future__ import annotations

from typing import NamedTuple

INDEX = "index.safetensors"
CLASSES = "classes.txt"
CHECKSUMS = "SHA256SUMS"
KIND = "packed shards"
SPLITS = ("train", "val")
# The arrays of each split have one value per sample (`names`: per byte): see `lesam_dist.data.listing` and
# `lesam_dist.data.shards`; ``crc`` is zlib's CRC-32.


class Shard(NamedTuple):
    """A tar file as the index has it."""

    name: str
    size: int
    sha256: str


def shard_name(split: str, number: int) -> str:
    """WebDataset's way: ``train-{000000..000640}.tar``."""
    return f"{split}-{number:06d}.tar"

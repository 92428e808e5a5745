"""What a data set is: class folders, large ones with an index, or packed shards, here or in an object store."""

from __future__ import annotations

from pathlib import Path

from lesam_dist.data.index import LARGE, Split, find_index, open_index, scan_both, write_index
from lesam_dist.data.packed import holds_shards, open_packed
from lesam_dist.data.packed.layout import INDEX, shard_name
from lesam_dist.data.urls import Url, is_url
from lesam_dist.errors import UserError


def data_root(text: str) -> Path | Url:
    """data.root as the user gave it."""
    return Url(text) if is_url(text) else Path(text).expanduser()


def open_splits(root: Path | Url, *, first: bool) -> Split:
    """Training and validation images. Where there is an index, the processes of a node share one copy of it.

    Args:
        root: of `data_root`.
        first: this process is the first of its node: it checks what it reads, and makes the index of a large data set.
            The others open it when the first has.

    Raises:
        UserError: there is no data set, or it is damaged.
    """
    if isinstance(root, Url) or holds_shards(root):
        return open_packed(root, verify=first)
    if (root / shard_name("train", 0)).exists() and not (root / "train").exists():
        raise UserError(
            f"'{root}' has shards but no {INDEX}: if it is being packed, give the same `lesam-dist pack` again to "
            "finish it; if it is a copy, copy the index too."
        )
    if listing := find_index(root, verify=first):
        return open_index(root, listing)
    splits = scan_both(root)
    if not first or sum(map(len, splits)) < LARGE:
        return splits
    try:
        file = write_index(root, *splits)
    except OSError as error:
        print(
            f"warning: the index of '{root}' cannot be written ({error.strerror or error}), so each process lists the "
            "images at every start: `lesam-dist index` says more",
            flush=True,
        )
        return splits
    print(f"listed '{root}' into {file}: the next start reads that while no file comes or goes", flush=True)
    return open_index(root, listing) if (listing := find_index(root)) else splits

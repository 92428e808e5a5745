"""`lesam-dist pack`: class folders into tar shards, and the check of what was packed."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lesam_dist.config.parser import Parser, wrapped
from lesam_dist.data.commands import class_folders, local_folder
from lesam_dist.data.folder import remarks
from lesam_dist.data.index import Split, scan_both
from lesam_dist.data.packed.layout import SPLITS
from lesam_dist.data.packed.packing import pack_splits, write_index
from lesam_dist.data.packed.verify import verify
from lesam_dist.data.packed.writing import Resize
from lesam_dist.data.skip_list import read_skip_list
from lesam_dist.errors import UserError
from lesam_dist.parallel.place import usable_cores

_QUALITY = 90


def pack(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status, 1 if ``--verify`` finds a shard that is damaged.

    Raises:
        UserError: for bad arguments, a folder that is no data set, an image that cannot be packed, or a full disk.
    """
    arguments = _parser().parse_args(list(argv))
    _check(arguments)
    if arguments.verify:
        return verify(local_folder(arguments.root), arguments.workers)
    root, out = class_folders(arguments.root), local_folder(arguments.out)
    _check_out(root, out)
    begin = time.monotonic()
    resize = None if arguments.resize is None else Resize(arguments.resize, arguments.quality or _QUALITY)
    skip = read_skip_list(Path(arguments.skip_list).expanduser()) if arguments.skip_list else frozenset[str]()
    splits = _splits(root, skip)
    try:
        written, done = pack_splits(splits, out, resize, arguments.images_per_shard, arguments.workers)
        write_index(out, splits, resize, arguments.images_per_shard, written)
    except OSError as error:
        raise UserError(
            f"'{out}' cannot be written ({error.strerror or error}): make room, or choose another folder. The same "
            "command goes on with the shards that are missing."
        ) from error
    train, val = splits
    size = sum(each.size for split in written for each in split) / 1e9
    print(
        f"{len(train)} training and {len(val)} validation images are in {sum(map(len, written))} shards, {size:.2f} GB"
    )
    print(f"wrote {done} of them in {time.monotonic() - begin:.1f} s; train with --data.root {out}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "pack",
        "Pack ROOT/train and ROOT/val into tar files of some thousand images, which WebDataset can read, "
        "with an index by which a run reads the same images in the same order as from ROOT: train with --data.root "
        "OUT.",
        wrapped(
            "exit status: 0 done, 1 --verify found damage, 2 bad input. Ctrl-C and the same command again goes on "
            "with the shards that are missing. The same images and settings give the same bytes.",
        ),
    )
    parser.add_argument("root", metavar="ROOT", help="folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder for the shards; it is made")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="short side that larger images are made to")
    parser.add_argument("--quality", type=int, metavar="N", help=f"of their JPEGs, 1 to 100 (default: {_QUALITY})")
    parser.add_argument("--images_per_shard", type=int, default=2000, metavar="N", help="default: 2000")
    parser.add_argument("--skip_list", metavar="FILE", help="leave out what `lesam-dist scan` found broken")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: one per core)")
    parser.add_argument("--verify", action="store_true", help="ROOT is a packed data set: check every byte of it")
    return parser


def _check(arguments: Any) -> None:
    for name, low, high in (
        ("workers", 1, 1024),
        ("images_per_shard", 1, 10**7),
        ("resize", 16, 1 << 14),
        ("quality", 1, 100),
    ):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} is {value}: it must be at least {low}, and at most {high}.")
    if arguments.quality is not None and arguments.resize is None:
        raise UserError(f"--quality is {arguments.quality} but nothing is resized: give --resize too, or leave it out.")
    if arguments.verify and arguments.out is not None:
        raise UserError(f"--verify writes nothing: give the packed folder alone, without '{arguments.out}'.")
    if not arguments.verify and arguments.out is None:
        raise UserError("OUT is missing: give the folder for the shards (lesam-dist pack ROOT OUT).")


def _check_out(root: Path, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT is '{out}', a file: give a folder for the shards.")
    for split in SPLITS:  # there it would be a class without images
        if out.resolve().is_relative_to((root / split).resolve()):
            raise UserError(f"OUT is '{out}', in the images' own folder '{root / split}': choose one outside of it.")


def _splits(root: Path, skip: Collection[str]) -> Split:
    train, val = scan_both(root)
    for remark in remarks(train, val):
        print(f"warning: {remark}")
    return train.without(skip, "train"), val.without(skip, "val")

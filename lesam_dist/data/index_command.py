"""`lesam-dist index`: list a large data set once, so that runs need not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lesam_dist.config.parser import Parser
from lesam_dist.data.commands import class_folders, progress_bar
from lesam_dist.data.folder import below_root, remarks
from lesam_dist.data.index import Split, find_index, index_files, open_index, scan_both, sizes_of, write_index
from lesam_dist.errors import UserError

_SHOWN = 10  # files that differ


def index(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status, 1 if ``--verify`` finds that a file has changed.

    Raises:
        UserError: for bad arguments, a folder that is no data set, or an index that cannot be written.
    """
    arguments = _parser().parse_args(list(argv))
    root = class_folders(arguments.root)
    begin = time.monotonic()
    splits = scan_both(root)
    with progress_bar("sizes", sum(map(len, splits))) as done:
        train = sizes_of(splits[0], done)
        sizes = train, sizes_of(splits[1], lambda count: done(len(train) + count))
    if arguments.verify:
        return _verify(root, splits, sizes)
    for remark in remarks(*splits):
        print(f"warning: {remark}")
    try:
        file = write_index(root, *splits, sizes)
    except OSError as error:
        where = " nor ".join(f"'{file}'" for file in index_files(root))
        raise UserError(
            f"the index of '{root}' can be written neither to {where} ({error.strerror}): make one of them writable, "
            "or set XDG_CACHE_HOME to a folder that is."
        ) from error
    print(
        f"'{root}': {len(splits[0])} training and {len(splits[1])} validation images of "
        f"{len(splits[0].classes)} classes, {sum(int(each.sum()) for each in sizes) / 1e9:.2f} GB"
    )
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB) in {time.monotonic() - begin:.1f} s")
    return 0


def _verify(root: Path, splits: Split, sizes: tuple[np.ndarray, np.ndarray]) -> int:
    """Compare what is there with what was indexed, by name and size."""
    listing = find_index(root)
    if listing is None or "train.sizes" not in listing.arrays:
        raise UserError(
            f"'{root}' has no index with sizes that holds: files or folders have come or gone, or there was none. "
            f"Make one with `lesam-dist index {root}`."
        )
    changed = []
    for name, now, then, own in zip(("train", "val"), splits, open_index(root, listing), sizes, strict=True):
        if now.digest != then.digest:  # the same folder times, and other names: a clock was set back
            raise UserError(
                f"'{root}' has other files in {name}/ than its index: make it anew with `lesam-dist index`."
            )
        before = listing.arrays[f"{name}.sizes"]
        differ = np.flatnonzero(before != own).tolist()
        changed += [f"{below_root(root, now.paths[i])}: {before[i]} bytes, now {own[i]}" for i in differ]
    for line in changed[:_SHOWN]:
        print(line)
    if len(changed) > _SHOWN:
        print(f"... and {len(changed) - _SHOWN} more")
    print(f"{len(changed)} of {sum(map(len, splits))} files in '{root}' have another size than when they were indexed")
    return 1 if changed else 0


def _parser() -> Parser:
    parser = Parser(
        "index",
        "List the images of ROOT/train and ROOT/val into one file, ROOT/.lesam_index.safetensors (or, "
        "where ROOT cannot be written, in ~/.cache/lesam_dist). A run then starts from it while no file has come or "
        "gone, and its processes share one copy. A run makes the index of a large data set itself; this does it "
        "beforehand.",
        "exit status: 0 done, 1 --verify found a file that has changed, 2 bad input",
    )
    parser.add_argument("root", metavar="ROOT", help="folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("--verify", action="store_true", help="compare the files' sizes with the index; write nothing")
    return parser

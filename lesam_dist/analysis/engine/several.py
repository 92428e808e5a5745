"""Several checkpoints of one model, on the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from lesam_dist.analysis.engine.subject import Subject, load
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.source import Source, build_with, read_source

_LONGEST = 100  # characters of names in a file's name
_OF_IMAGES = (
    *("root", "builtin", "skip_list", "image_size", "val_resize", "val_crop", "val_keep_aspect", "mean", "std"),
    *("label_noise.kind", "label_noise.rate", "label_noise.file", "label_noise.labels"),
)


def read_sources(
    paths: Sequence[Path], config: str | None = None, flags: Sequence[str] = (), *, averaged: bool = False
) -> list[Source]:
    """`read_source` of each path; ``config`` is of those that are files.

    Raises:
        UserError: as there; the checkpoints are of different models, or were trained on images that are not the same
            or not seen in the same way.
    """
    files = [path.is_file() for path in paths]
    sources = [
        read_source(path, config if is_file or not any(files) else None, flags, averaged=averaged)
        for path, is_file in zip(paths, files, strict=True)
    ]
    for path, source in zip(paths[1:], sources[1:], strict=True):
        _require_alike(paths[0], sources[0], path, source)
    return sources


def load_all(sources: Sequence[Source], world: Distributed, **images: Any) -> list[Subject]:
    """`load` of each source, on images that are loaded once; ``images`` are its arguments.

    Raises:
        UserError: as there; checkpoints are of different models or numbers of classes.
    """
    first = load(sources[0], world, **images)
    others = [replace(first, source=s, model=build_with(s, first.num_classes, world)) for s in sources[1:]]
    return [first, *others]


def stem_of(sources: Sequence[Source]) -> str:
    """For names of files about these checkpoints: of several with their run's names, unless they are of one run.

    Names of several end with a digest of all weights, so that no two selections share one.
    """
    if len(sources) == 1:
        return sources[0].name
    digest = hashlib.blake2b("".join(source.digest for source in sources).encode(), digest_size=4).hexdigest()
    one_run = len({source.folder.resolve() for source in sources}) == 1
    names = [source.name if one_run else f"{source.folder.resolve().name}_{source.name}" for source in sources]
    joined = "-".join(names)
    if len(joined) > _LONGEST:
        joined = f"{names[0][:_LONGEST]}+{len(names) - 1}"
    return f"{joined}-{digest}"


def _require_alike(first_path: Path, first: Source, path: Path, other: Source) -> None:
    names = ["model.name", *(f"data.{field}" for field in _OF_IMAGES)]
    if first.config.data.label_noise.rate:  # whose wrong labels are drawn from it
        names.append("seed")
    for name in names:
        here, there = (attrgetter(name)(source.config) for source in (first, other))
        if here != there:
            which = "model" if name == "model.name" else "images"
            remedy = (
                "give checkpoints of one model" if which == "model" else f"say which are meant for all with --{name}"
            )
            raise UserError(
                f"checkpoints are compared on one model and the same images, but {name} is {here!r} in '{first_path}' "
                f"and {there!r} in '{path}': {remedy}."
            )

"""Images of several domains, ROOT/DOMAIN/CLASS/IMAGE: to train on some and test on the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lesam_dist.data.folder import ImageFolder, scan_split, subfolders
from lesam_dist.data.order import DOMAIN_SPLIT_STREAM, generator_of
from lesam_dist.errors import UserError, unknown_name

LAYOUT = "ROOT/DOMAIN/CLASS/IMAGE"


def scan_domains(root: Path, skip: Collection[str] = frozenset()) -> dict[str, ImageFolder]:
    """Every domain below ``root`` by its name, sorted; each as `scan_split` lists a split.

    Args:
        root: the data set's folder.
        skip: images to leave out, as paths below ``root``.

    Raises:
        UserError: a folder is missing or empty; there are fewer than two domains, or the folders are splits; two
            domains have different classes, or there is a single class.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"the dataset folder '{root}' does not exist: pass the folder that holds one folder a domain.")
    names = subfolders(root)
    if names == ["train", "val"]:
        raise UserError(f"'{root}' holds train/ and val/, and not one folder a domain: arrange the images as {LAYOUT}.")
    if len(names) < 2:
        found = ", ".join(name + "/" for name in names) or "no folders"
        raise UserError(
            f"'{root}' holds fewer than two domains (found: {found}): arrange the images as {LAYOUT}, to train on some "
            "domains and test on the others."
        )
    domains = {name: scan_split(root, name, skip=skip) for name in names}
    first = domains[names[0]]
    for name in names[1:]:
        _require_same_classes(root, names[0], first.classes, name, domains[name].classes)
    for name, folder in domains.items():
        lost = sorted(set(range(len(folder.classes))) - set(folder.labels.tolist()))
        if lost:
            raise UserError(
                f"data.skip_list leaves out all images of the class '{folder.classes[lost[0]]}' in '{root / name}': "
                "mend some of them, or remove the class from all domains."
            )
    if len(first.classes) == 1:
        raise UserError(f"'{root / names[0]}' has a single class, '{first.classes[0]}': nothing is to be told apart.")
    return domains


def _require_same_classes(root: Path, one: str, classes: tuple[str, ...], other: str, others: tuple[str, ...]) -> None:
    name = min({*classes} ^ {*others}, default=None)
    if name is not None:
        here, there = (one, other) if name in classes else (other, one)
        raise UserError(
            f"'{root / here}' has the class '{name}', which '{root / there}' has not: every domain needs the same "
            "classes. Rename the folder, or remove the class."
        )


def choose(
    domains: Sequence[str], source: Sequence[str], target: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The domains to train on, and those to test on, which are all others where ``target`` is None.

    Raises:
        UserError: for a name that is no domain's, is there twice, or is both; and where one of them is empty.
    """
    for field, names in (("domains.source", source), ("domains.target", target)):
        if names is not None and not names:
            raise UserError(f"{field} is empty: name one of {', '.join(domains)}.")
        for name in names or ():
            if name not in domains:
                raise unknown_name(f"domain in {field}", name, domains)
            if list(names or ()).count(name) > 1:
                raise UserError(f"{field} has '{name}' twice: name each domain once.")
    both = sorted({*source} & {*(target or ())})
    if both:
        raise UserError(
            f"'{both[0]}' is in domains.source and in domains.target: a domain that is trained on tests nothing. "
            "Leave it out of one."
        )
    others = tuple(name for name in domains if name not in source)
    if target is None and not others:
        raise UserError(f"domains.source names all domains ({', '.join(source)}): leave one out, to test on it.")
    return tuple(source), others if target is None else tuple(target)


def hold_out(folder: ImageFolder, share: float, *, seed: int, number: int) -> tuple[ImageFolder, ImageFolder]:
    """A domain's images for training, and those that are held out of it, in their order.

    As DomainBed does: ``int(share * N)`` images are drawn from the whole domain, whatever their classes.

    Args:
        folder: the domain.
        share: to hold out, in [0, 1).
        seed: of the draw.
        number: of the domain, so that each has a draw of its own.
    """
    order = generator_of(DOMAIN_SPLIT_STREAM, seed=seed, index=number).permutation(len(folder))
    count = int(share * len(folder))
    held_out, rest = np.sort(order[:count]), np.sort(order[count:])
    return folder.take(rest), folder.take(held_out)


def joined(domains: Mapping[str, ImageFolder], *, marked: bool = False) -> ImageFolder:
    """All images of these domains, one domain after the other.

    Args:
        domains: of one root.
        marked: labels also tell the domain, as the remainder of a division by the number of classes tells the class:
            ``class + domain * C``, domains being numbered from 0.
    """
    folders = list(domains.values())
    step = len(folders[0].classes) if marked else 0
    return replace(
        folders[0],
        paths=tuple(path for folder in folders for path in folder.paths),
        labels=np.concatenate([folder.labels + step * i for i, folder in enumerate(folders)]),
        passed_over={},
        skipped=sum(folder.skipped for folder in folders),
        known_digest=None,
    )

"""The images of some domains: found, split, and read in batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lesam_dist.config.domain_checks import BUILTIN_DOMAINS, WHERE_FROM
from lesam_dist.config.schema import Config
from lesam_dist.data import ImageFolder
from lesam_dist.data.domains import choose, hold_out, scan_domains
from lesam_dist.data.folder import overlooked
from lesam_dist.data.opening import data_root
from lesam_dist.data.skip_list import read_skip_list
from lesam_dist.data.urls import Url
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed


@dataclass(frozen=True)
class Parts:
    """What a run does with the domains, each by its name.

    Attributes:
        train: the source domains without what is held out.
        held_out: of these; nothing where the run holds nothing out.
        targets: domains to test on.
    """

    train: dict[str, ImageFolder]
    held_out: dict[str, ImageFolder]
    targets: dict[str, ImageFolder]


def open_parts(config: Config, world: Distributed) -> Parts:
    """The domains below data.root; a built-in data set is written there first where it is missing.

    Raises:
        UserError: as `scan_domains` and `choose`; for a data root that is missing, or no folder; a source domain is too
            small to hold something out.
    """
    root = _root(config, world)
    file = config.data.skip_list
    found = scan_domains(root, read_skip_list(Path(file)) if file else frozenset())
    sources, targets = choose(list(found), config.domains.source, config.domains.target)
    train, held_out = dict[str, ImageFolder](), dict[str, ImageFolder]()
    for name in sources:
        number = list(found).index(name)
        train[name], held = hold_out(found[name], config.domains.holdout, seed=config.seed, number=number)
        if config.domains.holdout:
            if not len(held):
                raise UserError(
                    f"domains.holdout is {config.domains.holdout}, of which the {len(found[name])} images in "
                    f"'{root / name}' make none: raise it, or set it to 0."
                )
            held_out[name] = held
    if world.is_main:
        if file:
            print(f"data.skip_list leaves out {sum(each.skipped for each in found.values())} images", flush=True)
        for remark in (line for name, folder in found.items() for line in overlooked(folder, name)):
            print(f"warning: {remark}", flush=True)
    return Parts(train, held_out, {name: found[name] for name in targets})


def _root(config: Config, world: Distributed) -> Path:
    builtin = config.data.builtin
    if config.data.root is None:
        raise UserError(
            "data.root is not set: give the folder that holds DOMAIN/CLASS/IMAGE with --data.root DIR, or try the "
            f"recipe on random images with --dry_run. {WHERE_FROM}"
        )
    root = data_root(config.data.root)
    if isinstance(root, Url):
        raise UserError(f"data.root is '{root}': domains are read from a folder. Give one.")
    if builtin is not None:
        from lesam_dist.data.digit_domains import holds, prepare_digit_domains

        choose(BUILTIN_DOMAINS, config.domains.source, config.domains.target)  # before they are written
        if world.is_main and not holds(root):
            prepare_digit_domains(root)
            print(f"data.builtin {builtin}: wrote three domains of digits to data.root '{root}'", flush=True)
        world.barrier()
    return root

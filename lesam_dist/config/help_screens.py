"""`--help` of the trainer in parts: one screen of what one needs first, the fields of a section, and everything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import get_type_hints

from lesam_dist.config.explain import ALL, METHODS, RUN, sections
from lesam_dist.config.help import bounded, methods_help
from lesam_dist.config.schema import Config
from lesam_dist.errors import unknown_name

_INDENT = 27
_LONGEST = 80 - _INDENT

_FIRST = """\
usage: lesam-dist train [--config NAME_OR_FILE] [--SECTION.FIELD VALUE ...]
       torchrun --nproc-per-node N -m lesam_dist.train [the same]

Train an image classifier with LE-SAM or another method. A recipe or a file
sets what a run is, and every field of it is a flag that wins over them.

what one needs first:"""

FLAGS: Mapping[str, str] = {
    "--config NAME": "a recipe (`lesam-dist recipes`), or a YAML file",
    "--data.root DIR": "the images, DIR/train/CLASS/ and DIR/val/CLASS/",
    "--data.batch_size N": "images a step, over all processes",
    "--model.name NAME": "torchvision's, or timm/NAME; e.g. resnet18",
    "--optimizer.name NAME": "the method (`lesam-dist methods`), or sgd, adamw",
    "--optimizer.sigma X": "LE-SAM's loss budget; most others have rho",
    "--optimizer.lr X": "peak learning rate",
    "--epochs N": "passes over the training images",
    "--run_dir DIR": "where the run writes",
    "--resume auto": "go on from the last checkpoint in it, if any",
    "--dry_run": "two steps on random images, nothing is written",
    "--print_config": "print every field of the run as YAML, and end",
}
"""The flags of the first screen."""

_LAST = """
example: lesam-dist train --config digits --epochs 5 --optimizer.sigma 0.2"""


def first_screen() -> str:
    """What the command does, the flags one needs, and which sections there are."""
    lines = [_FIRST, *(bounded(f"  {flag}", text, _INDENT) for flag, text in FLAGS.items())]
    lines += ["", "all fields, by section:"]
    lines += [f"  {f'--help.{name}':{_INDENT - 2}s}{text}" for name, text in _texts().items()]
    return "\n".join([*lines, _LAST])


def screen(name: str, everything: str) -> str:
    """The help of a section, of the methods, or all of it.

    Args:
        name: what stands behind ``--help.``.
        everything: the text of the parser of all fields, with `methods_help` at its end.

    Raises:
        UserError: for a name that no section has, with the nearest one.
    """
    everything = re.sub(r"\x1b\[[\d;]*m", "", everything)  # argparse of Python 3.14 colours it on a terminal
    # A section itself takes no value, whatever jsonargparse says of it.
    everything = re.sub(r"^  --[\w.]+ CONFIG\s+Path to a configuration file\.\n", "", everything, flags=re.M)
    if name == ALL:
        return everything.rstrip("\n")
    if name == METHODS:
        return methods_help()
    if name not in _texts() and name not in sections():
        raise unknown_name("section", name, [*_texts(), *sections()])
    wanted = [name, *(other for other in sections() if other.startswith(f"{name}."))]
    blocks = [block for block in everything.split("\n\n") if _section_of(block) in wanted]
    also = f"\n\n{methods_help()}" if name == "optimizer" else ""
    return "\n\n".join(block.rstrip("\n") for block in blocks) + also


def is_help(path: str) -> bool:
    """Whether a flag asks for help: ``help``, or ``help.SECTION``."""
    return path == "help" or path.startswith("help.")


def _section_of(block: str) -> str | None:
    """The section of a block of the parser's text, by its last field: the first may be a nested section."""
    fields = re.findall(r"^  --([\w.]+)\+? ", block, re.M)
    if not fields or block.startswith("options:"):
        return None
    return ".".join(fields[-1].split(".")[:-1]) or RUN


@cache
def _texts() -> dict[str, str]:
    """What the first screen says of each section: the beginning of its class's docstring."""
    hints = get_type_hints(Config)
    texts = {name: _beginning(hints[name].__doc__ or "") for name in sections() if "." not in name}
    first = {RUN: "task, epochs, seed, run_dir, resume, profile, dry_run"}
    last = {METHODS: "arguments of each method, with ranges and defaults", ALL: "everything"}
    return first | texts | last


def _beginning(text: str) -> str:
    line = re.split(r"[:;]| \(|\.(?:\s|$)", " ".join(text.split()))[0].rstrip(".")
    while len(line) > _LONGEST:
        line = line.rpartition(", " if ", " in line else " ")[0]
    return line[0].lower() + line[1:]

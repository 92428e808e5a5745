"""The command lines that pages show, and what of this project they start."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.docs.pages import PAGES, blocks, name, prose

PROGRAMS = ("lesam-dist", "launch/torchrun.sh", "python", "torchrun", "accelerate", "srun", "make", "pip")


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command line: indented lines and blocks for a shell, without comments, variables and `...`."""
    shell = [line for block in blocks(page, "(?:sh|bash)") for line in block.split("\n")]
    text = "\n".join([prose(page), *("    " + line for line in shell)])
    for line in re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), re.M):
        command = re.match(r"(?:[A-Z_]+=\S* +)*([\w./-]+)(?= |$)", line)
        if (
            command and command[1] in PROGRAMS
        ):  # formulas are indented too, and have quotes that a shell would not close
            words = [word for word in shlex.split(line[command.start(1) :].split("  #")[0]) if word != "..."]
            yield words[: words.index(">")] if ">" in words else words


def inline(page: Path) -> Iterator[list[str]]:
    """Those that stand in its sentences."""
    found = re.findall(r"`((?:make|pip|python|torchrun) [^`]+|accelerate launch --[^`]+py)`", prose(page))
    yield from map(shlex.split, found)


def shown() -> dict[str, str]:
    """Each command line of all pages once, and the pages that show it."""
    pages: dict[str, list[str]] = {}
    for page in PAGES:
        for words in [*commands(page), *inline(page)]:
            pages.setdefault(shlex.join(words), []).append(name(page))
    return {line: ", ".join(pages) for line, pages in pages.items()}


def ours_by_page() -> dict[Path, list[list[str]]]:
    """What the pages start of `lesam-dist`, each on the first page that shows it, in the pages' order."""
    seen: set[str] = set()
    found: dict[Path, list[list[str]]] = {}
    for page in PAGES:
        for words in filter(None, map(ours, commands(page))):
            if (line := shlex.join(words)) not in seen:
                seen.add(line)
                found.setdefault(page, []).append(words)
    return found


def ours(words: list[str]) -> list[str]:
    """A command of `lesam-dist` and its arguments, whatever starts it; of a line that starts none, nothing."""
    if words[0] == "launch/torchrun.sh":
        return ["train", *words[1:]]
    for program, before in (("lesam-dist", []), ("lesam_dist", []), ("lesam_dist.train", ["train"])):
        if program in words and words[0] != "pip":
            return [*before, *words[words.index(program) + 1 :]]
    return []

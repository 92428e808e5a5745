"""The pages of the documentation, found by themselves, and what a reader sees in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("lesam_dist", "kernels", "tests", "benchmarks", "launch", "docs", "examples")
# What was written once, of the code of its day: results of benchmarks, an old checkpoint.
RECORDS = (ROOT / "benchmarks" / "results", ROOT / "tests" / "train")
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")))
    if not set(RECORDS) & set(page.parent.parents)
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)

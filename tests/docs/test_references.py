"""Links, flags, paths, names of Python and environment variables that pages speak of are there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from lesam_dist.config.explain import unknown_key
from tests.docs.pages import FOLDERS, PAGES, ROOT, name, prose


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_and_paths_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    for flag in (word for span in spans for word in re.findall(r"(?<!\S)--([a-z_]+(?:\.[a-z_\d]+)+)", span)):
        assert unknown_key([flag]) is None, f"{name(page)}: --{flag}"
    names_of_files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    for span in spans:
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]+", span):
            assert (ROOT / span).exists(), f"{name(page)}: {span}"
        elif found := re.fullmatch(r"(tests/[\w/]+\.py)::(test_\w+)", span):
            assert f"def {found[2]}(" in (ROOT / found[1]).read_text(), f"{name(page)}: {span}"
        elif re.fullmatch(r"[\w-]+\.(?:py|sh)", span):
            assert span in names_of_files, f"{name(page)}: {span}"
        elif found := re.fullmatch(r"(lesam_dist(?:\.[a-z_]+)*)((?:\.[A-Za-z_]+)?)(?:\(.*\))?", span):
            assert resolves(found[1], found[2][1:]), f"{name(page)}: {span}"


def resolves(module: str, attribute: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        parent, _, last = module.rpartition(".")
        return not attribute and hasattr(importlib.import_module(parent), last)
    return not attribute or hasattr(found, attribute)


def test_every_environment_variable_is_listed() -> None:
    """Names in capitals that the package's code holds as texts, or that the launching script expands."""
    code = "".join(path.read_text() for folder in ("lesam_dist", "kernels") for path in (ROOT / folder).rglob("*.py"))
    script = (ROOT / "launch" / "torchrun.sh").read_text()
    prefixes = "ACCELERATE|FSDP|LOCAL|MASTER|MPI|OMPI|PARALLELISM|PMI|RANK|SLURM|TORCHELASTIC|WORLD"
    read = set(re.findall(rf'"((?:{prefixes})[A-Z_]*)"', code)) | set(re.findall(r"\$\{([A-Z_]+)", script))
    read |= set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', code))
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text()))
    assert len(read) > 35
    assert read <= listed

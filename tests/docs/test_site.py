"""The site's hooks: every page is in it, links lead to pages, code stays as it is. `make docs` checks all links."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest
from mkdocs.config import load_config
from mkdocs.structure.files import Files, get_files

from tests.docs.pages import PAGES, ROOT, name


@pytest.fixture(scope="module")
def hooks() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "site" / "hooks.py"))


def test_every_page_is_in_the_site() -> None:
    """Under its own path, whose relative links then lead where they do in the repository; so is what they link to."""
    config = load_config(str(ROOT / "mkdocs.yml"))
    files: Files = config.plugins.on_files(get_files(config), config=config)
    assert {name(page) for page in PAGES} <= set(files.src_uris)
    assert {"examples/ddp.py.md", "docs/figures/budget.svg"} <= set(files.src_uris)
    assert not [uri for uri in files.src_uris if uri.endswith(".py")]
    by_name = {file.src_uri: file for file in files}
    assert by_name["README.md"].url in ("", "./")
    assert by_name["kernels/README.md"].abs_src_path == str(ROOT / "kernels" / "README.md")


def test_links_and_tables_change_and_code_does_not(hooks: dict[str, Any]) -> None:
    fence = "```python\n[a](b.py) | `c\\|d`\n```\n"
    page = f"[a](b.py#L1), [c](d.md#e), [f](g.svg), [h](https://i.py)\n\n{fence}| `c\\|d` | e\\|f |\n"
    changed = "".join(hooks["_rewritten"](part) if prose else part for prose, part in hooks["_split"](page))
    assert changed == page.replace("(b.py#L1)", "(b.py.md#L1)").replace("| `c\\|d` | e", "| `c|d` | e")


def test_a_source_file_ends_no_fence_of_its_page(hooks: dict[str, Any]) -> None:
    page = hooks["_source_page"]("tests/docs/test_site.py")  # this file has fences
    opening = re.search(r"^(`{4,})python$", page, re.M)
    assert opening
    assert page.count(opening[1]) == 2

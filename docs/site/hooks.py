"""MkDocs hooks: the repository's own Markdown files, where they are, as one site.

MkDocs takes one folder, and this project's pages lie beside what they describe (kernels/README.md, launch/README.md).
So a page's place in the site is its path in the repository, which makes relative links lead to the same files on a
code host, in an editor and here; no page is copied, and none is written for the site alone. The plugins that bring in
pages from elsewhere (include-markdown, monorepo) want a page or a config for each, and none shows source files.

- What pages link to becomes part of the site, and what that links to in turn: other pages, pictures, and source
  files, each as a page of its own.
- The entries of docs/reference.md become the docstrings of what they name (mkdocstrings).
- Bars in a table's code have a backslash on code hosts, which would be shown here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
AS_THEY_ARE = (".md", ".png", ".svg", ".css")
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}
LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)\s#]+)((?:#[^)\s]*)?)(?=\))")
REFERENCE = "docs/reference.md"
ENTRY = re.compile(r"^- \[`([\w.]+)`\]\((\S+)\): .*$", re.M)
WITH_MEMBERS = ("lesam_dist.CosineBudget", "lesam_dist.SharpnessAware", "lesam_dist.optim.engine.rule.Rule")
FENCE = re.compile(r"^(`{3,}).*?^\1`*\s*?$", re.M | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of docs/, those that the navigation names, and all that these lead to."""
    pages = {f"docs/{file.src_uri}" for file in files.documentation_pages()}
    named = set(re.findall(r"[\w./-]+\.md", str(config.nav)))
    found = Files([file for file in files if file.src_dir != config.docs_dir])  # the theme's
    waiting, seen = [*sorted(pages | named), *config.extra_css], set[str]()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():  # MkDocs says what is missing, and where it is linked
            continue
        seen.add(path)
        found.append(_file(path, config, InclusionLevel.UNDEFINED if path in pages else InclusionLevel.NOT_IN_NAV))
        if path.endswith(".md"):
            waiting += _targets(path)
    return found


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to source files lead to their pages; tables' code has bars without a backslash; entries are docstrings."""
    if page.file.src_uri == REFERENCE:
        markdown = ENTRY.sub(_docstring, markdown)
    parts = [_rewritten(part) if prose else part for prose, part in _split(markdown)]
    return "".join(parts)


def _file(path: str, config: MkDocsConfig, inclusion: InclusionLevel) -> File:
    if path.endswith(AS_THEY_ARE):
        return File.generated(config, path, abs_src_path=str(ROOT / path), inclusion=inclusion)
    return File.generated(config, path + ".md", content=_source_page(path), inclusion=InclusionLevel.NOT_IN_NAV)


def _source_page(path: str) -> str:
    """A source file in a fence that is longer than any within, and not found by the site's search."""
    text = (ROOT / path).read_text()
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall(r"`+", text)), 3)
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _targets(path: str) -> list[str]:
    """The files of the repository that a page links to, as paths in it."""
    prose = "".join(part for is_prose, part in _split((ROOT / path).read_text()) if is_prose)
    folder = os.path.dirname(path)
    return [os.path.normpath(os.path.join(folder, target)) for target, _ in LINK.findall(prose)]


def _split(markdown: str) -> Iterator[tuple[bool, str]]:
    """The text in order: (True, prose) and (False, fenced code)."""
    end = 0
    for fence in FENCE.finditer(markdown):
        yield True, markdown[end : fence.start()]
        yield False, fence[0]
        end = fence.end()
    yield True, markdown[end:]


def _rewritten(prose: str) -> str:
    prose = LINK.sub(lambda link: _to_page(link[1]) + link[2], prose)
    return re.sub(
        r"^\|.*", lambda row: re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row[0]), prose, flags=re.M
    )


def _docstring(entry: re.Match[str]) -> str:
    """What mkdocstrings reads, by the name's own file. A method has the options and steps of all: its class alone."""
    name, file = entry[1], entry[2].removeprefix("../")
    module = file.removesuffix(".py").replace("/", ".")
    bare = file.startswith("lesam_dist/optim/") and name not in WITH_MEMBERS
    options = f"heading: {name}, toc_label: {name.rpartition('.')[2]}, members: {'false' if bare else 'null'}"
    if name == "lesam_dist.SharpnessAware":
        options += ", inherited_members: [restore]"
    return f"::: {module}.{name.rpartition('.')[2]}\n    options: {{{options}}}\n\nIn [{file}]({entry[2]}).\n"


def _to_page(target: str) -> str:
    return target if target.endswith(AS_THEY_ARE) else target + ".md"

"""Writes the tables and formulas of methods.md from what each method says of itself: python docs/render_methods.py"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from lesam_dist.optim.engine.registry import Method, methods

PAGE = Path(__file__).with_name("methods.md")


def shipped() -> list[Method]:
    """The methods of this project; LE-SAM and SAM, of which the others speak, come first."""
    found = [method for method in methods().values() if method.module.startswith("lesam_dist.")]
    return sorted(found, key=lambda method: (method.name not in ("lesam", "sam"), method.name))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(words: str) -> str:
    """A docstring's words inside a table: Markdown's code marks, and bars that end no cell."""
    return words.replace("``", "`").replace("|", r"\|")


def formula(method: Method) -> str:
    """What the method's file opens with, which is Markdown but for reStructuredText's code marks."""
    opening = inspect.getdoc(import_module(method.module)) or ""
    return f"### {method.class_name}\n\n{opening.replace('``', '`')}\n"


def render(page: str) -> str:
    """The page with its tables and formulas as they should be."""
    found = shipped()
    about = [
        (f"`{m.class_name}`", f"`{m.name}`", text(m.registration.along), m.registration.passes, m.registration.keeps)
        for m in found
    ]
    arguments = [
        (f"`{m.name}`", f"`{a.name}`", f"`{a.default}`", text(a.text)) for m in found for a in m.arguments.values()
    ]
    tables = {
        "methods": table(("class", "in a config", "perturbs along", "passes a step", "keeps, besides the copy"), about),
        "arguments": table(("method", "argument", "default", "meaning"), arguments),
        "formulas": "\n".join(map(formula, found)),
    }
    for name, lines in tables.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page, count = between.subn(lambda match, lines=lines: f"{match[1]}{lines}\n{match[2]}", page)
        if count != 1:
            raise ValueError(f"{PAGE.name} has {count} places for the table '{name}'; there must be one.")
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))

"""A report as a test reads it: its tables and charts by name, by the standard library's parser of HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """Tables, charts and texts of a report.

    Attributes:
        tables: of each, its rows of cells, the header first.
        charts: what plotly.js is given, by title.
        tags: of all elements, in order.
        paragraphs: text of each p, li, h1 and code.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.charts: dict[str, Any] = {}
        self.tags: list[str] = []
        self.paragraphs: list[str] = []
        self._title, self._text, self._is_json = "", "", False
        self.feed(path.read_text(encoding="utf-8"))

    @property
    def text(self) -> str:
        """All paragraphs, with plain spaces."""
        return "\n".join(self.paragraphs).replace("\N{NO-BREAK SPACE}", " ")

    def table(self, *header: str) -> dict[str, dict[str, str]]:
        """The rows of the first table whose header begins so: by first cell, then by column."""
        found = next(rows for rows in self.tables if tuple(rows[0][: len(header)]) == header)
        return {row[0]: dict(zip(found[0], row, strict=True)) for row in found[1:]}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th", "figcaption", "p", "li", "h1", "code", "script"):
            self._text = ""
        if tag == "a" and ("class", "save") in attrs:
            self._title = self._text.strip()
        self._is_json = tag == "script" and ("type", "application/json") in attrs

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._text.replace("\N{NO-BREAK SPACE}", " "))
        if tag in ("p", "li", "h1", "code"):
            self.paragraphs.append(self._text)
        if tag == "script" and self._is_json:
            self.charts[self._title] = json.loads(self._text)

    def handle_data(self, data: str) -> None:
        self._text += data

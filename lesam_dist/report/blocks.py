"""What a page is made of: sections of texts, tables and charts, which know nothing of HTML, matplotlib or plotly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Values = Sequence[float | None]
"""Numbers of a log or a document, which have None in place of what is not finite."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which colour-blind readers can tell apart, on white and on black."""
DASHES = ("solid", "dash", "dot")
_POWERS = 5  # of ten, up to which 2 and 5 are marked too


@dataclass(frozen=True)
class Style:
    """How a group of runs looks in every chart."""

    colour: str
    dash: str = "solid"

    @classmethod
    def of(cls, index: int) -> Style:
        """Of the n-th group: another colour, and another dash once the colours are used up."""
        return cls(PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)])


@dataclass(frozen=True)
class Line:
    """A curve with a band.

    Attributes:
        name: for the legend.
        x, y: of the same length.
        style: of its group.
        low, high: of the band; both or none.
        about: one text for each point, shown beside it when a reader points at it.
        marks: show the points themselves.
    """

    name: str
    x: Sequence[float]
    y: Values
    style: Style
    low: Values | None = None
    high: Values | None = None
    about: Sequence[str] | None = None
    marks: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        key: of letters, digits and dashes; another for each chart of a page, and the name of its file.
        title, x, y: texts.
        lines: in the order of the legend.
        note: what bands and points are.
        log_x, log_y: logarithmic axes.
        integer_x: ticks at whole numbers alone.
    """

    key: str
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    integer_x: bool = False

    @property
    def x_ticks(self) -> list[float]:
        """All places of a logarithmic axis, of which there are few; nothing for another, which needs no help."""
        return sorted({place for line in self.lines for place in line.x}) if self.log_x else []

    @property
    def y_ticks(self) -> list[float]:
        """1, 2 and 5 of each power of ten that a logarithmic axis has; nothing where these are too many."""
        known = [y for line in self.lines for y in (*line.y, *(line.high or ())) if y is not None and y > 0]
        if not self.log_y or not known:
            return []
        powers = range(math.floor(math.log10(min(known))), math.ceil(math.log10(max(known))) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        return [tick for tick in ticks if min(known) / 2 < tick < 2 * max(known)] if len(powers) <= _POWERS else []

    @property
    def alt(self) -> str:
        """What a reader who does not see it should know: what is drawn, and where each curve ends."""
        ends = [f"{line.name}: {_end(line)}" for line in self.lines]
        return f"{self.title}: {self.y} over {self.x}. {'; '.join(ends)}."


@dataclass(frozen=True)
class Plane:
    """A surface over two directions.

    Attributes:
        key, title, note: as of a `Chart`.
        places: along each direction.
        values: by second direction, then by first one; None where not finite.
        low, high: of the colours, equal for planes that belong together.
        log: colours by the logarithm.
    """

    key: str
    title: str
    places: Sequence[float]
    values: Sequence[Values]
    low: float
    high: float
    log: bool
    note: str = ""

    @property
    def alt(self) -> str:
        """Its lowest and highest value."""
        known = [value for row in self.values for value in row if value is not None]
        what = f"{min(known):.4g} to {max(known):.4g}" if known else "nowhere finite"
        return f"{self.title}: the loss on a plane through the weights, {what}."


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row.

    Attributes:
        header: of the columns.
        rows: of as many cells.
        note: what the numbers are.
        styles: one for each row, whose name is marked in that colour; empty for none.
        kind: of the cells: "numbers", to be set to the right; "words"; or "values", several in a cell, one a line.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    styles: Sequence[Style] = ()
    kind: str = "numbers"


@dataclass(frozen=True)
class Text:
    """A paragraph; ``kind``: "plain", "note" of what numbers and bands are, or "code" for a command."""

    text: str
    kind: str = "plain"


Block = Chart | Plane | Table | Text


@dataclass(frozen=True)
class Section:
    """A part of the page; ``key`` is where links lead."""

    key: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def sentence(text: str) -> str:
    """With a capital letter in front, the others as they are."""
    return text[:1].upper() + text[1:]


def _end(line: Line) -> str:
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and math.isfinite(y)]
    if not known:
        return "no finite value"
    x, y = known[-1]
    return f"{y:.4g} at {x:.4g}"

"""Show plots outside of a report's page: one SVG that holds its own colours and legend, which Jupyter displays."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType

WIDTH, GAP = 800, 8  # the plots of a row share the width
LINE, BASELINE, MARGIN = 24, 17, 8  # of the title and the legend
PATCH, LETTER = 11, 6.6  # the size of a legend's patch, the width of a letter
STYLE = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("colours.css", "marks.css"))
SIZE = re.compile(r'viewBox="0 0 (\d+) (\d+)"')


class Picture:
    """Plots side by side, as many in a row as fit, under a title and a legend.

    plots: <svg> elements as `svg.element` makes them. legend: the class of each colour, by label.
    """

    def __init__(self, *plots: str, title: str = "", legend: Mapping[str, str] = MappingProxyType({})) -> None:
        self.plots, self.title, self.legend = plots, title, legend

    def __repr__(self) -> str:
        return f"<{len(self.plots)} plots>"

    def svg(self) -> str:
        """The picture as one <svg> element that needs no style sheet."""
        parts, width, top = [], 0, 0
        if self.title:
            parts.append(f'<text class="title" x="{MARGIN}" y="{BASELINE}">{escape(self.title)}</text>')
            top += LINE
        if self.legend:
            parts.append(_patches(self.legend, top))
            top += LINE
        for row in _rows(self.plots):
            left = 0
            for plot, (wide, high) in row:
                parts.append(f'<svg x="{left}" y="{top}" width="{wide}" height="{high}">{plot}</svg>')
                left += wide + GAP
            width = max(width, left - GAP)
            top += max(high for _, (_, high) in row) + GAP
        height = top - GAP if self.plots else top
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'font-family="system-ui, sans-serif"><style>{STYLE}</style>'
            f'<rect class="card" width="{width}" height="{height}"/>{"".join(parts)}</svg>'
        )

    def _repr_svg_(self) -> str:
        """The picture for Jupyter, which looks for this name."""
        return self.svg()


def _rows(plots: Sequence[str]) -> Iterator[list[tuple[str, tuple[int, int]]]]:
    """Yield rows of plots with their sizes, each as long as fits into `WIDTH`."""
    row: list[tuple[str, tuple[int, int]]] = []
    for plot in plots:
        found = SIZE.search(plot)
        assert found, "an <svg> of `svg.element` has a viewBox"
        size = int(found[1]), int(found[2])
        if row and sum(wide + GAP for _, (wide, _) in row) + size[0] > WIDTH:
            yield row
            row = []
        row.append((plot, size))
    if row:
        yield row


def _patches(legend: Mapping[str, str], top: int) -> str:
    """The legend: a coloured patch before each label."""
    parts, left = [], float(MARGIN)
    for label, css in legend.items():
        text = left + PATCH + 5
        square = f'x="{left:.1f}" y="{top + BASELINE - 9}" width="{PATCH}" height="{PATCH}"'
        parts.append(f'<rect class="patch {css}" {square} rx="3"/>')
        parts.append(f'<text class="label" x="{text:.1f}" y="{top + BASELINE}">{escape(label)}</text>')
        left = text + LETTER * len(label) + 14
    return "".join(parts)

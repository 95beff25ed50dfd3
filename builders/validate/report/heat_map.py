"""Draw heat maps over the layers of a model: a row for each name, a column for each layer.

A colour is one of the classes h0 .. h7 of marks.css, from bad to good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from builders.validate.report.svg import RIGHT, element, layer_axis

WIDE, ROW, LEFT, TOP = 800, 24, 72, 8
NUMBERED = 20  # with at most so many layers, the cells show their values


@dataclass(frozen=True)
class Cell:
    """One cell. value: the text inside it, where there is room. title: the text that hovering shows. framed: whether it
    has a frame, which stands out."""

    row: str
    layer: int
    colour: int
    value: str
    title: str
    framed: bool = False


def heat_map(cells: Sequence[Cell], layers: int, name: str) -> str:
    """The map as an <svg> element, with the rows in the order in which cells name them. name: for screen readers."""
    rows = list(dict.fromkeys(cell.row for cell in cells))
    width = (WIDE - LEFT - RIGHT) / layers
    parts = []
    for cell in sorted(cells, key=lambda cell: cell.framed):  # frames lie above their neighbours
        x, y = LEFT + cell.layer * width, TOP + rows.index(cell.row) * ROW
        css = f"cell h{cell.colour}" + (" framed" if cell.framed else "")
        parts.append(
            f'<g class="{css}"><rect x="{x:.1f}" y="{y}" width="{width:.2f}" height="{ROW}"/>'
            f"<title>{escape(cell.title)}</title>"
        )
        if layers <= NUMBERED:
            parts.append(f'<text x="{x + width / 2:.1f}" y="{y + 16}" text-anchor="middle">{escape(cell.value)}</text>')
        parts.append("</g>")
    for number, row in enumerate(rows):
        y = TOP + number * ROW + 16
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y}" text-anchor="end">{escape(row)}</text>')
    bottom = TOP + len(rows) * ROW
    for value, label in layer_axis(layers).ticks():
        x = LEFT + (value + 0.5) * width
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="label" x="{WIDE / 2}" y="{bottom + 32}" text-anchor="middle">layer</text>')
    return element(WIDE, bottom + 38, "".join(parts), name)

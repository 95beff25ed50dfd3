"""Draw small plots as SVG text: axes with round ticks, lines, bands, bars and dots.

Nothing is coloured here. Marks have the classes s0, s1, ... (series), `before` and `after`, which marks.css colours for
light and for dark screens. Hovering shows the <title> of a mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 40
SERIES = 8  # colours of series: s0 .. s7, then again

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """An axis from low to high, on a linear or a logarithmic scale. whole: whether ticks are whole numbers only."""

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def place(self, value: float) -> float:
        """The place of a value on the axis: 0 at low, 1 at high, clipped to that range."""
        if self.log:
            value = max(value, self.low)
            return min(math.log(value / self.low) / math.log(self.high / self.low), 1.0)
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """The ticks: round values in range, with their labels."""
        return self._decades() if self.log else self._steps()

    def _decades(self) -> list[tuple[float, str]]:
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        stride = max(1, math.ceil((last - first) / 6))
        factors = (1, 2, 5) if last - first < 2 else (1,)
        values = [factor * 10.0**power for power in range(first - 1, last + 1, stride) for factor in factors]
        return [(value, power_label(value)) for value in values if self.low * 0.999 <= value <= self.high * 1.001]

    def _steps(self) -> list[tuple[float, str]]:
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        if self.whole:
            step = max(1.0, round(step))
        first = math.ceil(self.low / step - 1e-9)
        return [(n * step, f"{n * step:.6g}") for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def log_axis(label: str, values: Sequence[float], floor: float = 1e-12) -> Axis:
    """A logarithmic axis around positive values. A value below `floor` counts as `floor`."""
    known = [max(value, floor) for value in values] or [0.1, 1.0]
    return Axis(label, min(known) / 1.3, max(known) * 1.3, log=True)


def linear_axis(label: str, values: Sequence[float]) -> Axis:
    """A linear axis around values, with a small margin."""
    low, high = min(values), max(values)
    margin = (high - low or abs(high) or 1.0) * 0.04
    return Axis(label, low - margin, high + margin)


def layer_axis(layers: int) -> Axis:
    """An axis of layer numbers."""
    return Axis("layer", -0.5, layers - 0.5, whole=True)


def power_label(value: float) -> str:
    """The label of a power of ten: 1000 and 0.01 in full, 1e-5 with its exponent."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def series(labels: Iterable[str]) -> dict[str, str]:
    """The class of each series, s0, s1, ..., by label."""
    return {label: f"s{number % SERIES}" for number, label in enumerate(labels)}


class Panel:
    """One plot with a title and two axes. Draw with the methods, then take `svg`."""

    def __init__(self, title: str, x: Axis, y: Axis, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.title, self.x, self.y, self.width, self.height = title, x, y, width, height
        self._marks: list[str] = []

    def line(self, points: Sequence[Point], css: str, title: str = "", dots: bool = False) -> None:
        """Draw a line through points. dots: whether each point has a dot."""
        self._add(f'<path class="line {css}" d="{self._path(points)}">{_title(title)}</path>')
        if dots:
            for x, y in points:
                self._add(f'<circle class="dot {css}" cx="{self._x(x)}" cy="{self._y(y)}" r="2.5"/>')

    def ring(self, point: Point, css: str, title: str) -> None:
        """Draw a ring around a point that stands out."""
        x, y = self._x(point[0]), self._y(point[1])
        self._add(f'<circle class="ring {css}" cx="{x}" cy="{y}" r="5">{_title(title)}</circle>')

    def level(self, height: float, css: str, note: str, title: str = "", left: bool = False) -> None:
        """Draw a dashed line across the plot, with a note above its right or its left end."""
        self.line([(self.x.low, height), (self.x.high, height)], f"{css} thin", title)
        x, anchor = (LEFT + 3, "start") if left else (self.width - RIGHT, "end")
        y = self._y(height) - 3
        self._add(f'<text class="note {css}" x="{x}" y="{y:.1f}" text-anchor="{anchor}">{escape(note)}</text>')

    def band(self, lower: Sequence[Point], upper: Sequence[Point], css: str) -> None:
        """Draw the area between two lines."""
        self._add(f'<path class="band {css}" d="{self._path([*upper, *reversed(lower)])}Z"/>')

    def bars(self, heights: Sequence[float], css: str) -> None:
        """Draw thin bars from the bottom, at x = 0, 1, 2, ..."""
        bottom = self._y(self.y.low)
        path = "".join(f"M{self._x(n)} {bottom}V{self._y(height)}" for n, height in enumerate(heights))
        width = max(1.0, 0.8 * (self.width - LEFT - RIGHT) / max(len(heights), 1))
        self._add(f'<path class="bars {css}" stroke-width="{width:.2f}" d="{path}"/>')

    def steps(self, edges: Sequence[float], heights: Sequence[float], css: str, title: str = "") -> None:
        """Draw the outline of a histogram, filled faintly."""
        points = [point for (a, b), h in zip(pairwise(edges), heights, strict=True) for point in ((a, h), (b, h))]
        points = [(edges[0], self.y.low), *points, (edges[-1], self.y.low)]
        self._add(f'<path class="steps {css}" d="{self._path(points)}">{_title(title)}</path>')

    def cloud(self, points: Sequence[Point], css: str) -> None:
        """Draw many dots."""
        path = "".join(f"M{self._x(x)} {self._y(y)}h0" for x, y in points)
        self._add(f'<path class="cloud {css}" d="{path}"/>')

    def svg(self) -> str:
        """The plot as an <svg> element."""
        frame = [f'<text class="title" x="{LEFT}" y="18">{escape(self.title)}</text>']
        right, bottom = self.width - RIGHT, self.height - BOTTOM
        for value, label in self.y.ticks():
            y = self._y(value)
            frame.append(f'<path class="grid" d="M{LEFT} {y}H{right}"/>')
            frame.append(
                f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{escape(label)}</text>'
            )
        for value, label in self.x.ticks():
            x = self._x(value)
            frame.append(f'<path class="grid" d="M{x} {bottom}v4"/>')
            frame.append(f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>')
        middle = (LEFT + right) / 2
        frame.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
        frame.append(
            f'<text class="label" x="{middle}" y="{self.height - 6}" text-anchor="middle">{escape(self.x.label)}</text>'
        )
        y = (TOP + bottom) / 2
        frame.append(
            f'<text class="label" x="12" y="{y}" text-anchor="middle" transform="rotate(-90 12 {y})">'
            f"{escape(self.y.label)}</text>"
        )
        return element(self.width, self.height, "".join(frame + self._marks), self.title)

    def _add(self, mark: str) -> None:
        self._marks.append(mark)

    def _x(self, value: float) -> float:
        return round(LEFT + self.x.place(value) * (self.width - LEFT - RIGHT), 1)

    def _y(self, value: float) -> float:
        return round(self.height - BOTTOM - self.y.place(value) * (self.height - TOP - BOTTOM), 1)

    def _path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self._x(x)} {self._y(y)}" for x, y in points)


def element(width: int, height: int, content: str, name: str) -> str:
    """An <svg> that scales with its container. name: the text that screen readers read out."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">{content}</svg>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""

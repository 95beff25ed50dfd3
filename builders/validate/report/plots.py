"""The plots of reports and of the notebook, most of them made from validations.

activation_ranges   the largest and the median channel of each input by layer, before and after smoothing
channels            every channel of one input, before and after smoothing
curve               an error against a setting that was tried, such as alpha, a line for each way
sqnr_map            the SQNR of every linear: a row for each role, a column for each layer
hidden_errors       the error of the hidden state along the layers, a line for each engine
kl_histogram        the number of tokens by KL to the reference, a line for each engine
scatter             engine logit over reference logit
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from builders.validate.ranges import Channels
from builders.validate.report.heat_map import Cell, heat_map
from builders.validate.report.svg import Axis, Panel, Point, layer_axis, linear_axis, log_axis, series
from builders.validate.validation import Validation

BINS = (5, 10, 15, 20, 25, 30, 35)  # dB: edges of the map's colours h0 .. h7, shared by all maps
DOTTED = 40  # with at most so many layers, lines have dots


def activation_ranges(validation: Validation) -> list[str]:
    """One panel for each input ("q, k, v", "o", ...), all with the same y axis."""
    values = [
        value
        for found in validation.ranges
        for value in (found.before_max, found.before_median, found.after_max, found.after_median)
    ]
    y = log_axis("max |activation| of a channel", values, floor=1e-4)
    inputs = dict.fromkeys(found.roles for found in validation.ranges)
    layers = max(found.layer for found in validation.ranges) + 1
    panels = []
    for roles in inputs:
        panel = Panel(f"input of {', '.join(roles)}", layer_axis(layers), y)
        mine = [found for found in validation.ranges if found.roles == roles]
        for css in ("before", "after"):
            largest = [(found.layer, getattr(found, f"{css}_max")) for found in mine]
            median = [(found.layer, getattr(found, f"{css}_median")) for found in mine]
            panel.band(median, largest, css)
            panel.line(median, f"{css} thin", f"median channel, {css} smoothing")
            panel.line(largest, css, f"largest channel, {css} smoothing", dots=layers <= DOTTED)
        panels.append(panel.svg())
    return panels


def channels(found: Channels) -> list[str]:
    """Two panels with the same y axis: before and after smoothing."""
    y = log_axis("max |activation|", [value for value in (*found.before, *found.after) if value > 0], floor=1e-4)
    where = f"layer {found.layer}, input of {', '.join(found.roles)}"
    panels = []
    for css, heights in (("before", found.before), ("after", found.after)):
        label = "channel" if found.count == len(heights) else f"{found.count} channels in {len(heights)} bins"
        x = Axis(label, -0.5, len(heights) - 0.5, whole=True)
        panel = Panel(f"{css} smoothing: {where}", x, y)
        panel.bars(heights, css)
        panels.append(panel.svg())
    return panels


def curve(
    points: Mapping[str, Sequence[Point]],
    levels: Mapping[str, float] = MappingProxyType({}),
    *,
    chosen: Mapping[str, float] = MappingProxyType({}),
    title: str = "error by alpha",
    x_label: str = "alpha",
    y_label: str = "KL to the float model, nats",
) -> str:
    """A plot of an error against a setting, with a line for each series and a ring around its smallest error, or around
    the setting that was chosen.

    points: for each series the pairs (setting, error), in any order; series are coloured in this order
        (`svg.series`). levels: for some series the error without the setting, drawn as a dashed line that says "none".
    chosen: for some series the setting to ring; the nearest point has it.
    Raises ValueError for a series without points, for a level of no series, and for numbers that are not finite.
    """
    tried = {label: sorted(found) for label, found in points.items()}
    errors = [error for found in tried.values() for _, error in found] + list(levels.values())
    settings = [setting for found in tried.values() for setting, _ in found]
    if not tried or not all(tried.values()) or not levels.keys() <= tried.keys():
        raise ValueError("a curve needs points for every series, and levels of these series alone")
    if not all(map(math.isfinite, errors + settings)):
        raise ValueError("a curve needs finite numbers")
    y = log_axis(y_label, errors, floor=1e-9)
    panel = Panel(title, linear_axis(x_label, settings), y)
    for label, css in series(tried).items():
        if label in levels:
            beside = [_nearest(y, levels[label], [found[end][1] for found in tried.values()]) for end in (0, -1)]
            told = f"{label}, none: {levels[label]:.3g}"
            panel.level(levels[label], css, "none", told, left=beside[0] > beside[1])
        panel.line(tried[label], css, label, dots=True)
        if label in chosen:
            why, ringed = "chosen", min(tried[label], key=lambda point: abs(point[0] - chosen[label]))
        else:
            why, ringed = "least", min(tried[label], key=lambda point: point[1])
        panel.ring(ringed, css, f"{label}, {why} at {ringed[0]:g}: {ringed[1]:.3g}")
    return panel.svg()


def _nearest(y: Axis, height: float, heights: Sequence[float]) -> float:
    """The distance on an axis between a height and the nearest of others."""
    return min(abs(y.place(height) - y.place(other)) for other in heights)


def bounds() -> dict[str, str]:
    """The legend of `sqnr_map`: the class of each colour, by the SQNR in dB that it stands for."""
    labels = [f"< {BINS[0]}", *(f"{edge}+" for edge in BINS)]
    return {label: f"h{number}" for number, label in enumerate(labels)}


def sqnr_map(validation: Validation) -> str:
    """A heat map; every cell's <title> names its linear and value."""
    cells = [
        Cell(
            linear.role,
            linear.layer,
            sum(linear.sqnr >= edge for edge in BINS),
            f"{linear.sqnr:.1f}",
            f"{linear.name}: {linear.sqnr:.1f} dB",
        )
        for linear in validation.linears
    ]
    layers = max(linear.layer for linear in validation.linears) + 1
    return heat_map(cells, layers, f"SQNR of every linear, {validation.label}")


def hidden_errors(validations: Sequence[Validation], colours: dict[str, str]) -> str:
    """A plot of the error of the hidden states by layer, with a line for each quantized engine."""
    shown = [found for found in validations if found.hidden_errors]
    layers = max(len(found.hidden_errors) for found in shown)
    y = log_axis("relative error", [error for found in shown for error in found.hidden_errors], floor=1e-9)
    panel = Panel("hidden state after each layer, W8A8 path", layer_axis(layers), y)
    for found in shown:
        panel.line(list(enumerate(found.hidden_errors)), colours[found.label], found.label, dots=layers <= DOTTED)
    return panel.svg()


def kl_histogram(validations: Sequence[Validation], colours: dict[str, str]) -> str:
    """A histogram of the tokens by KL, with the engines' outlines over each other."""
    filled = [n for found in validations for n, count in enumerate(found.samples.histogram) if count]
    first, last = min(filled), max(filled) + 1
    edges = validations[0].samples.edges[first : last + 1]
    shares = {
        found.label: [100 * count / sum(found.samples.histogram) for count in found.samples.histogram[first:last]]
        for found in validations
    }
    highest = max(max(share) for share in shares.values())
    x = Axis("KL(reference || engine), nats", edges[0], edges[-1], log=True)
    panel = Panel("KL of each token", x, Axis("% of tokens", 0, highest * 1.05))
    for label, share in shares.items():
        panel.steps(edges, share, colours[label], label)
    return panel.svg()


def scatter(validation: Validation, css: str) -> str:
    """A plot of some logits, with the diagonal on which they should lie."""
    points = validation.samples.points
    values = [value for point in points for value in point]
    x, y = linear_axis("reference logit", values), linear_axis("engine logit", values)
    panel = Panel(validation.label, x, y)
    panel.line([(x.low, y.low), (x.high, y.high)], "diagonal")
    panel.cloud(points, css)
    return panel.svg()

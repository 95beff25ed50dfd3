"""The plots of a plan's page.

size_curve    KL by the bytes of linears in float, the chosen point ringed
noise         by layer, the noise of a kind of smoothing group: unsmoothed, by its best alpha, by what was chosen
candidates    a heat map of a kind: a row for each candidate, a column for each layer
roundings     by layer, the error of a kind of linear: a line for each rounding
spikes        by layer, the spike ratio of every input: a line for each kind
losses        by layer, what every input's linears in INT8 cost for each MB

Where a layer has several groups of a kind, as for experts, their mean is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean

from builders.validate.report.heat_map import Cell, heat_map
from builders.validate.report.plan_view import PlannedInput, PlanView, candidate_words
from builders.validate.report.plots import DOTTED, curve
from builders.validate.report.svg import Axis, Panel, Point, layer_axis, log_axis, series
from smoothquant.artifacts.plan import BALANCED, NONE, GroupChoice, LinearChoice

TIMES = (32, 8, 4, 2, 1.5, 1.2, 1.05)  # the least noise: edges of the map's colours h0 .. h7
UNSMOOTHED, ALPHA, TAKEN = "no smoothing", "its best alpha", "chosen"
NOISE = {UNSMOOTHED: "before", ALPHA: "s7", TAKEN: "after"}
FLOOR = 1e-12  # noises and errors below count as this
RINGED = 3  # inputs with the largest spikes


def size_curve(view: PlanView) -> str:
    """The plot of the KL by the bytes of linears in float."""
    label = view.facts.chosen
    return curve(
        {label: [(100 * one.share, one.kl) for one in view.facts.curve]},
        chosen={label: 100 * view.taken.share},
        title="KL by size",
        x_label="bytes of linears in float, % of all in INT8",
    )


def noise(view: PlanView, kind: str) -> str:
    """The plot of a kind's noise."""
    every = [value for name in view.groups for one in view.groups[name] for value in one.tried.values()]
    panel = Panel(f"input of {kind}", layer_axis(view.layers), log_axis("noise over signal", every, FLOOR))
    for label, points in _noises(view.groups[kind]).items():
        thin = " thin" if label == ALPHA else ""
        panel.line(points, NOISE[label] + thin, label, dots=view.layers <= DOTTED and not thin)
    return panel.svg()


def noise_legend(view: PlanView) -> dict[str, str]:
    """The colours of the lines that `noise` draws, by what they show."""
    drawn = {label for groups in view.groups.values() for label in _noises(groups)}
    return {label: css for label, css in NOISE.items() if label in drawn}


def _noises(groups: Sequence[GroupChoice]) -> dict[str, list[Point]]:
    """The lines of a kind, by what they show, without those of what was not tried."""
    values = {
        UNSMOOTHED: [(one.layer, one.tried.get(NONE)) for one in groups],
        ALPHA: [(one.layer, _best_alpha(one)) for one in groups if len(one.tried) > 1],
        TAKEN: [(one.layer, one.tried.get(one.chosen)) for one in groups],
    }
    return {label: points for label, found in values.items() if (points := _by_layer(found))}


def bounds() -> dict[str, str]:
    """The legend of `candidates`: the class of each colour, by how many times the least noise it stands for."""
    labels = [f"{TIMES[0]}+ times", *(f"{edge}+" for edge in TIMES[1:]), "least"]
    return {label: f"h{number}" for number, label in enumerate(labels)}


def candidates(view: PlanView, kind: str) -> str | None:
    """The heat map of a kind; None where every group had one candidate alone."""
    groups = view.groups[kind]
    if all(len(one.tried) < 2 for one in groups):
        return None
    return heat_map(list(_cells(groups)), view.layers, f"noise of every candidate, input of {kind}")


def roundings(view: PlanView, kind: str, colours: dict[str, str]) -> str:
    """The plot of a kind's errors. colours: of the roundings, by name."""
    linears = view.linears[kind]
    every = [value for name in view.linears for _, one in view.linears[name] for value in one.errors.values()]
    panel = Panel(kind, layer_axis(view.layers), log_axis("error over signal", every, FLOOR))
    for rounding, css in colours.items():
        points = _by_layer((layer, one.errors.get(rounding)) for layer, one in linears)
        if points:
            panel.line(points, css, rounding, dots=view.layers <= DOTTED)
    return panel.svg()


def rounding_names(linears: Iterable[LinearChoice]) -> dict[str, str]:
    """The colours of all roundings that were tried, by name."""
    return series(dict.fromkeys(name for one in linears for name in one.errors))


def kind_colours(view: PlanView) -> dict[str, str]:
    """The colours of `spikes` and `losses`, by kind of input."""
    return series(dict.fromkeys(one.kind for one in view.inputs))


def spikes(view: PlanView) -> str:
    """The plot of spike ratios, the largest ringed."""
    y = log_axis("largest over median channel", [one.spike for one in view.inputs if one.spike])
    ringed = [one for one in view.by_spike[:RINGED] if one.spike]
    return _inputs(view, "spike ratio of every input", y, lambda one: one.spike, ringed)


def losses(view: PlanView) -> str:
    """The plot of losses for each MB, those of linears in float ringed."""
    y = log_axis("KL by MB", [one.loss_by_mb for one in view.inputs if one.loss], FLOOR)
    ringed = [one for one in view.inputs if one.in_float and one.loss]
    return _inputs(view, "what INT8 costs", y, lambda one: one.loss_by_mb, ringed)


def _inputs(
    view: PlanView,
    title: str,
    y: Axis,
    value: Callable[[PlannedInput], float],
    ringed: Sequence[PlannedInput],
) -> str:
    panel, colours = Panel(title, layer_axis(view.layers), y), kind_colours(view)
    for kind, css in colours.items():
        points = _by_layer((one.layer, value(one) or None) for one in view.inputs if one.kind == kind)
        if points:
            panel.line(points, css, f"input of {kind}", dots=view.layers <= DOTTED)
    for one in ringed:
        panel.ring(
            (one.layer, value(one)), colours[one.kind], f"layer {one.layer}, input of {one.kind}: {value(one):.3g}"
        )
    return panel.svg()


def _by_layer(values: Iterable[tuple[int, float | None]]) -> list[Point]:
    """The mean of all known values of each layer, in order."""
    known: dict[int, list[float]] = {}
    for layer, value in values:
        if value is not None:
            known.setdefault(layer, []).append(value)
    return [(layer, fmean(found)) for layer, found in sorted(known.items())]


def _best_alpha(group: GroupChoice) -> float | None:
    return min((value for name, value in group.tried.items() if name not in (NONE, BALANCED)), default=None)


def _cells(groups: Sequence[GroupChoice]) -> Iterator[Cell]:
    """Yield the cells of a kind, layer by layer."""
    by_layer: dict[int, list[GroupChoice]] = {}
    for one in groups:
        by_layer.setdefault(one.layer, []).append(one)
    for layer, mine in by_layer.items():
        tried = {name: fmean(one.tried.get(name, 0.0) for one in mine) for one in mine for name in one.tried}
        least = min(tried.values(), default=0.0)
        taken = Counter(one.chosen for one in mine)
        most = max(taken, key=lambda name: taken[name])
        for name, value in tried.items():
            times = max(value, FLOOR) / max(least, FLOOR)
            shown = f"{times:,.0f}" if times >= 100 else f"{times:.3g}"
            label = candidate_words(name)
            chosen = f"; chosen for {taken[name]} of {len(mine)}" if name in taken else ""
            yield Cell(
                label,
                layer,
                sum(times < edge for edge in TIMES),
                shown,
                f"layer {layer}, {label}: {value:.3g}, {shown} times the least{chosen}",
                framed=name == most,
            )

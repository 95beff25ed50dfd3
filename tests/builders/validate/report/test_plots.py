"""The curve of an error against a setting, and pictures that are shown outside of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from xml.etree import ElementTree

import pytest
import torch

from builders.validate import Validation
from builders.validate.ranges import BARS, channels_of
from builders.validate.report import plots
from builders.validate.report.picture import Picture
from builders.validate.report.svg import Point, series

SVG = "{http://www.w3.org/2000/svg}"
POINTS = {"per token": [(0.5, 2e-3), (0.9, 4e-3), (0.7, 1e-3)], "per tensor": [(0.5, 0.2), (0.7, 0.03), (0.9, 0.02)]}


def marks(svg: str, kind: str, css: str) -> list[ElementTree.Element]:
    """The elements of a kind that have a class."""
    return [mark for mark in ElementTree.fromstring(svg).iter(kind) if css in mark.get("class", "").split()]


def titles(svg: str, kind: str, css: str) -> list[str | None]:
    return [title.text for mark in marks(svg, kind, css) for title in mark.iter("title")]


def places(mark: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", mark.attrib["d"])]


def test_a_curve_has_a_line_for_each_series_from_left_to_right() -> None:
    svg = plots.curve(POINTS)
    for css, label in (("s0", "per token"), ("s1", "per tensor")):
        (line,) = marks(svg, "path", css)
        assert titles(svg, "path", css) == [label]
        assert len(marks(svg, "circle", css)) == 3 + 1  # dots, and the ring
        found = places(line)
        assert len(found) == 3
        assert found == sorted(found)
    assert places(marks(svg, "path", "s0")[0])[1][1] > places(marks(svg, "path", "s1")[0])[1][1]  # 1e-3 is below .03


def test_the_smallest_error_has_a_ring() -> None:
    svg = plots.curve(POINTS)
    assert titles(svg, "circle", "ring") == ["per token, least at 0.7: 0.001", "per tensor, least at 0.9: 0.02"]
    for ring in marks(svg, "circle", "ring"):
        css = ring.attrib["class"].split()[-1]
        dots = [(dot.get("cx"), dot.get("cy")) for dot in marks(svg, "circle", "dot") if css in dot.attrib["class"]]
        assert (ring.get("cx"), ring.get("cy")) in dots
        assert ring.get("cy") == max((y for _, y in dots), key=lambda y: float(y or 0))  # the lowest on the page


def test_none_is_a_dashed_line_across_the_plot() -> None:
    svg = plots.curve(POINTS, {"per tensor": 2.5})
    (level,) = marks(svg, "path", "thin")
    assert level.attrib["class"].split() == ["line", "s1", "thin"]
    (left, height), (right, other) = places(level)
    assert (left, right) == (52, 366)
    assert height == other
    assert height < min(y for line in marks(svg, "path", "line")[:1] for _, y in places(line))  # 2.5 is the highest
    assert [note.text for note in ElementTree.fromstring(svg).iter("text") if "note" in note.get("class", "")] == [
        "none"
    ]
    assert titles(svg, "path", "thin") == ["per tensor, none: 2.5"]


@pytest.mark.parametrize(("level", "anchor"), [(0.2, "end"), (0.02, "start")])
def test_none_is_written_where_no_line_ends(level: float, anchor: str) -> None:
    tree = ElementTree.fromstring(plots.curve({"falling": [(0.2, 0.3), (0.8, 0.02)]}, {"falling": level}))
    assert [text.get("text-anchor") for text in tree.iter("text") if text.text == "none"] == [anchor]


@pytest.mark.parametrize(
    "points",
    [
        {"one": [(0.5, 1e-3)]},
        {"equal": [(0.5, 1e-3), (0.6, 1e-3)]},
        {"no error": [(0.0, 0.0), (1.0, 0.0)]},
        {f"series {number}": [(0.1, 1.0), (0.2, 10.0**-number)] for number in range(12)},
        {"<b>&\"'": [(0.5, 1e100), (0.6, 1e-100)]},
    ],
    ids=lambda points: str(len(points)),
)
def test_any_points_are_inside_the_frame(points: Mapping[str, Sequence[Point]]) -> None:
    svg = plots.curve(points, dict.fromkeys(points, 0.5), title="<script>", x_label="<x>", y_label="<y>")
    tree = ElementTree.fromstring(svg)
    _, _, width, height = (float(number) for number in tree.attrib["viewBox"].split())
    for path in tree.iter("path"):
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places(path))
    assert not {element.tag for element in tree.iter()} & {"script", "b", "x", "y"}
    assert "nan" not in svg


@pytest.mark.parametrize(
    ("points", "levels"),
    [
        ({}, {}),
        ({"one": []}, {}),
        ({"one": [(0.5, 1.0)], "two": []}, {}),
        ({"one": [(0.5, 1.0)]}, {"two": 1.0}),
        ({"one": [(0.5, math.nan)]}, {}),
        ({"one": [(math.inf, 1.0)]}, {}),
        ({"one": [(0.5, 1.0)]}, {"one": math.inf}),
    ],
)
def test_a_curve_of_no_numbers_is_refused(points: Mapping[str, Sequence[Point]], levels: Mapping[str, float]) -> None:
    with pytest.raises(ValueError, match="a curve needs"):
        plots.curve(points, levels)


def test_colours_begin_again_after_the_last() -> None:
    assert list(series("abcdefghi").values()) == ["s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s0"]


def test_the_legend_of_the_map_names_every_colour() -> None:
    assert list(plots.bounds()) == ["< 5", "5+", "10+", "15+", "20+", "25+", "30+", "35+"]
    assert list(plots.bounds().values()) == [f"h{number}" for number in range(8)]


def test_channels_of_any_input() -> None:
    before, after = torch.arange(600.0), torch.ones(600)
    found = channels_of(3, ("down",), before, after)
    assert (found.layer, found.roles, found.count) == (3, ("down",), 600)
    assert len(found.before) <= BARS
    assert found.before[0] == 2.0  # the largest of channels 0, 1, 2
    panels = plots.channels(found)
    assert [panel.count("layer 3, input of down") > 0 for panel in panels] == [True, True]


class TestPicture:
    def test_it_needs_no_style_sheet(self) -> None:
        """Every colour that its style uses is defined in it, and all its classes have one."""
        svg = Picture(plots.curve(POINTS, {"per token": 1.0}), legend=series(POINTS)).svg()
        tree = ElementTree.fromstring(svg)
        style = tree.findtext(f"{SVG}style") or ""
        assert set(re.findall(r"var\((--\w+)", style)) - {"--cell"} <= set(re.findall(r"(--[\w-]+): ", style))
        assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
        for element in tree.iter():
            for css in element.get("class", "").split():
                assert re.search(rf"\.{css}\b", style), css

    def test_plots_share_rows(self, make: Callable[..., Validation]) -> None:
        """Two of 380 fit into 800; a map of 800 has a row of its own."""
        small, large = plots.curve(POINTS), plots.sqnr_map(make())
        tree = ElementTree.fromstring(Picture(small, small, large, small, title="a < b", legend={"x & y": "s0"}).svg())
        found = [tuple(int(plot.attrib[key]) for key in ("x", "y", "width")) for plot in tree.findall(f"{SVG}svg")]
        top = 48  # the title and the legend
        map_at = top + 240 + 8
        assert found[:3] == [(0, top, 380), (388, top, 380), (0, map_at, 800)]
        assert found[3][0] == 0
        assert found[3][1] > map_at
        assert (tree.get("width"), tree.get("height")) == ("800", str(found[3][1] + 240))
        assert [text.text for text in tree.findall(f"{SVG}text")] == ["a < b", "x & y"]

    def test_jupyter_finds_it(self) -> None:
        picture = Picture(plots.curve(POINTS))
        assert picture._repr_svg_() == picture.svg()
        assert repr(picture) == "<1 plots>"

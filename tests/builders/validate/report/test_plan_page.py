"""The page of a plan stands alone, tells all that the plan does, and is refused for a plan of something else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from builders.validate.report import check_report, write_plan_page
from builders.validate.report.heat_map import Cell, heat_map
from builders.validate.report.plan_view import PlanView
from smoothquant.artifacts.plan import GroupChoice, LinearChoice, PlanFacts, PlanOutcome
from smoothquant.errors import OutputError, UserError
from smoothquant.model import Model
from smoothquant.plan import Plan
from smoothquant.scheme import PER_TENSOR
from smoothquant.settings import SmoothingSettings
from tests.builders.validate.report.pages import EVIL, Page, check_alone, check_frame, svgs
from tests.families.case import Case
from tests.models import open_llama, save_llama

SPIKED, KEPT = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"
TRIED = {"none": 0.4, "0.5": 0.02, "0.8": 0.013, "balanced": 0.01}


def facts_of(model: Model, name: str = "by group", **changes: Any) -> PlanFacts:
    """The record of a plan whose numbers tell where they are from. name: in every text that a search chooses."""
    places = [(layer, group) for layer in range(model.geometry.layers) for group in model.groups]
    groups = [
        GroupChoice(
            layer,
            tuple(dict.fromkeys(model.linear(layer, role) for role in group.linears)),
            name if name == EVIL else group.through,
            {**TRIED, name: 0.011},
            "0.8" if layer else "balanced",
        )
        for layer, group in places
    ]
    linears = [
        LinearChoice(
            full, rows * columns, "error feedback", {"nearest": 2e-4, "error feedback": 1e-4, name: 3e-4}, 0.01
        )
        for full, (rows, columns) in model.linears()
    ]
    first = linears[0]
    facts = PlanFacts(
        model=f"model {name}",
        family=model.family.name,
        smoothing=SmoothingSettings(0.85),
        scheme=replace(PER_TENSOR, float_linears=(KEPT,)),
        text=f"text {name}",
        tokens=12345,
        apart=2048,
        width=64,
        trial=4096,
        groups=tuple(groups),
        linears=(replace(first, rounding="nearest", loss=0.0777), *linears[1:]),
        candidates=(
            PlanOutcome(name, 0.0, 0.0123, 1.0456, 0.912),
            PlanOutcome(f"alpha {name}", 0.0, 0.0234, 1.0678, 0.901),
        ),
        chosen=name,
        curve=(PlanOutcome(name, 0.0, 0.0111, 1.0222, 0.923), PlanOutcome(name, 0.0556, 0.0044, 1.0033, 0.955)),
    )
    return replace(facts, **changes)


def absmax_of(model: Model, spike: str = SPIKED) -> dict[str, Tensor]:
    """Maxima of 1 to 2 in every channel, but for one linear's, of which a channel reaches 300."""
    found = {name: torch.linspace(1, 2, columns + 1)[1:] for name, (_, columns) in model.linears()}
    if spike in found:
        found[spike][7] = 300.0
    return found


def written(model: Model, path: Path, folder: str = "plan", **changes: Any) -> str:
    plan = Plan(Path(folder), facts_of(model, **changes), "0fed")
    write_plan_page(path, plan, model, absmax_of(model))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def content(llama: Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(llama, tmp_path_factory.mktemp("page") / "plan.html")


def panel(content: str, title: str) -> ElementTree.Element:
    """The plot with this title."""
    (found,) = [tree for tree in map(ElementTree.fromstring, svgs(content)) if tree.get("aria-label") == title]
    return found


def circles(tree: ElementTree.Element, css: str) -> list[tuple[str | None, str | None]]:
    return [(one.get("cx"), one.get("cy")) for one in tree.iter("circle") if css in one.attrib["class"].split()]


def test_it_stands_alone(content: str) -> None:
    check_alone(content)
    light, dark = re.findall(r":root \{(.*?)\}", content, re.S)
    used = set(re.findall(r"var\((--\w[\w-]*)\)", content)) - {"--cell"}
    assert used == set(re.findall(r"(--[\w-]+):", light)) == set(re.findall(r"(--[\w-]+):", dark))


@pytest.mark.parametrize("layers", [1, 2, 21, 41])
def test_plots_are_well_formed_and_inside_their_frame(layers: int, tmp_path: Path) -> None:
    model = open_llama(save_llama(tmp_path / "model", num_hidden_layers=layers))
    content = written(model, tmp_path / "plan.html")
    Page(content)
    for picture in svgs(content):
        tree = check_frame(picture)
        width = float(tree.attrib["viewBox"].split()[2])
        for cell in tree.iter("rect"):
            assert float(cell.get("x", 0)) + float(cell.attrib["width"]) <= width
        assert "nan" not in picture


def test_every_fact_is_told(content: str) -> None:
    text = Page(content).text
    for fact in (
        *("0.0123", "+4.56 %", "91.20 %", "0.0234", "+6.78 %", "90.10 %"),  # candidates
        *("0.0111", "+2.22 %", "92.30 %", "0.0044", "+0.33 %", "95.50 %", "5.56 %"),  # the curve
        *("balanced: 1, alpha 0.8: 1", "norm", "attention", "product"),  # groups
        *("0.0002, taken by 1", "0.0001, taken by 1", "0.0001, taken by 2"),  # roundings
        *(KEPT, "model.layers.0.self_attn.q_proj, k_proj, v_proj", SPIKED),  # in float, next, spikes
        *("12,345", "4,096", "2,048", "text by group", "model by group", "0fed", "family llama"),
        *("activations per-tensor", "weights per-channel", "kv cache float", "default; the recipe's alpha 0.85"),
        "smoothquant export FORMAT MODEL --plan PLAN --keep-float N%",
    ):
        assert fact in text, fact


def test_the_point_that_was_chosen_has_the_ring(llama: Model, content: str) -> None:
    """It is that of the linears in float, whether or not another is nearer to the float model."""
    curve = panel(content, "KL by size")
    dots = circles(curve, "dot")
    assert len(dots) == 2
    assert circles(curve, "ring") == [dots[1]]
    plain = Plan(Path("plan"), facts_of(llama, scheme=PER_TENSOR), "0f")
    assert PlanView(plain, llama, absmax_of(llama)).taken == plain.facts.curve[0]


def test_linears_in_float_come_first_and_then_those_that_win_most(content: str) -> None:
    table = content.split("What stays in float")[1].split("</table>")[0]
    names = re.findall(r"<tr><th>(.*?)</th>", table)[1:]
    assert names[:2] == [KEPT, "model.layers.0.self_attn.q_proj, k_proj, v_proj"]
    first = re.findall(r"<td>(.*?)</td>", table)[:5]
    assert first == ["0.0 MB", "0.01", f"{0.01 / (64 * 64 / 1e6):.3g}", f"{2 / 1.5:.1f}", "in float"]
    assert len(circles(panel(content, "what INT8 costs"), "ring")) == 1


def test_the_largest_spike_is_named_first(content: str) -> None:
    table = content.split("The largest spikes")[1].split("</table>")[0]
    row = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", table)[1:]
    names, cells = zip(*row, strict=True)
    assert names[0] == SPIKED
    largest, median, ratio, _ = re.findall(r"<td>(.*?)</td>", cells[0])
    assert (largest, float(median)) == ("300", pytest.approx(1.5, abs=0.02))
    assert float(ratio.replace(",", "")) == pytest.approx(300 / float(median), rel=0.01)
    rings = circles(panel(content, "spike ratio of every input"), "ring")
    assert len(rings) == 3


def test_every_candidate_has_a_cell_in_every_layer(content: str) -> None:
    tree = panel(content, "noise of every candidate, input of q, k, v")
    titles = [title.text for title in tree.iter("title")]
    assert len(titles) == 2 * (len(TRIED) + 1)
    assert "layer 0, none: 0.4, 40 times the least" in titles
    assert "layer 1, alpha 0.8: 0.013, 1.3 times the least; chosen for 1 of 1" in titles
    framed = [group for group in tree.iter("g") if "framed" in group.attrib["class"].split()]
    assert [next(group.iter("title")).text for group in framed] == [title for title in titles if "chosen" in title]
    colours = {next(group.iter("title")).text: group.attrib["class"].split()[1] for group in tree.iter("g")}
    assert colours["layer 0, none: 0.4, 40 times the least"] == "h0"
    assert colours["layer 0, balanced: 0.01, 1 times the least; chosen for 1 of 1"] == "h7"


def test_a_winner_of_one_alpha_has_no_maps(llama: Model, tmp_path: Path) -> None:
    groups = tuple(replace(one, tried={"0.5": 0.02}, chosen="0.5") for one in facts_of(llama).groups)
    content = written(llama, tmp_path / "plan.html", groups=groups)
    assert "noise of every candidate" not in content
    text = Page(content).text
    assert "All groups have the same alpha" in text
    assert "its best alpha" not in text
    assert "alpha 0.5: 2" in text


def test_nothing_to_choose(llama: Model, tmp_path: Path) -> None:
    """A model without groups, on which no token judged a rounding, and inputs that no token reached."""
    bare = tuple(replace(one, errors={}, loss=0.0) for one in facts_of(llama).linears)
    plan = Plan(Path("plan"), facts_of(llama, groups=(), linears=bare), "0f")
    silent = {name: torch.zeros_like(values) for name, values in absmax_of(llama).items()}
    write_plan_page(tmp_path / "plan.html", plan, llama, silent)
    content = (tmp_path / "plan.html").read_text()
    assert "Nothing is smoothed" in Page(content).text
    assert "nan" not in content


@pytest.mark.parametrize("layout", ["mixtral", "phi3", "opt", "bloom", "falcon-40b", "olmo2", "gemma3"])
def test_other_layouts(layout: str, tmp_path: Path) -> None:
    """Linears that share a matrix, experts, families without a gate: each in its kind."""
    model = Case(layout, tmp_path).model
    content = written(model, tmp_path / "plan.html", scheme=PER_TENSOR)
    Page(content)
    view = PlanView(Plan(Path("plan"), facts_of(model, scheme=PER_TENSOR), "0f"), model, absmax_of(model))
    kinds = {"mixtral": {"q", "gate"}, "phi3": {"q, k, v", "gate, up"}, "falcon-40b": {"q, k, v", "up"}}
    assert kinds.get(layout, set()) <= view.linears.keys()
    assert sum(map(len, view.linears.values())) == len(view.facts.linears)
    assert sum(one.numbers for one in view.inputs) == view.all_bytes
    assert {one.layer for one in view.inputs} == set(range(model.geometry.layers))


def test_names_are_escaped(llama: Model, tmp_path: Path) -> None:
    """A page of hostile texts has the tags and attributes of a page of harmless ones, and shows as many texts."""
    pages = []
    for name in ("harmless", EVIL):
        content = written(llama, tmp_path / "plan.html", folder=name, name=name)
        page = Page(content)
        pages.append(([key for key, _ in page.attributes], page.tags, page.text.count(name)))
        for picture in svgs(content):
            ElementTree.fromstring(picture)
    assert pages[0][:2] == pages[1][:2]
    assert pages[1][2] >= pages[0][2] > 10


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[31mb", "a\udcffb"])
def test_what_is_no_character_is_replaced(name: str, llama: Model, tmp_path: Path) -> None:
    content = written(llama, tmp_path / "plan.html", name=name)
    assert name[1] not in content
    assert name.replace(name[1], "\ufffd") in Page(content).text


def _first(facts: PlanFacts, **changes: Any) -> tuple[LinearChoice, ...]:
    return (replace(facts.linears[0], **changes), *facts.linears[1:])


FAULTS: dict[str, tuple[Any, str]] = {
    "a linear of no layer": (lambda facts: {"linears": _first(facts, name="x.y")}, "choices for x.y; expected"),
    "a linear that is missing": (lambda facts: {"linears": facts.linears[1:]}, "no choice for model.layers.0"),
    "a group of others": (
        lambda facts: {"groups": (replace(facts.groups[0], linears=("x",)),)},
        "choices for x; expected choices for linears of this model",
    ),
    "a layer beyond": (lambda facts: {"groups": (replace(facts.groups[0], layer=9),)}, "choices for layer 9"),
    "no curve": (lambda facts: {"curve": ()}, "no models were run end to end"),
    "no candidates": (lambda facts: {"candidates": ()}, "no models were run end to end"),
    "no number": (lambda facts: {"linears": _first(facts, loss=float("nan"))}, "errors that are no numbers"),
    "no finite number": (
        lambda facts: {"curve": (replace(facts.curve[0], kl=float("inf")),)},
        "errors that are no numbers",
    ),
    "no bytes": (lambda facts: {"linears": _first(facts, numbers=0)}, "errors that are no numbers"),
    "a noise below 0": (
        lambda facts: {"groups": (replace(facts.groups[0], tried={"0.5": -1.0}),)},
        "errors that are no numbers",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_record_of_something_else_is_refused(fault: str, llama: Model, tmp_path: Path) -> None:
    change, said = FAULTS[fault]
    facts = facts_of(llama)
    plan = Plan(Path("plan"), replace(facts, **change(facts)), "0f")
    with pytest.raises(UserError, match=said) as raised:
        write_plan_page(tmp_path / "plan.html", plan, llama, absmax_of(llama))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_only_a_page_of_ours_is_replaced(llama: Model, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    old = written(llama, path)
    check_report(path, "--report")
    assert written(llama, path, tokens=54321) != old
    path.write_text("mine")
    with pytest.raises(OutputError, match="it is no report of this tool"):
        written(llama, path)
    assert path.read_text() == "mine"


def test_frames_lie_above_their_neighbours() -> None:
    cells = [
        Cell("a", 0, 0, "1", "first", framed=True),
        Cell("<b>", 1, 7, "2", "second"),
        Cell("a", 1, 3, "3", "third"),
    ]
    tree = ElementTree.fromstring(heat_map(cells, 2, "map"))
    assert [group.attrib["class"] for group in tree.iter("g")] == ["cell h7", "cell h3", "cell h0 framed"]
    assert [text.text for text in tree.iter("text") if text.get("text-anchor") == "end"] == ["a", "<b>"]

"""The report stands alone, says what happened, and is there whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

import builders.validate.report
from builders.validate import Validation
from builders.validate.report import read_report, write_json, write_report
from smoothquant import files
from smoothquant.artifacts.seal import sealed
from smoothquant.errors import OutputError
from tests.builders.validate.report.pages import EVIL, Page, check_alone, check_frame, svgs

Make = Callable[..., Validation]
ROOT = Path(__file__).parents[4]


def written(path: Path, validations: list[Validation], **rows: list[str]) -> str:
    write_report(path / "report.html", validations, rows)
    return (path / "report.html").read_text(encoding="utf-8")


def several(make: Make) -> list[Validation]:
    return [make("FP32", quantized=False, checked=False), make("naive", checked=False), make("SmoothQuant")]


def test_nothing_is_loaded(make: Make, tmp_path: Path) -> None:
    content = written(tmp_path, several(make))
    page = check_alone(content)
    assert ("charset", "utf-8") in page.attributes


def test_plots_are_well_formed_and_inside_their_frame(make: Make, tmp_path: Path) -> None:
    pictures = svgs(written(tmp_path, several(make)))
    # twice 2 channel plots and 4 range plots (FP32 is not smoothed), heat maps, hidden error, KL, 3 scatters
    assert len(pictures) == 6 + 1 + 1 + 1 + 3
    for picture in pictures:
        for mark in check_frame(picture).iter():
            assert "nan" not in " ".join(mark.attrib.values())


def test_both_colour_schemes(make: Make, tmp_path: Path) -> None:
    """Every colour that is used is defined, in light and in dark."""
    content = written(tmp_path, several(make))
    light, dark = re.findall(r":root \{(.*?)\}", content, re.S)
    used = set(re.findall(r"var\((--\w[\w-]*)\)", content)) - {"--cell"}
    assert used == set(re.findall(r"(--[\w-]+):", light)) == set(re.findall(r"(--[\w-]+):", dark))
    assert "prefers-color-scheme: dark" in content


def named(plain: Validation, name: str) -> Validation:
    """A validation whose every text is `name`."""
    subject = {key: name if isinstance(value, str) else value for key, value in plain.subject.items()}
    subject |= {"inputs": {name: name, "smoothing": {name: name}, "lists": [name]}, "versions": {name: name}}
    return replace(
        plain,
        label=name,
        subject=subject,
        checks=tuple(replace(check, name=name) for check in plain.checks),
        linears=tuple(replace(linear, name=name, role=name) for linear in plain.linears),
        ranges=tuple(replace(found, roles=(name,)) for found in plain.ranges),
        channels=replace(plain.channels, roles=(name,)),
    )


def test_names_are_escaped(make: Make, tmp_path: Path) -> None:
    """A page of hostile texts has the tags and attributes of a page of harmless ones, and shows as many texts."""
    pages = []
    for name in ("harmless", EVIL):
        shown = [named(make(), name), named(make(), name + "2")]
        content = written(tmp_path, shown, **{name: [name, name]})
        page = Page(content)
        labels = [value for key, value in page.attributes if key == "aria-label"]
        assert f"SQNR of every linear, {name}" in labels
        pages.append(([key for key, _ in page.attributes], page.tags, page.text.count(name)))
        for picture in re.findall(r"<svg .*?</svg>", content, re.S):
            ElementTree.fromstring(picture)
    assert pages[0] == pages[1]
    assert pages[1][2] > 40


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[31mb", "a\x08b", "a\x85b", "a\udcffb", "a\uffffb"])
def test_what_is_no_character_is_replaced(name: str, make: Make, tmp_path: Path) -> None:
    """Terminal escapes, and the lone surrogates of file names that are not UTF-8: no page and no SVG may hold them."""
    content = written(tmp_path, [named(make(), name)], **{name: [name]})
    assert name.replace(name[1], "\ufffd") in Page(content).text
    assert name[1] not in content
    for picture in re.findall(r"<svg .*?</svg>", content, re.S):
        ElementTree.fromstring(picture)


def test_other_languages_stay(make: Make, tmp_path: Path) -> None:
    name = "größer 日本語 \U0001f600 नमस्ते\tไทย"
    assert name in Page(written(tmp_path, [named(make(), name)])).text


@pytest.mark.parametrize(("top1", "verdict"), [(0.99, "Missed: SmoothQuant"), (0.98, "Passed: all 2 thresholds hold")])
def test_verdict_and_thresholds(top1: float, verdict: str, make: Make, tmp_path: Path) -> None:
    found = make()
    checks = (found.checks[0], replace(found.checks[1], limit=top1))
    page = Page(written(tmp_path, [replace(found, checks=checks)]))
    assert verdict in page.text
    assert page.text.count("missed") == (top1 == 0.99)
    assert "0.9807" in page.text  # the tightest that passes


def test_near_ties_are_counted_apart(make: Make, tmp_path: Path) -> None:
    shown = [make("one"), replace(make("other"), metrics=replace(make().metrics, top1_clear=None, ambiguous=1.0))]
    content = written(tmp_path, shown)
    for title, cells in (
        ("… without ambiguous tokens", ("99.68 %", "")),
        ("… ambiguous tokens", ("3.12 %", "100.00 %")),
    ):
        row = next(line for line in content.splitlines() if line.startswith(f"<tr><th>{title}</th>"))
        assert re.findall(r'<td class="">(.*?)</td>', row) == list(cells)


def test_without_thresholds(make: Make, tmp_path: Path) -> None:
    page = Page(written(tmp_path, [make(checked=False)]))
    assert "no thresholds were set" in page.text
    assert "Tightest" not in page.text


def test_what_was_run_is_told(make: Make, tmp_path: Path) -> None:
    page = Page(written(tmp_path, several(make), prefill=["1", "2.1", "2.5x"]))
    for fact in (
        "FP32",
        "naive",
        "SmoothQuant",
        "Reference (FP16)",
        "tiny (fingerprint 0f)",
        "held-out.txt (fingerprint 1e)",
        "weights as stored (FP16), arithmetic in float32",
        "64 in 2 sequences; 62 with a successor to predict",
        "alpha 0.5, groups default",
        "smoothquant 0.1.0",
        "+0.12 %",
        "98.07 %",
        "7.4 MB",
        "2.5x",
        "model.layers.0.q_proj, 20.0 dB",  # the lowest
    ):
        assert fact in page.text, fact


def test_linears_left_in_float_are_named(make: Make, tmp_path: Path) -> None:
    plain = make()
    kept = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    found = replace(plain, subject={**plain.subject, "inputs": {**plain.subject["inputs"], "float_linears": kept}})
    assert f"float linears: {', '.join(kept)}" in Page(written(tmp_path, [found])).text


def test_engines_that_quantize_alike_share_a_map(make: Make, tmp_path: Path) -> None:
    content = written(tmp_path, [make("one"), make("two", checked=False)])
    assert content.count("SQNR of every linear, ") == 1
    assert "<b>one, two</b>" in content


@pytest.mark.parametrize("layers", [1, 20, 21, 80])
def test_any_number_of_layers(layers: int, make: Make, tmp_path: Path) -> None:
    content = written(tmp_path, [make(layers=layers)])
    assert f"model.layers.{layers - 1}.down_proj: " in content
    assert ('text-anchor="middle">20.0</text>' in content) == (layers <= 20)  # beyond, cells are too narrow for numbers


def test_engine_that_equals_its_reference(make: Make, tmp_path: Path) -> None:
    """All KL 0, all logits equal: no logarithm of zero, no axis without length."""
    found = make(quantized=False, checked=False)
    histogram = replace(found.samples, histogram=(64, 0, 0), points=((1.0, 1.0),) * 3)
    dead = replace(found.channels, before=(0.0,) * 4, after=(0.0,) * 4)
    ranges = tuple(replace(r, before_max=0.0, before_median=0.0, after_max=0.0, after_median=0.0) for r in found.ranges)
    Page(written(tmp_path, [replace(found, samples=histogram, channels=dead, ranges=ranges)]))


def test_json_reads_back(make: Make, tmp_path: Path) -> None:
    validations = several(make)
    write_json(tmp_path / "new/report.json", validations, inputs="key")
    content = json.loads((tmp_path / "new/report.json").read_text(encoding="utf-8"))
    assert content["inputs"] == "key"
    assert [Validation.from_dict(found) for found in content["validations"]] == validations


def test_files_of_the_page_are_packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What setuptools puts into a wheel beside the Python files."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    command.manifest_files = {}
    folder = Path(builders.validate.report.__file__).parent
    package = builders.validate.report.__name__
    packaged = command.find_data_files(package, package.replace(".", "/"))
    assert package in distribution.packages
    wanted = {file.name for file in folder.iterdir() if file.is_file() and file.suffix != ".py"}
    assert {Path(file).name for file in packaged} == wanted >= {"report.html.jinja"}


def test_whole_or_not_at_all(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(path, [make()])
    old = path.read_text()
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(OutputError, match="it is no report of this tool"):
        write_report(tmp_path / "mine.html", [make()])
    (tmp_path / "mine.html").unlink()
    with pytest.raises(ValueError, match="extra rows"):
        write_report(path, [make()], {"row": ["one", "two"]})

    def full(path: Path, pieces: object, *, new: bool = False) -> None:
        path.write_bytes(b"<!doctype")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.DISK, "write", full)
    for write in (write_report, write_json):
        with pytest.raises(OutputError, match="No space left on device"):
            write(path, [make(label="another")])
    assert path.read_text() == old
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_place_that_cannot_be_written(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write there"):
        write_report(tmp_path / "file/report.html", [make()])


@pytest.mark.parametrize("validations", [None, 7, {}, "x", [None], [{}], [{"label": "a"}]])
def test_a_report_of_another_shape_is_none(validations: object, tmp_path: Path) -> None:
    """Sealed, as another version may have written it: the engines are validated again."""
    path = tmp_path / "report.json"
    path.write_text(json.dumps(sealed({"inputs": "key", "validations": validations})))
    assert read_report(path, "key") == []

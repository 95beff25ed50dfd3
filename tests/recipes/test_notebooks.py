"""Every cell of a notebook runs on the bundled model, and what is stored in the file is what the cells display."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests import notebook
from tests.notebook import CellError, kinds

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "recipes/notebooks").glob("*.ipynb"))
SMOOTHING = ROOT / "recipes/notebooks/smoothing.ipynb"
LARGEST = 200_000  # bytes of a notebook with its outputs
FIELDS = {"stream": {"name", "text"}, "execute_result": {"data", "metadata", "execution_count"}}
SECONDS = 300
GENERATES = "generate"  # the cell that shows what an engine writes


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def run(path: Path, out: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run a notebook in a process of its own. Returns the process, and the notebook with its outputs."""
    words = [sys.executable, "-m", "tests.notebook", str(path), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return process, read(out)


def code_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def shape(cell: dict[str, Any]) -> tuple[str, list[list[str]], str]:
    """What of a cell's outputs is the same on every machine: their kinds, and what is printed without the numbers.

    Of a generated text, not even the words are.
    """
    printed = "".join("".join(output.get("text", [])) for output in cell["outputs"] if cell["id"] != GENERATES)
    return cell["id"], [kinds(output) for output in cell["outputs"]], re.sub(r"[\d.]+|[+-](?=\d)", "#", printed)


def pictures(content: dict[str, Any]) -> list[str]:
    shown = [output.get("data", {}) for cell in code_of(content) for output in cell["outputs"]]
    return ["".join(data["image/svg+xml"]) for data in shown if "image/svg+xml" in data]


def made_of(*sources: str) -> dict[str, Any]:
    """A notebook with these code cells."""
    cells = [
        {"cell_type": "code", "id": f"c{number}", "source": source.splitlines(keepends=True)}
        for number, source in enumerate(sources)
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def with_first_cell(source: str, path: Path) -> Path:
    """A copy of the notebook of smoothing, with one more cell before the others."""
    content = read(SMOOTHING)
    content["cells"] = [*made_of(source)["cells"], *content["cells"]]
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    process, found = run(path, tmp_path / "out.ipynb")
    assert process.returncode == 0, process.stderr
    fresh, stored = ([shape(cell) for cell in code_of(content)] for content in (found, read(path)))
    assert fresh == stored, "store the outputs again: python -m tests.notebook NOTEBOOK"
    drawn = pictures(found)
    assert drawn
    for picture in drawn:
        tree = ElementTree.fromstring(picture)
        assert tree.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(tree.iter("{http://www.w3.org/2000/svg}svg"))) > 1  # it holds plots
        assert not any("nan" in " ".join(mark.attrib.values()) for mark in tree.iter())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_small_and_valid(path: Path) -> None:
    """By the fields that Jupyter's schema of version 4.5 wants; by the schema itself, where nbformat is installed."""
    assert path.stat().st_size < LARGEST
    content = read(path)
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in content["cells"]]
    assert len(set(names)) == len(names)
    for cell in content["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        extra = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | extra
        assert all(isinstance(line, str) for line in cell["source"])
        for output in cell.get("outputs", []):
            assert output.keys() - {"output_type"} == FIELDS[output["output_type"]]  # an error is not among them
    code = code_of(content)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    try:
        import nbformat
    except ImportError:
        return
    nbformat.validate(content)


def test_links_lead_somewhere() -> None:
    for path in NOTEBOOKS:
        text = "".join("".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert links
        for link in links:
            assert (path.parent / link).exists(), link


BREAKS = {
    "a name that is gone": ("import act_scales.collect\ndel act_scales.collect.collect", "calibrate", "ImportError"),
    "another signature": (
        "import smoothquant.stream\nsmoothquant.stream.smooth_layer = lambda model: None",
        "smooth-one",
        "TypeError",
    ),
    "a plot that fails when it is drawn": (
        "from builders.validate.report.picture import Picture\nPicture.svg = None",
        "plot-channels",
        "TypeError",
    ),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_cell_fails_when_the_code_that_it_shows_breaks(fault: str, tmp_path: Path) -> None:
    source, failing, error = BREAKS[fault]
    process, found = run(with_first_cell(source, tmp_path / "broken.ipynb"), tmp_path / "out.ipynb")
    assert process.returncode == 1
    last = [cell for cell in code_of(found) if cell["outputs"]][-1]
    assert last["id"] == failing
    assert last["outputs"][-1]["output_type"] == "error"
    assert last["outputs"][-1]["ename"] == error
    assert f"cell {last['execution_count']}: {error}" in process.stderr.splitlines()[-1]


class TestRunner:
    def test_cells_share_a_namespace_and_show_their_last_expression(self) -> None:
        content = made_of(
            "import math\nx = 2", "print(x)\nprint('y')\nx + 1", "x = 5; None", "def f():\n    return x\nf()"
        )
        notebook.run(content)
        found = [cell["outputs"] for cell in content["cells"]]
        assert found[0] == found[2] == []
        assert found[1][0] == {"output_type": "stream", "name": "stdout", "text": ["2\n", "y\n"]}
        assert found[1][1]["data"] == {"text/plain": ["3"]}
        assert found[3][0]["data"] == {"text/plain": ["5"]}
        assert [cell["execution_count"] for cell in content["cells"]] == [1, 2, 3, 4]

    def test_svg_is_shown_beside_the_text(self) -> None:
        content = made_of("class Drawn:\n    def _repr_svg_(self):\n        return '<svg/>'\nDrawn()")
        notebook.run(content)
        assert content["cells"][0]["outputs"][0]["data"]["image/svg+xml"] == ["<svg/>"]
        assert kinds(content["cells"][0]["outputs"][0]) == ["image/svg+xml", "text/plain"]

    @pytest.mark.parametrize("bad", ["1 / 0", "x = ", "raise SystemExit(0)"])
    def test_a_cell_that_raises_ends_the_run(self, bad: str) -> None:
        content = made_of("1", bad, "2")
        with pytest.raises(CellError, match="cell 2"):
            notebook.run(content)
        assert content["cells"][1]["outputs"][-1]["output_type"] == "error"
        assert content["cells"][2]["outputs"] == []

"""search --report, and the page that run leaves beside a plan: the real command line, in processes of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from smoothquant.plan import read_plan
from tests.builders.validate.report.pages import Page
from tests.forked import assert_one_line, in_a_new_process, smoothquant
from tests.models import save_llama

FEW = ("--samples", "8", "--length", "32", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_page_is_of_the_plan(model: Path, text_file: Path, tmp_path: Path) -> None:
    """It tells what the plan and the terminal do; again, it is the same, and the plan is as it was."""
    words = ("search", model, "--text", text_file, *FEW, "--out", tmp_path / "plan", "--json")
    found = in_a_new_process(*words, "--report", tmp_path / "new/page.html")
    assert found.returncode == 0, found.stderr
    plan, page = read_plan(tmp_path / "plan"), tmp_path / "new/page.html"
    content = page.read_text(encoding="utf-8")
    text = Page(content).text
    assert plan.fingerprint in text
    assert f"Search · {model.name}" in text
    for one in (*plan.facts.candidates, *plan.facts.curve):
        assert f"{one.kl:.4g}" in text
    assert json.loads(found.stdout)["fingerprint"] == plan.fingerprint
    page.unlink()
    again = smoothquant(*words, "--report", page)
    assert again.returncode == 0, again.stderr
    assert page.read_text(encoding="utf-8") == content
    assert read_plan(tmp_path / "plan").fingerprint == plan.fingerprint
    assert names(tmp_path) == {"plan", "new"}


def test_run_leaves_it_beside_the_plan(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("run", "llama", "--model", model, "--text", text_file, *FEW, "--target", "w8a8", "--out", out)
    found = smoothquant(*words, "--json")
    assert found.returncode in (0, 1), found.stderr  # a random model may miss the recipe's thresholds
    assert {"plan", "plan.html", "report.html"} <= names(out)
    assert json.loads(found.stdout)["plans"] == [str(out / "plan")]
    assert read_plan(out / "plan").fingerprint in Page((out / "plan.html").read_text(encoding="utf-8")).text
    (out / "plan.html").unlink()
    assert f"{out / 'plan'}, shown by {out / 'plan.html'}" in smoothquant(*words).stdout
    assert (out / "plan.html").exists()


def test_run_without_a_search_has_none(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("run", "llama", "--model", model, "--text", text_file, *FEW, "--target", "w8a8", "--out", out)
    found = smoothquant(*words, "--no-search", "--json")
    assert found.returncode in (0, 1), found.stderr
    assert json.loads(found.stdout)["plans"] == []
    assert "plan.html" not in names(out)


BAD = {
    "a folder": ("folder", "a folder; expected a file to write"),
    "a file of somebody": ("mine.html", "it is no report of this tool"),
    "below a file": ("mine.html/page.html", "cannot write there"),
    "in the plan": ("plan/page.html", "lies inside --out"),
    "the plan": ("plan", "lies inside --out"),
    "in the plan, by a way around": ("folder/../plan/page.html", "lies inside --out"),
    "in the model": ("model/page.html", "lies inside the model"),
    "the text": ("text.txt", "is the text"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_place_for_no_page(what: str, model: Path, text_file: Path, tmp_path: Path) -> None:
    """One line, before any work; whatever is there stays."""
    place, said = BAD[what]
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "text.txt").write_bytes(text_file.read_bytes())
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.html").write_text("mine")
    before = names(tmp_path) | names(model)
    words = ("search", tmp_path / "model", "--text", tmp_path / "text.txt", *FEW, "--out", tmp_path / "plan")
    assert_one_line(smoothquant(*words, "--report", tmp_path / place), 2, said, "choose another --report")
    assert names(tmp_path) | names(model) == before
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert (tmp_path / "text.txt").read_bytes() == text_file.read_bytes()


def test_a_file_in_the_place_of_runs_page(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.html").write_text("mine")
    words = ("run", "llama", "--model", model, "--text", text_file, *FEW, "--target", "w8a8", "--out", out)
    assert_one_line(smoothquant(*words), 2, "plan.html exists, and it is no report of this tool")
    assert names(out) == {"plan.html"}
    assert (out / "plan.html").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission(model: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    words = ("search", model, "--text", text_file, *FEW, "--out", tmp_path / "plan")
    found = smoothquant(*words, "--report", tmp_path / "closed/page.html")
    assert_one_line(found, 2, "cannot write there")
    assert names(tmp_path) == {"closed"}

"""The pipeline by its records: what outputs share, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from act_scales.text import Text
from builders.validate import read_scheme
from recipes.cli import main
from recipes.models import RECIPES
from recipes.pipeline import Output, RecipeRun, run
from recipes.recipe import find
from recipes.targets import TARGETS
from smoothquant.capacity import FOLDED
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import DEFAULT, STEPS
from tests.models import sample_ids
from tests.steps import ClipRows

CLIPPED = (*DEFAULT, ClipRows(0.8))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, ClipRows.name, ClipRows)


@contextmanager
def silent(name: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def job(model: Model, out: Path, *outputs: Output) -> RecipeRun:
    text = Text(tuple(sample_ids(sequences=4)), "sample")
    return RecipeRun(model, text, replace(text, sequences=tuple(sample_ids(sequences=2, seed=5))), out, outputs)


def test_outputs_with_other_steps_are_other_engines(llama: Model, tmp_path: Path) -> None:
    """Each is exported with its own steps, and measured with them: the clipped one is worse, the other untouched."""
    plain = Output("plain", TARGETS["onnxruntime"], FOLDED.settings(llama), form="plain")
    clipped = replace(plain, label="clipped", form="clipped", steps=CLIPPED)
    bare = replace(plain, label="bare", form="bare", steps=())
    made = run(job(llama, tmp_path / "out", plain, clipped, bare), silent)
    for output in (plain, clipped, bare):
        assert read_scheme(made.folders[output.label]).steps == output.steps
    found = {validation.label: validation for validation in made.validations}
    assert found["clipped"].metrics.kl_mean > 2 * found["plain"].metrics.kl_mean
    assert found["plain"].metrics == found["bare"].metrics  # no expert is silent here
    for cut, whole in zip(found["clipped"].linears, found["plain"].linears, strict=True):
        assert cut.sqnr < whole.sqnr, cut.name
    assert found["clipped"].subject["inputs"]["steps"] == ["borrow-ranges", "clip-rows quantile 0.8"]


def test_a_recipe_names_its_steps(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(find("llama", RECIPES), name="clipped-llama", steps=CLIPPED, alpha=0.6)
    monkeypatch.setattr("recipes.models.RECIPES", (recipe,))
    command = ["run", recipe.name, "--model", str(llama_folder), "--text", str(text_file), "--quiet"]
    main([*command, "--samples", "4", "--length", "48", "--out", str(tmp_path / "out")])
    for folder in ("onnx", "w8a8", "engine/onnxruntime"):
        scheme = read_scheme(tmp_path / "out" / folder)
        assert (scheme.steps, scheme.settings.alpha) == (CLIPPED, 0.6)


@pytest.mark.parametrize("name", ["onnxruntime", "w8a8", "tensorrt-llm"])
def test_settings_that_a_target_cannot_hold(name: str, llama: Model, tmp_path: Path) -> None:
    """Before any work: nothing is calibrated for them."""
    settings = SmoothingSettings(0.5, "unfolded", smoother_dtype="float16")
    with pytest.raises(UserError, match="smoothing groups 'unfolded' with"):
        run(job(llama, tmp_path / "out", Output("x", TARGETS[name], settings, thresholds=None)), silent)
    assert not (tmp_path / "out").exists()


def test_a_step_that_validation_would_not_know(llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(STEPS, ClipRows.name)
    output = Output("x", TARGETS["w8a8"], FOLDED.settings(llama), thresholds=None, steps=CLIPPED)
    with pytest.raises(UserError, match="step 'clip-rows'"):
        run(job(llama, tmp_path / "out", output), silent)
    assert not (tmp_path / "out").exists()

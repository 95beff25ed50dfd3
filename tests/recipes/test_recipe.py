"""A recipe is for a family, and for models of about one size: what contradicts that is said, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recipes import tiny_llama
from recipes.cli.options import usual_alpha
from recipes.families import open_model
from recipes.models import RECIPES
from recipes.recipe import contradiction, find, of_family, of_model, size
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.outputs import load_manifest
from tests import zoo
from tests.forked import assert_one_line, smoothquant

# weights of the published models, in billions, by their model cards
PUBLISHED = {
    "llama-7b": 6.74,
    "llama-30b": 32.5,
    "llama-2-13b": 13.0,
    "llama-3.2-1b": 1.24,
    "mistral-nemo-12b": 12.2,
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141.0,
    "falcon-rw-1b": 1.31,
    "opt-350m": 0.331,
    "bloom-1b1": 1.07,
    "bloom-7b1": 7.07,
    "gemma-2-2b": 2.61,
    "olmo-2-1b": 1.48,
    "qwen3-235b-a22b": 235.0,
}


class Weighing:
    """A checkpoint with that many weights."""

    def __init__(self, weights: float) -> None:
        self.weights, self.folder = weights, Path("/models/some")


class Of:
    """A model of a family, of a size."""

    def __init__(self, recipe: str, weights: float) -> None:
        self.family, self.checkpoint = find(recipe, RECIPES).family, Weighing(weights)


def doubt(recipe: str, model: object) -> str:
    assert isinstance(model, (Model, Of))
    return contradiction(find(recipe, RECIPES), model, RECIPES)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_fits_what_it_names_and_not_three_times_as_much(name: str) -> None:
    weights = PUBLISHED[name] * 1e9
    assert doubt(name, Of(name, weights)) == ""
    assert doubt(name, Of(name, weights * 1.05)) == ""  # a fine-tune with some more tokens
    for other in (weights * 3, weights / 3):
        assert f"recipe {name} is for {find(name, RECIPES).model}, and /models/some has" in doubt(name, Of(name, other))


def test_recipes_for_any_model_fit_any_size() -> None:
    assert size("llama") is size("phi-4") is size("phi-3-mini-4k") is None
    assert doubt("llama", Of("llama", 1e12)) == doubt("phi-4", Of("phi-4", 1e12)) == ""


def test_another_family_is_refused(tmp_path: Path) -> None:
    model, out = zoo.save("mistral", tmp_path / "model"), tmp_path / "out"
    said = (
        f"recipe llama-2-7b is for meta-llama/Llama-2-7b-hf, and {model} is of the family mistral; expected a model of "
        "the family llama; take one of the recipes mistral, mistral-7b"
    )
    command = ("run", "llama-2-7b", "--model", model, "--text", tiny_llama.CALIBRATION_TEXT, "--out", out)
    assert_one_line(smoothquant(*command), 2, said)
    assert not out.exists()
    assert contradiction(find("mistral", RECIPES), open_model(model), RECIPES) == ""  # the control


def test_a_family_without_recipes_takes_any() -> None:
    mine = Of("llama", 7e9)
    mine.family = replace(mine.family, name="mine")
    assert of_family(mine, RECIPES) == ()  # type: ignore[arg-type]
    assert doubt("llama-2-7b", mine).endswith("is of the family mine, without recipes")


@pytest.mark.parametrize(
    ("family", "weights", "alpha", "name"),
    [
        ("llama", 134.5e6, 0.85, "llama"),  # SmolLM2: no recipe of about this size
        ("llama", 6.74e9, 0.85, "llama-7b"),
        ("llama", 70.6e9, 0.85, "llama"),  # Llama-2's 70B has 0.9, Llama-3's 0.85
        ("falcon", 7.2e9, 0.6, "falcon-7b"),
        ("falcon", 41.8e9, 0.7, "falcon-40b"),
        ("opt", 1.3e9, 0.5, "opt-1.3b"),
        ("qwen2", 0.5e9, 0.8, "qwen2"),
    ],
)
def test_the_recipe_for_a_model_is_that_of_its_family_and_size(
    family: str, weights: float, alpha: float, name: str
) -> None:
    recipe = of_model(Of(family, weights), RECIPES)  # type: ignore[arg-type]
    assert recipe is not None
    assert (recipe.alpha, recipe.name) == (alpha, name)


def test_export_takes_alpha_from_the_recipe_and_says_so(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text of some length. " * 20)
    for layout, said, alpha in (
        ("llama", "alpha 0.85, of recipe llama (where to start); --alpha sets another", 0.85),
        ("opt", "alpha 0.5, of recipe opt (the paper); --alpha sets another", 0.5),
    ):
        model, scales, out = zoo.save(layout, tmp_path / layout), tmp_path / f"{layout}.safetensors", tmp_path / "out"
        few = ("--samples", 1, "--length", 32)
        assert smoothquant("calibrate", model, "--text", text, *few, "--out", scales).returncode == 0

        def exported(*options: object, _inputs: tuple = (model, scales), _out: Path = out) -> tuple[str, float]:
            found = smoothquant("export", "w8a8", *_inputs, "--out", _out, "--overwrite", *options)
            assert found.returncode == 0, found.stderr
            return " ".join(found.stderr.split()), load_manifest(_out).origin.smoothing.alpha

        told, used = exported()
        assert said in told
        assert used == alpha
        assert "of recipe" not in exported("--groups", "none")[0]  # which smooths nothing
        told, used = exported("--alpha", 0.65)
        assert "of recipe" not in told
        assert used == 0.65


def test_a_family_of_ones_own_has_no_recipe(tmp_path: Path) -> None:
    mine = Of("llama", 7e9)
    mine.family = replace(mine.family, name="mine")
    assert of_model(mine, RECIPES) is None  # type: ignore[arg-type]
    assert usual_alpha(mine) == (0.5, "as no recipe is for the family mine")  # type: ignore[arg-type]


def test_every_family_is_refused_by_the_others() -> None:
    generic = {recipe.family.name: recipe for recipe in reversed(RECIPES)}
    for recipe in generic.values():
        for other in generic.values():
            if other is not recipe:
                with pytest.raises(UserError, match=f"is of the family {other.family.name};"):
                    doubt(recipe.name, Of(other.name, 1e9))

"""A recipe is for a family, and for models of about one size: what contradicts that is said, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recipes import tiny_llama
from recipes.families import open_model
from recipes.models import RECIPES
from recipes.recipe import contradiction, find, of_family, size
from smoothquant.errors import UserError
from smoothquant.model import Model
from tests import zoo
from tests.recipes.test_bad_input import assert_one_line, smoothquant

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


def test_every_family_is_refused_by_the_others() -> None:
    generic = {recipe.family.name: recipe for recipe in reversed(RECIPES)}
    for recipe in generic.values():
        for other in generic.values():
            if other is not recipe:
                with pytest.raises(UserError, match=f"is of the family {other.family.name};"):
                    doubt(recipe.name, Of(other.name, 1e9))

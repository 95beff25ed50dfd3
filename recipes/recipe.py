"""A recipe: what we know of one published model, and how to take it from float to a validated INT8 engine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from builders.validate import Thresholds
from smoothquant.capacity import FOLDED
from smoothquant.errors import UserError
from smoothquant.family import Family
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import DEFAULT, Step

# On real weights half-way between what the recipe and what no smoothing gives, both per token: a model that gets
# nothing out of smoothing misses. SmolLM2-135M-Instruct (Llama's layout, dequantized from Q4_1), by recipe llama, in
# ONNX Runtime; calibrated on 32 x 512 tokens of WikiText-2's valid.txt, validated on 16 x 512 of test.txt:
#                                          KL mean   top-1    perplexity ratio
#     per token, alpha .85 (the recipe's)    .0182    .9191     1.0143
#     per token, alpha .6                    .0098    .9363     1.0075
#     per token, not smoothed                .0293    .8959     1.0282
#     per tensor, alpha .85                  .0392    .8842     1.0348
#     per tensor, alpha .9                   .0427    .8849     1.0356
#     per tensor, alpha .85, down in float   .0062    .9484     1.0049
# By search, in our own arithmetic, on 64 x 512 of test.txt (tests/benchmarks/real_weights.py): per token .0057, 5 %
# of the bytes in float .0050. Families whose real weights nobody has measured have the same.
DEFAULT_THRESHOLDS = Thresholds(kl_mean=0.024, top1=0.907, perplexity_ratio=1.021)


@dataclass(frozen=True)
class PublishedPerplexity:
    """WikiText-2 perplexities (2048 tokens) published by the SmoothQuant authors: not measured here."""

    fp16: float
    w8a8: float


START = "where to start"  # nobody has published one: try a few, and keep what `smoothquant validate` says is best
PAPER = "the paper"
REPOSITORY = "the authors' repository"


@dataclass(frozen=True)
class Recipe:
    """Settings for one model.

    name: as given on the command line; model: Hub name, None where any checkpoint of the family is meant.
    alpha: migration strength; alpha_by: who says so, if not those who published the results.
    thresholds: what validation must reach.
    samples, length: sequences of calibration and tokens in each.
    targets: what `smoothquant run` makes unless it is told (`recipes.targets`).
    steps: what is done to every layer between smoothing and storing (`smoothquant.steps`).
    """

    name: str
    family: Family
    alpha: float
    model: str | None = None
    thresholds: Thresholds = DEFAULT_THRESHOLDS
    published: PublishedPerplexity | None = None
    alpha_by: str = ""
    samples: int = 128
    length: int = 512
    targets: tuple[str, ...] = ("onnxruntime", "w8a8")
    steps: tuple[Step, ...] = DEFAULT

    @property
    def alpha_from(self) -> str:
        """Who says so."""
        return self.alpha_by or (REPOSITORY if self.published else START)

    def settings(self, model: Model, alpha: float | None = None, groups: str | None = None) -> SmoothingSettings:
        """Smoothing settings, with the recipe's alpha unless another is given. Raises UserError for what this model
        cannot hold."""
        return FOLDED.settings(model, self.alpha if alpha is None else alpha, groups)


SIZE = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(\d?)(?:-|$)")  # in a name: 7b, 8x7b, 560m, 1b7
NEAR = 1.7  # names are rounded, and files may repeat a tied lm_head: up to 1.6 times as many weights, or as few


def size(name: str) -> float | None:
    """The number of weights that a recipe's name tells; None if it tells none. size("bloom-1b7") is 1.7e9."""
    found = SIZE.search(name)
    if not found:
        return None
    experts, number, unit, tenths = found.groups()
    return int(experts or 1) * float(f"{number}.{tenths}" if tenths else number) * (1e9 if unit == "b" else 1e6)


def of_family(model: Model, recipes: tuple[Recipe, ...]) -> tuple[Recipe, ...]:
    """The recipes for the model's family, the one for any of its models first."""
    return tuple(recipe for recipe in recipes if recipe.family.name == model.family.name)


def of_model(model: Model, recipes: tuple[Recipe, ...]) -> Recipe | None:
    """The recipe for a model: of those of its family, the one nearest to its size; None for a family without recipes.

    If recipes for about that size differ in alpha, or if there are none, it is the one for any model of the family.
    """
    family = of_family(model, recipes)
    sized = sorted((recipe for recipe in family if _ratio(recipe, model) < NEAR), key=lambda one: _ratio(one, model))
    return sized[0] if len({recipe.alpha for recipe in sized}) == 1 else family[0] if family else None


def _ratio(recipe: Recipe, model: Model) -> float:
    """How many times as many weights a model has as a recipe tells, or as few; infinite if the recipe tells nothing."""
    told, weights = size(recipe.name) if recipe.model else None, model.checkpoint.weights
    return max(told / weights, weights / told) if told else math.inf


def contradiction(recipe: Recipe, model: Model, recipes: tuple[Recipe, ...]) -> str:
    """What a user should know of a recipe that was not made for this model; empty if it may have been.

    A fine-tune has the family and the size of what it was made from. Raises UserError for a model of a family that has
    recipes of its own.
    """
    meant, folder = recipe.model or f"any {recipe.family.name}", model.checkpoint.folder
    if recipe.family.name != model.family.name:
        fit = of_family(model, recipes)
        if fit:
            raise UserError(
                f"recipe {recipe.name} is for {meant}, and {folder} is of the family {model.family.name}",
                expected=f"a model of the family {recipe.family.name}",
                do=f"take one of the recipes {', '.join(one.name for one in fit)}",
            )
        return (
            f"recipe {recipe.name} is for {meant}, and {folder} is of the family {model.family.name}, without recipes"
        )
    if NEAR <= _ratio(recipe, model) < math.inf:
        return (
            f"recipe {recipe.name} is for {meant}, and {folder} has {model.checkpoint.weights / 1e9:.3g} billion "
            f"weights: its alpha, {recipe.alpha}, may not be the best for this model"
        )
    return ""


def find(name: str, recipes: tuple[Recipe, ...]) -> Recipe:
    """A recipe by name. Raises UserError that lists them."""
    for recipe in recipes:
        if recipe.name == name:
            return recipe
    raise UserError(f"no recipe {name!r}", expected=f"one of {', '.join(recipe.name for recipe in recipes)}")

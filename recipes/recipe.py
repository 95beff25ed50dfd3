"""A recipe: what we know of one published model, and how to take it from float to a validated INT8 engine."""

from __future__ import annotations

from dataclasses import dataclass

from builders.validate import Thresholds
from smoothquant.capacity import FOLDED
from smoothquant.errors import UserError
from smoothquant.family import Family
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import DEFAULT, Step

DEFAULT_THRESHOLDS = Thresholds(kl_mean=0.05, top1=0.93, perplexity_ratio=1.02)


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

    def settings(self, model: Model, alpha: float | None = None, groups: str = "default") -> SmoothingSettings:
        """Smoothing settings, with the recipe's alpha unless another is given. Raises UserError for what this model
        cannot hold."""
        return FOLDED.settings(model, self.alpha if alpha is None else alpha, groups)


def find(name: str, recipes: tuple[Recipe, ...]) -> Recipe:
    """A recipe by name. Raises UserError that lists them."""
    for recipe in recipes:
        if recipe.name == name:
            return recipe
    raise UserError(f"no recipe {name!r}", expected=f"one of {', '.join(recipe.name for recipe in recipes)}")

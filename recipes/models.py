"""Every recipe there is, in the order that listings show."""

from recipes import llama
from recipes.recipe import Recipe

RECIPES: tuple[Recipe, ...] = (*llama.RECIPES,)

"""Every recipe there is, in the order that listings show."""

from recipes import bloom, falcon, gemma, llama, mistral, mixtral, opt, phi, qwen
from recipes.recipe import Recipe

RECIPES: tuple[Recipe, ...] = (
    *llama.RECIPES,
    *mistral.RECIPES,
    *mixtral.RECIPES,
    *falcon.RECIPES,
    *opt.RECIPES,
    *bloom.RECIPES,
    *qwen.RECIPES,
    *phi.RECIPES,
    *gemma.RECIPES,
)

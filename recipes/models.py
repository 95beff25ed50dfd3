"""Every recipe there is, in the order that listings show."""

from recipes import bloom, falcon, gemma, granite, llama, mistral, mixtral, olmo2, opt, phi, qwen, qwen_moe
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
    *granite.RECIPES,
    *olmo2.RECIPES,
    *qwen_moe.RECIPES,
)

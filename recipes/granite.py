"""Granite 3: a Llama with four multipliers, of the embedding, the scores, what a branch adds, and the logits."""

from __future__ import annotations

from dataclasses import replace

from recipes import llama
from recipes.recipe import Recipe
from smoothquant.config import Config
from smoothquant.family import Family, Geometry


def geometry(config: Config) -> Geometry:
    """Numbers of a Granite from its config.json."""
    return replace(
        llama.geometry(config),
        embedding_scale=config.get("embedding_multiplier", 1.0),
        attention_scale=config.get("attention_multiplier", 1.0),
        residual_scale=config.get("residual_multiplier", 1.0),
        logits_scale=1 / config.get("logits_scaling", 1.0),
    )


FAMILY: Family = replace(
    llama.FAMILY,
    name="granite",
    model_types=("granite",),
    architectures=("GraniteForCausalLM",),
    geometry=geometry,
)

RECIPES = (
    Recipe("granite", FAMILY, alpha=0.8),
    *(Recipe(f"granite-3.3-{size}", FAMILY, 0.8, f"ibm-granite/granite-3.3-{size}-base") for size in ("2b", "8b")),
)

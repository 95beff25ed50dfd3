"""Mistral: a Llama with a sliding window (7B v0.1), and heads of another size than hidden / heads (Nemo)."""

from __future__ import annotations

from dataclasses import replace

from recipes import llama
from recipes.recipe import PublishedPerplexity, Recipe
from smoothquant.config import Config
from smoothquant.family import Geometry


def geometry(config: Config) -> Geometry:
    """Numbers of a Mistral from its config.json."""
    numbers = llama.geometry(config.defaulting({"num_key_value_heads": 8, "max_position_embeddings": 131072}))
    return llama.windowed(numbers, config.get("sliding_window", 4096))


FAMILY = replace(
    llama.FAMILY,
    name="mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    geometry=geometry,
)

RECIPES = (
    Recipe("mistral", FAMILY, alpha=0.8),
    Recipe("mistral-7b", FAMILY, 0.8, "mistralai/Mistral-7B-v0.1", published=PublishedPerplexity(5.253, 5.277)),
    Recipe("mistral-nemo-12b", FAMILY, 0.8, "mistralai/Mistral-Nemo-Base-2407"),
)

"""Qwen2, Qwen2.5 (biases of q, k and v) and Qwen3 (norms of every query and key head, no biases).

Qwen3's norms stand between q, k and the scores, so that only v -> o is left to fold through the attention, as in every
family.
"""

from __future__ import annotations

from dataclasses import replace

from recipes import llama
from recipes.recipe import Recipe
from smoothquant.config import Config
from smoothquant.family import Family, Geometry


def _windowed(numbers: Geometry, config: Config) -> Geometry:
    """Sliding windows: off unless asked for, then in the layers that `layer_types` says, or from max_window_layers."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    kinds, first = config.get("layer_types"), config.get("max_window_layers", 28)
    if kinds:
        return llama.windowed(numbers, window, [kind == "sliding_attention" for kind in kinds])
    return llama.windowed(numbers, window, [layer >= first for layer in range(numbers.layers)])


def geometry2(config: Config) -> Geometry:
    """Numbers of a Qwen2 from its config.json."""
    numbers = llama.geometry(config.defaulting({"max_position_embeddings": 32768}))
    return _windowed(replace(numbers, biased=frozenset(("q", "k", "v"))), config)


def geometry3(config: Config) -> Geometry:
    """Numbers of a Qwen3 from its config.json."""
    return _windowed(llama.geometry(config.defaulting({"head_dim": 128, "max_position_embeddings": 32768})), config)


QWEN2: Family = replace(
    llama.FAMILY,
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    geometry=geometry2,
)
QWEN3: Family = replace(
    llama.FAMILY,
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    norms={**llama.FAMILY.norms, "query": "self_attn.q_norm", "key": "self_attn.k_norm"},
    geometry=geometry3,
)

RECIPES = (
    Recipe("qwen2", QWEN2, alpha=0.8),
    *(Recipe(f"qwen2.5-{size.lower()}", QWEN2, 0.8, f"Qwen/Qwen2.5-{size}") for size in ("7B", "14B", "32B", "72B")),
    Recipe("qwen3", QWEN3, alpha=0.8),
    *(Recipe(f"qwen3-{size.lower()}", QWEN3, 0.8, f"Qwen/Qwen3-{size}") for size in ("4B", "8B", "14B", "32B")),
)

"""OLMo 2: norms behind both branches and none before them, and norms of all queries and of all keys at once.

q, k, v, gate and up read the hidden states themselves, so that nothing can be folded before them: only v -> o and
up -> down are smoothed.
"""

from __future__ import annotations

from dataclasses import replace

from recipes import llama
from recipes.recipe import Recipe
from smoothquant.config import Config
from smoothquant.family import Family, Geometry


def geometry(config: Config) -> Geometry:
    """Numbers of an OLMo 2 from its config.json."""
    return llama.geometry(config.defaulting({"rms_norm_eps": 1e-5}))


FAMILY: Family = replace(
    llama.FAMILY,
    name="olmo2",
    model_types=("olmo2",),
    architectures=("Olmo2ForCausalLM",),
    norms={
        "queries": "self_attn.q_norm",
        "keys": "self_attn.k_norm",
        "attention_output": "post_attention_layernorm",
        "mlp_output": "post_feedforward_layernorm",
    },
    groups=tuple(group for group in llama.FAMILY.groups if group.through != "norm"),
    geometry=geometry,
)

MODELS = {"1b": "OLMo-2-0425-1B", "7b": "OLMo-2-1124-7B", "13b": "OLMo-2-1124-13B", "32b": "OLMo-2-0325-32B"}
RECIPES = (
    Recipe("olmo2", FAMILY, alpha=0.8),
    *(Recipe(f"olmo-2-{size}", FAMILY, 0.8, f"allenai/{name}") for size, name in MODELS.items()),
)

"""Phi-3 and Phi-4: a Llama whose q, k, v lie in one matrix on disk, and gate, up in another.

The 128k models have LongRoPE: other frequencies where a sequence is longer than original_max_position_embeddings, which
the cached keys of an engine cannot follow. So one set is chosen, by the length that is wanted (`--max-length`).
"""

from __future__ import annotations

from dataclasses import replace

from recipes import llama
from recipes.recipe import Recipe
from smoothquant.config import Config
from smoothquant.family import Family, Geometry


def geometry(config: Config) -> Geometry:
    """Numbers of a Phi-3 from its config.json."""
    defaults = {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    }
    return llama.windowed(llama.geometry(config.defaulting(defaults), partial=True), config.get("sliding_window"))


QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
FAMILY: Family = replace(
    llama.FAMILY,
    name="phi3",
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    linears={
        **dict.fromkeys(("q", "k", "v"), QKV),
        "o": "self_attn.o_proj",
        **dict.fromkeys(("gate", "up"), GATE_UP),
        "down": "mlp.down_proj",
    },
    geometry=geometry,
)

RECIPES = (
    Recipe("phi3", FAMILY, alpha=0.8),
    *(Recipe(f"phi-3-mini-{size}", FAMILY, 0.8, f"microsoft/Phi-3-mini-{size}-instruct") for size in ("4k", "128k")),
    Recipe("phi-4", FAMILY, 0.8, "microsoft/phi-4"),
)

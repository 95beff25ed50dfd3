"""Phi-3 and Phi-4: a Llama whose q, k, v lie in one matrix on disk, and gate, up in another.

LongRoPE (the 128k models) is refused: it changes its frequencies with the length of the sequence.
"""

from __future__ import annotations

from dataclasses import replace

from recipes import llama
from recipes.recipe import Recipe
from smoothquant.config import Config
from smoothquant.errors import CheckpointError
from smoothquant.family import Family, Geometry


def geometry(config: Config) -> Geometry:
    """Numbers of a Phi-3 from its config.json."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise CheckpointError(
            f"config.json: RoPE type {kind!r}: LongRoPE changes its frequencies where a sequence grows beyond "
            "original_max_position_embeddings, which the cached keys of a graph cannot follow",
            expected="a Phi without it",
            do="use the 4k model",
        )
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    return llama.windowed(llama.geometry(config.defaulting(defaults)), config.get("sliding_window"))


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
    Recipe("phi-3-mini-4k", FAMILY, 0.8, "microsoft/Phi-3-mini-4k-instruct"),
    Recipe("phi-4", FAMILY, 0.8, "microsoft/phi-4"),
)

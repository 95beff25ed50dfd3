"""Mixtral: Mistral's attention, and eight SwiGLU experts, two of which a router chooses for every token.

The norm before the MLP feeds the router and every expert: one scale for all of them. The router is compensated for it
and stays in float.
"""

from __future__ import annotations

from dataclasses import replace

from recipes import llama
from recipes.recipe import PublishedPerplexity, Recipe
from smoothquant.config import Config
from smoothquant.family import Family, Geometry, SmoothingGroup
from smoothquant.roles import ROUTER


def geometry(config: Config) -> Geometry:
    """Numbers of a Mixtral from its config.json."""
    defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    numbers = llama.windowed(llama.geometry(config.defaulting(defaults)), config.get("sliding_window"))
    return replace(
        numbers,
        experts=config.get("num_local_experts", 8),
        experts_per_token=config.get("num_experts_per_tok", 2),
    )


FAMILY: Family = replace(
    llama.FAMILY,
    name="mixtral",
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        ROUTER: "block_sparse_moe.gate",
        "gate": "block_sparse_moe.experts.{}.w1",
        "up": "block_sparse_moe.experts.{}.w3",
        "down": "block_sparse_moe.experts.{}.w2",
    },
    groups=(
        SmoothingGroup("attention", ("q", "k", "v")),
        SmoothingGroup("mlp", (ROUTER, "gate", "up")),
        SmoothingGroup("v", ("o",), through="attention"),
        SmoothingGroup("up", ("down",), through="product"),
    ),
    packed={  # as transformers >= 5 has them in memory
        "mlp.experts.gate_up_proj": ("gate", "up"),
        "mlp.experts.down_proj": ("down",),
        "mlp.gate.weight": (ROUTER,),
    },
    geometry=geometry,
)

# Published: those runs also quantized the router.
RECIPES = (
    Recipe("mixtral", FAMILY, alpha=0.8),
    Recipe("mixtral-8x7b", FAMILY, 0.8, "mistralai/Mixtral-8x7B-v0.1", published=PublishedPerplexity(3.842, 3.893)),
    Recipe("mixtral-8x22b", FAMILY, 0.8, "mistralai/Mixtral-8x22B-v0.1"),
)

"""Qwen3 with experts: Qwen3's attention, and 128 small experts, eight of which a router chooses for every token.

As in Mixtral, the norm before the MLP feeds the router and every expert: one scale for all of them. Every layer has
experts; where some had a dense MLP instead, which no published model has, the model is refused.
"""

from __future__ import annotations

from dataclasses import replace

from recipes import llama, mixtral, qwen
from recipes.recipe import Recipe
from smoothquant.config import Config
from smoothquant.errors import CheckpointError
from smoothquant.family import Family, Geometry
from smoothquant.roles import ROUTER

DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768}


def geometry(config: Config) -> Geometry:
    """Numbers of a Qwen3 with experts from its config.json."""
    for key, everywhere in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if (config.get(key) or everywhere) != everywhere:
            raise CheckpointError(
                f"config.json: {key} is {config[key]}: some layers have experts and others a dense MLP",
                expected=f"{everywhere}: experts in every layer",
                do="serve this model in float",
            )
    inner = {"intermediate_size": config.get("moe_intermediate_size", 768)}  # that of a dense MLP means nothing
    numbers = llama.geometry(config.defaulting(DEFAULTS).replacing(inner))
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return replace(
        llama.windowed(numbers, window),
        experts=config.get("num_experts") or config.get("num_local_experts", 128),
        experts_per_token=config.get("num_experts_per_tok", 8),
        normalized_shares=config.get("norm_topk_prob", False),
    )


FAMILY: Family = replace(
    qwen.QWEN3,
    name="qwen3-moe",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    linears={
        **{role: qwen.QWEN3.linears[role] for role in ("q", "k", "v", "o")},
        ROUTER: "mlp.gate",
        "gate": "mlp.experts.{}.gate_proj",
        "up": "mlp.experts.{}.up_proj",
        "down": "mlp.experts.{}.down_proj",
    },
    groups=mixtral.FAMILY.groups,
    ignored_keys=("intermediate_size", "max_window_layers"),
    packed={"mlp.experts.gate_up_proj": ("gate", "up"), "mlp.experts.down_proj": ("down",)},
    geometry=geometry,
)

RECIPES = (
    Recipe("qwen3-moe", FAMILY, alpha=0.8),
    *(Recipe(f"qwen3-{size.lower()}", FAMILY, 0.8, f"Qwen/Qwen3-{size}") for size in ("30B-A3B", "235B-A22B")),
)
